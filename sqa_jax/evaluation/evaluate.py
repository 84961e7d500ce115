"""Answering the questions that are not answered yet, and scoring all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.batches.config_data import load_config_problems
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.config_aliases import original_names
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.evaluation.student import open_student
from sqa_jax.inference.answer import Prediction, answer_mode, make_answerer
from sqa_jax.inference.features import image_batcher
from sqa_jax.inference.predictions import Predictions
from sqa_jax.metrics.leaderboard import read_predictions, score
from sqa_jax.parallel.processes import main_first
from sqa_jax.runtime import Runtime
from sqa_jax.training.restore import check_checkpoint
from sqa_jax.training.workdir import open_workdir

Row = dict[str, Any]  # of predictions.jsonl


def answer_and_score(
    folder: Path,
    problems: Sequence[Problem],
    identity: Mapping[str, Any],
    answer: Callable[[list[Problem]], Iterable[Row]],
    details: Callable[[Collection[Row]], Mapping[str, Any]],
) -> dict[str, Any]:
    """Answers the questions, each at most once, and returns the metrics.

    Writes FOLDER/predictions.jsonl and FOLDER/metrics.json. Stopped half-way, the next call asks only the questions
    that are missing; predictions of another identity are archived.

    Args:
      identity: everything that decides the predictions.
      answer: (questions) → their rows, each with its "pid", in any order.
      details: (all rows) → metrics to record besides the scores.
    """
    predictions = Predictions(folder, identity)
    if predictions.metrics is not None:
        return predictions.metrics
    missing = predictions.missing(problems)
    started = time.perf_counter()
    if missing:
        predictions.collect(answer(missing), len(problems))
    seconds = time.perf_counter() - started
    predictions.write(problems)
    with main_first():
        metrics = score(problems, read_predictions(predictions.file), str(predictions.file))
    metrics |= details(predictions.known.values())
    metrics["questions_per_second"] = round(len(missing) / seconds, 3) if missing else None
    return predictions.finish(metrics)


def evaluate(config, workdir: str, runtime: Runtime | None = None) -> dict[str, Any]:
    """Evaluates a trained run or the bare student, and returns the metrics.

    Args:
      runtime: the loaded student, for many evaluations of one; None loads what the configuration names.

    Raises:
      UserError: there is no checkpoint, or the configuration does not fit it.
    """
    if not workdir:
        raise UserError("--workdir is needed: the run to evaluate, or where the bare student's predictions are kept")
    root, settings, mode = open_workdir(workdir), config.eval, answer_mode(config)
    check_checkpoint(config, root)
    problem_set = load_config_problems(config)
    problems = problem_set.split(settings.split)[: settings.limit or None]
    student = open_student(config, root, runtime)
    images = image_batcher(student.config, student.runtime, problems)
    failed = {} if images is None else images.images.failed

    def answer(missing: list[Problem]) -> Iterable[Row]:
        predictions = make_answerer(student.config, student.runtime, images)(student.adapter, student.base, missing)
        return (_row(missing[prediction.index].pid, prediction, failed) for prediction in predictions)

    def details(rows: Collection[Row]) -> dict[str, Any]:
        return {
            "split": settings.split, "mode": mode, "checkpoint": settings.checkpoint, "step": student.step,
            **{f"tokens_{name}": sum(row[name] for row in rows) for name in ("read", "written", "scored")},
            **({"without_image": {"n": len(failed), **images.images.failures}} if images is not None else {}),
        }  # fmt: skip

    identity = student.identity(problem_set, problems) | _eval_identity(settings, student.step, images)
    return answer_and_score(root / "eval" / (settings.folder or settings.split), problems, identity, answer, details)


def _eval_identity(settings, step: int | None, images: ImageBatcher | None) -> dict[str, Any]:
    """What decides the predictions of `evaluate` besides student and questions."""
    identity = {"eval": original_names(settings.to_dict(), "eval"), "checkpoint": [settings.checkpoint, step]}
    return identity if images is None else {**identity, "pictures": images.images.fingerprint}


def _row(pid: str, prediction: Prediction, failed: Mapping[str, str]) -> Row:
    """A row of predictions.jsonl; its "status" says where a question was asked without its image, and why."""
    row = {
        "pid": pid, "answer": prediction.answer, "text": prediction.text, "read": prediction.prompt_tokens,
        "written": prediction.generated_tokens, "scored": prediction.scored_tokens,
    }  # fmt: skip
    return row | ({"status": f"without its image: {failed[pid]}"} if pid in failed else {})
