"""Answers a split's questions, with a trained run or the bare student, and scores the answers.

Reads:  WORKDIR/checkpoints of a run (its own configuration is used unless --config is given), or with
        --config.eval.checkpoint=none the bare student that --config names.
Writes: WORKDIR/eval/<split>/predictions.jsonl, one row a question in split order, and metrics.json. Stopped
        half-way, it goes on with the questions that are missing.

Examples:
  python -m sqa_jax.evaluate --workdir runs/quickstart
  python -m sqa_jax.evaluate --workdir runs/zero --config configs/quickstart.py --config.eval.checkpoint=none
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError
from sqa_jax.files import atomic_write, disk_errors, open_log, read_json, set_aside, sha256_json, write_json

if TYPE_CHECKING:
    from sqa_jax.runtime import Runtime


def evaluate(config, workdir: str, runtime: Runtime | None = None) -> dict[str, Any]:
    """Evaluates and returns the metrics.

    Args:
      runtime: the loaded student, for many evaluations of one; None loads what the configuration names.

    Raises:
      UserError: there is no checkpoint, or the configuration does not fit it.
    """
    from tqdm import tqdm

    from sqa_jax.data.dataset import load_config_problems
    from sqa_jax.inference.answer import answers, way
    from sqa_jax.metrics.leaderboard import read_predictions, score
    from sqa_jax.parallel.processes import is_main, main_first, meet
    from sqa_jax.runtime import start
    from sqa_jax.training.workdir import check_evaluable, open_workdir

    if not workdir:
        raise UserError("--workdir is needed: the run to evaluate, or where the bare student's predictions are kept")
    root, settings, mode = open_workdir(workdir), config.eval, way(config)
    if settings.checkpoint not in ("best", "last", "none"):
        raise UserError(f"config.eval.checkpoint is {settings.checkpoint!r}; choose best, last or none")
    if settings.checkpoint != "none" and not (root / "checkpoints").is_dir():
        raise UserError(
            f"{root}: has no checkpoints; train first, or evaluate the bare student with --config.eval.checkpoint=none"
        )
    loaded = load_config_problems(config)
    problems = loaded.split(settings.split)[: settings.limit or None]
    runtime = runtime or start(config)
    if settings.checkpoint != "none":
        check_evaluable(root, config, runtime.student.fingerprint)
    step, adapter = _adapter(config, root, runtime)
    base = {} if "full" in adapter else runtime.student.params

    # What decides the predictions: a directory with others under the same name is moved aside, never mixed.
    made_of = {
        "recipe": config.recipe.to_dict(), "eval": settings.to_dict(), "adapter": config.adapter.to_dict() if adapter else None,
        "student": runtime.student.fingerprint, "problems": [p.pid for p in problems], "data": loaded.fingerprint,
        "checkpoint": [settings.checkpoint, step], "seed": config.seed,
    }  # fmt: skip
    identity = sha256_json(made_of)
    folder = root / "eval" / (settings.folder or settings.split)
    final, partial, metrics_file = (
        folder / "predictions.jsonl",
        folder / f"partial-{identity[:16]}.jsonl",
        folder / "metrics.json",
    )
    with main_first(), disk_errors(partial):
        if final.exists():
            before = read_json(metrics_file, "the metrics of these predictions") if metrics_file.exists() else {}
            if before.get("fingerprint") == identity:
                if is_main():
                    print(f"reused {final}")
                return before
            set_aside(
                folder, folder.with_name(f"{folder.name}.{before.get('fingerprint', 'unknown')[:8]}-{int(time.time())}")
            )
        folder.mkdir(parents=True, exist_ok=True)
        known = _read_partial(partial)
    meet()  # from here on, the file grows
    with disk_errors(partial):
        missing = [problem for problem in problems if problem.pid not in known]
        started = time.perf_counter()
        with (
            open_log(partial) if is_main() else open(os.devnull, "a") as file,
            tqdm(
                total=len(problems), initial=len(known), unit="question", dynamic_ncols=True, disable=not is_main()
            ) as bar,
        ):
            for one in answers(config, runtime)(adapter, base, missing) if missing else ():
                row = {"pid": missing[one.index].pid, **one._asdict()}
                del row["index"]
                known[row["pid"]] = row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.update()
        seconds = time.perf_counter() - started
    with main_first():
        if is_main():
            with atomic_write(final) as file:
                file.writelines(json.dumps(known[problem.pid], ensure_ascii=False) + "\n" for problem in problems)
        metrics = score(problems, read_predictions(final), str(final))
    metrics |= {"split": settings.split, "mode": mode, "checkpoint": settings.checkpoint, "step": step}
    for name in ("read", "written", "scored"):
        metrics[f"tokens_{name}"] = sum(row[name] for row in known.values())
    metrics |= {"questions_per_second": round(len(missing) / seconds, 3) if missing else None, "fingerprint": identity}
    if is_main():
        write_json(metrics_file, metrics)
        partial.unlink()
    return metrics


def _adapter(config, root: Path, runtime) -> tuple[int | None, Any]:
    """(step, adapter) of the checkpoint that the configuration asks for; (None, {}) for the bare student."""
    import jax

    from sqa_jax.adapters import adapter as adapters
    from sqa_jax.parallel.rules import shardings
    from sqa_jax.training.checkpoint import Checkpoints, abstract
    from sqa_jax.training.optimizer import make_optimizer
    from sqa_jax.training.step import init_state

    which = config.eval.checkpoint
    if which == "none":
        return None, {}

    def new(base):
        adapter = adapters.init_adapter(config.adapter, runtime.student.config, base, config.seed)
        return adapter if which == "best" else init_state(adapter, make_optimizer(config.optimizer, 1))

    shape = jax.eval_shape(new, runtime.student.params)
    checkpoints = Checkpoints(root / "checkpoints")
    found = checkpoints.restore_adapter(which, abstract(shape, shardings(shape, runtime.mesh)))
    checkpoints.close()
    if found is None:
        raise UserError(
            f"{root}/checkpoints: holds no {which} checkpoint yet; train longer, or choose --config.eval.checkpoint"
        )
    return found


def _read_partial(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an interrupted evaluation by pid; a half-written last line is cut off."""
    if not path.exists():
        return {}
    rows, whole = {}, []
    for line in path.read_bytes().decode().split("\n"):  # as in `read_jsonl`
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows[row["pid"]] = row
        whole.append(line)
    with atomic_write(path) as file:
        file.writelines(line + "\n" for line in whole)
    return rows


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
