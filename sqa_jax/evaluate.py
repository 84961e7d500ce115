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
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError
from sqa_jax.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqa_jax.inference.answer import Prediction
    from sqa_jax.runtime import Runtime


def evaluate(config, workdir: str, runtime: Runtime | None = None) -> dict[str, Any]:
    """Evaluates and returns the metrics.

    Args:
      runtime: the loaded student, for many evaluations of one; None loads what the configuration names.

    Raises:
      UserError: there is no checkpoint, or the configuration does not fit it.
    """
    from sqa_jax.adapters.peft_read import given_adapter
    from sqa_jax.batches.dataset import load_config_problems
    from sqa_jax.inference.answer import answer_mode, answers
    from sqa_jax.inference.features import picture_rows
    from sqa_jax.inference.predictions import Predictions
    from sqa_jax.metrics.leaderboard import read_predictions, score
    from sqa_jax.parallel.processes import main_first
    from sqa_jax.runtime import build_runtime
    from sqa_jax.training.restore import check_checkpoint, restore_adapter
    from sqa_jax.training.workdir import check_evaluable, open_workdir

    if not workdir:
        raise UserError("--workdir is needed: the run to evaluate, or where the bare student's predictions are kept")
    root, settings, mode = open_workdir(workdir), config.eval, answer_mode(config)
    check_checkpoint(config, root)
    config, given = given_adapter(config) if settings.checkpoint == "none" else (config, None)
    loaded = load_config_problems(config)
    problems = loaded.split(settings.split)[: settings.limit or None]
    runtime = runtime or build_runtime(config)
    if settings.checkpoint != "none":
        check_evaluable(root, config, runtime.student.fingerprint)
    step, adapter = restore_adapter(config, root, runtime, given)
    base = {} if "full" in adapter else runtime.student.params
    seen = picture_rows(config, runtime, problems)
    unseen = {} if seen is None else seen.pictures.failed

    predictions = Predictions(
        root / "eval" / (settings.folder or settings.split),
        {
            "recipe": config.recipe.to_dict(), "eval": settings.to_dict(), "adapter": config.adapter.to_dict() if adapter else None,
            "student": runtime.student.fingerprint, "problems": [p.pid for p in problems], "data": loaded.fingerprint,
            "checkpoint": [settings.checkpoint, step], "seed": config.seed, **({"peft": given.fingerprint} if given else {}),
            **({"pictures": seen.pictures.fingerprint} if seen else {}),
        },
    )  # fmt: skip
    if predictions.metrics is not None:
        return predictions.metrics
    missing = predictions.missing(problems)
    started = time.perf_counter()
    if missing:
        found = answers(config, runtime, seen)(adapter, base, missing)
        predictions.collect((_row(missing[one.index].pid, one, unseen) for one in found), len(problems))
    seconds = time.perf_counter() - started
    predictions.write(problems)
    with main_first():
        metrics = score(problems, read_predictions(predictions.file), str(predictions.file))
    metrics |= {"split": settings.split, "mode": mode, "checkpoint": settings.checkpoint, "step": step}
    for name in ("read", "written", "scored"):
        metrics[f"tokens_{name}"] = sum(row[name] for row in predictions.known.values())
    if seen is not None:
        metrics["without_image"] = {"n": len(unseen), **seen.pictures.failures}
    metrics["questions_per_second"] = round(len(missing) / seconds, 3) if missing else None
    return predictions.finish(metrics)


def _row(pid: str, one: Prediction, unseen: Mapping[str, str]) -> dict[str, Any]:
    """A row of predictions.jsonl; its "status" says where a question was asked without its picture, and why."""
    row = {"pid": pid, **{name: value for name, value in one._asdict().items() if name != "index"}}
    return row | ({"status": f"without its image: {unseen[pid]}"} if pid in unseen else {})


def run_config(workdir: str):
    """The configuration to evaluate with: --config where given, else the run's own with the command line's overrides."""
    from ml_collections import ConfigDict, config_flags

    from sqa_jax.training.workdir import open_workdir

    flag = flags.FLAGS["config"]
    file = open_workdir(workdir) / "config.json"
    if cli.given_config(sys.argv) is not None or not file.exists():
        return flags.FLAGS.config
    config = ConfigDict(read_json(file, "the configuration of this run")["config"])
    config.update_from_flattened_dict(config_flags.get_override_values(flag))
    return config.lock()


def main() -> None:
    workdir = flags.FLAGS.workdir
    from sqa_jax.parallel.processes import is_main

    metrics = evaluate(run_config(workdir), workdir)
    if is_main():
        print(json.dumps({key: value for key, value in metrics.items() if key != "fingerprint"}))
        print(f"predictions and metrics are in {workdir}/eval/{metrics['split']}")


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    cli.define_processes()
    cli.run(main)
