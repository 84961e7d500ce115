"""The study from its configuration to its report: checks, runs, results.json, report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sqa_jax.batches.config_data import load_config_problems
from sqa_jax.data.sources import ProblemSet
from sqa_jax.errors import UserError
from sqa_jax.files import local_path, read_json, write_json
from sqa_jax.study import comparisons, summary, systems
from sqa_jax.study.check import check_study
from sqa_jax.study.execute import Executor
from sqa_jax.study.explain import explanations
from sqa_jax.study.matrix import StudyRun, study_runs
from sqa_jax.study.published import PUBLISHED
from sqa_jax.study.report import write_report
from sqa_jax.teach import recorded_models

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain", "numpy", "scipy")
_RUN_FIELDS = ("student", "arm", "adapter", "seed", "status", "error", "seconds")


def run_study(config, workdir: str, command: str = "") -> dict[str, Any]:
    """Runs or resumes a study; returns the content of WORKDIR/results.json.

    Args:
      command: what results.json gives as the command; "" is this process's.

    Raises:
      UserError: a run could not be made, which is known before the first starts, or WORKDIR is another study's.
      Interrupted: SIGTERM came, or config.train.stop_after; finished runs are kept.
    """
    if not workdir:
        raise UserError("--workdir is needed: where the study's runs, results and report are kept")
    root = local_path(workdir, "a study")
    runs = study_runs(config)
    problems = load_config_problems(config)
    usable = check_study(config, runs, problems)
    # These read files that may be missing: before hours are spent on runs.
    existing = recorded_models.existing_models(config, problems)
    agent = None
    if config.study.agent:
        file = Path(config.study.agent) / "results.json"
        agent = read_json(file, "what python -m sqa_jax.agent left (config.study.agent)")
    executor = Executor(config, root, problems)
    for run in runs:
        executor.finished_record(run)

    records = _execute(executor, runs)
    results: dict[str, Any] = {
        "command": command or shlex.join(["python", "-m", "sqa_jax.study", *sys.argv[1:]]),
        "config": config.to_dict(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "machine": machine(),
        **_measurements(config, root, problems, runs, records, usable),
        "benchmark": [{name: value for name, value in row.items() if name != "records"} for row in existing],
        "explanations": explanations(config, runs, records, root, problems, existing),
        "agent": agent,
        "published": [row._asdict() for row in PUBLISHED],
        "runs": [{name: record.get(name) for name in _RUN_FIELDS} for record in records],
    }
    write_json(root / "results.json", results)
    results = read_json(root / "results.json", "the study's results")  # all that the report is made from
    write_report(results, root)
    print(f"results.json, report.md and report.html are in {root}")
    return results


def _execute(executor: Executor, runs: Sequence[StudyRun]) -> list[dict[str, Any]]:
    """The record of each run, with a line of progress before and after it."""
    records = []
    for number, run in enumerate(runs, start=1):
        name = f"[{number}/{len(runs)}] {run}"
        print(name, flush=True)
        record = executor(run)
        records.append(record)
        if record["status"] == "finished":
            metrics = record["metrics"]
            print(f"{name}: {metrics['AVG']:.2f} % of {metrics['n']['AVG']}", flush=True)
        else:
            print(f"{name}: failed: {record['error']}", flush=True)
    return records


def _measurements(
    config,
    root: Path,
    problems: ProblemSet,
    runs: Sequence[StudyRun],
    records: Sequence[dict[str, Any]],
    usable: dict[str, int],
) -> dict[str, Any]:
    """The parts of results.json that come from the runs' predictions, and the baselines on the same questions."""
    split, study = config.eval.split, config.study
    test = problems.split(split)[: config.eval.limit or None]
    over_seeds = study.resample == "questions_and_seeds"
    loaded = systems.load_systems(runs, records, root, test, split)
    bag_of_words = recorded_models.bag_of_words_correctness(problems.split(config.data.train_split), test)
    return {
        "data": {
            "name": problems.name, "fingerprint": problems.fingerprint, "train": usable,
            "test": summary.question_counts(test),
        },
        "systems": [systems.summarize_system(key, system, test, over_seeds) for key, system in loaded.items()],
        "hypotheses": comparisons.hypothesis_tests(loaded, test, over_seeds),
        "adapters": comparisons.adapter_differences(loaded, test, over_seeds),
        "differences": comparisons.arm_differences(loaded, test, study.reference, over_seeds),
        "agreement": comparisons.agreement(loaded),
        "curves": summary.learning_curves(runs, records, root),
        "examples": summary.example_questions(loaded, runs, root, test, split),
        "baselines": {
            "chance": 100 * recorded_models.chance(test),
            "bag_of_words": 100 * sum(bag_of_words) / len(bag_of_words),
        },
    }  # fmt: skip


def machine() -> str:
    """The devices that JAX computes on, and the host."""
    import jax

    devices = jax.devices()
    accelerator = f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"
    return f"{accelerator}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
