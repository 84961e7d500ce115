"""Runs the study: every arm with every adapter, student and seed; then the hypotheses, the costs and the report.

Reads:  questions, teacher replies and students, as config.data, config.study and config.student name them.
Writes: WORKDIR/results.json, report.md, report.html and plots/; every run in WORKDIR/runs/STUDENT/ARM/ADAPTER/SEED
        as `sqa_jax.train` and `sqa_jax.evaluate` leave it. The same command continues where it was stopped, tries
        failed runs again, and makes only the report where everything is done.

Example:
  python -m sqa_jax.study --config configs/study_sample.py --workdir runs/study
"""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain", "numpy", "scipy")


def study(config, workdir: str, command: str = "") -> dict[str, Any]:
    """Runs (or continues) a study; returns what WORKDIR/results.json holds.

    Raises:
      UserError: something that would stop a run is known before any is started, or WORKDIR is another study's.
      Interrupted: SIGTERM came, or config.train.stop_after; what is done is kept.
    """
    from sqa_jax.batches.config_data import load_config_problems
    from sqa_jax.files import local_path, read_json, write_json
    from sqa_jax.study import summary
    from sqa_jax.study.execute import Executor
    from sqa_jax.study.explain import explanations
    from sqa_jax.study.matrix import check, runs_of
    from sqa_jax.study.published import PUBLISHED
    from sqa_jax.study.report import write_report
    from sqa_jax.teach import recorded_models

    if not workdir:
        raise UserError("--workdir is needed: where the study's runs, results and report are kept")
    root = local_path(workdir, "a study")
    runs = runs_of(config)
    problems = load_config_problems(config)
    usable = check(config, runs, problems)
    existing = recorded_models.existing_models(
        config, problems
    )  # before hours are spent: it reads files that may be missing
    agent = None
    if config.study.agent:
        agent = read_json(
            Path(config.study.agent) / "results.json", "what python -m sqa_jax.agent left (config.study.agent)"
        )
    executor = Executor(config, root, problems)
    for run in runs:
        executor.done(run)

    records = []
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run}", flush=True)
        records.append(executor(run))
        last = records[-1]
        if last["status"] == "finished":
            print(
                f"[{number}/{len(runs)}] {run}: {last['metrics']['AVG']:.2f} % of {last['metrics']['n']['AVG']}",
                flush=True,
            )
        else:
            print(f"[{number}/{len(runs)}] {run}: failed: {last['error']}", flush=True)

    test = problems.split(config.eval.split)[: config.eval.limit or None]
    over_seeds = config.study.resample == "questions_and_seeds"
    systems = summary.collect(runs, records, root, test, config.eval.split)
    words = recorded_models.word_counts(problems.split(config.data.train_split), test)
    results = {
        "command": command or shlex.join(["python", "-m", "sqa_jax.study", *sys.argv[1:]]),
        "config": config.to_dict(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "machine": machine(),
        "data": {"name": problems.name, "fingerprint": problems.fingerprint, "train": usable, "test": summary.counts(test)},
        "systems": [summary.summarize_system(key, system, test, over_seeds) for key, system in systems.items()],
        "hypotheses": summary.test_hypotheses(systems, test, over_seeds),
        "adapters": summary.adapter_differences(systems, test, over_seeds),
        "differences": summary.differences(systems, test, config.study.reference, over_seeds),
        "agreement": summary.agreement(systems),
        "curves": summary.curves(runs, records, root),
        "examples": summary.examples(systems, runs, root, test, config.eval.split),
        "baselines": {"chance": 100 * recorded_models.chance(test), "bag_of_words": 100 * sum(words) / len(words)},
        "benchmark": [{name: value for name, value in row.items() if name != "records"} for row in existing],
        "explanations": explanations(config, runs, records, root, problems, existing),
        "agent": agent,
        "published": [row._asdict() for row in PUBLISHED],
        "runs": [{name: record.get(name) for name in ("student", "arm", "adapter", "seed", "status", "error", "seconds")} for record in records],
    }  # fmt: skip
    write_json(root / "results.json", results)
    results = read_json(root / "results.json", "the study's results")  # the report knows nothing else
    write_report(results, root)
    print(f"results.json, report.md and report.html are in {root}")
    return results


def machine() -> str:
    """The devices that JAX computes on, and the host."""
    import os

    import jax

    devices = jax.devices()
    return f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}), {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def main() -> None:
    from sqa_jax.study.execute import Interrupted

    try:
        study(flags.FLAGS.config, flags.FLAGS.workdir)
    except Interrupted:
        print("stopped, what is done is kept; the same command continues")


if __name__ == "__main__":
    cli.define_config("configs/study_sample.py")
    cli.run(main)
