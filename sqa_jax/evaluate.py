"""Answers a split's questions, with a trained run or the bare student, and scores the answers.

Reads:  WORKDIR/checkpoints of a run (its own configuration is used unless --config is given), or with
        --config.eval.checkpoint=none the bare student that --config names, with the adapter of PEFT that
        --config.adapter.peft names, if any.
Writes: WORKDIR/eval/<split>/predictions.jsonl, one row a question in split order, and metrics.json. Stopped
        half-way, it goes on with the questions that are missing.

Examples:
  python -m sqa_jax.evaluate --workdir runs/quickstart
  python -m sqa_jax.evaluate --workdir runs/zero --config configs/quickstart.py --config.eval.checkpoint=none
"""

from __future__ import annotations

import json

from absl import flags

from sqa_jax import cli


def main() -> None:
    from sqa_jax.evaluation.evaluate import evaluate
    from sqa_jax.parallel.processes import is_main
    from sqa_jax.training.workdir import run_config

    workdir = flags.FLAGS.workdir
    metrics = evaluate(run_config(workdir), workdir)
    if is_main():
        print(json.dumps({key: value for key, value in metrics.items() if key != "fingerprint"}))
        print(f"predictions and metrics are in {workdir}/eval/{metrics['split']}")


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    cli.define_processes()
    cli.run(main)
