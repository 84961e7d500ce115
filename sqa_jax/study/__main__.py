"""Runs the study: trains every arm with every adapter, student and seed; then hypothesis tests, costs and the report.

Reads:  questions, teacher replies and students, as config.data, config.study and config.student name them.
Writes: WORKDIR/results.json, report.md, report.html and plots/; every run in WORKDIR/runs/STUDENT/ARM/ADAPTER/SEED
        as `sqa_jax.train` and `sqa_jax.evaluate` leave it. The same command resumes a stopped study, retries failed
        runs, and only writes the report where everything is finished.

Example:
  python -m sqa_jax.study --config configs/study_sample.py --workdir runs/study
"""

from __future__ import annotations

from absl import flags

from sqa_jax import cli


def main() -> None:
    from sqa_jax.study.execute import Interrupted
    from sqa_jax.study.run import run_study

    try:
        run_study(flags.FLAGS.config, flags.FLAGS.workdir)
    except Interrupted:
        print("stopped; finished runs are kept, and the same command resumes the study")


if __name__ == "__main__":
    cli.define_config("configs/study_sample.py")
    cli.run(main)
