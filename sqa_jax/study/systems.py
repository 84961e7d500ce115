"""Systems: the finished runs of one student, arm and adapter, their accuracy with intervals, and their mean costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sqa_jax.data.problem import Problem
from sqa_jax.metrics.intervals import accuracy_interval
from sqa_jax.metrics.leaderboard import COLUMNS, correctness, read_predictions
from sqa_jax.metrics.paired_tests import bootstrap_interval
from sqa_jax.study.matrix import StudyRun, student_name

Key = tuple[str, str, str]  # student, arm, adapter


class System(NamedTuple):
    """The finished runs of one student, arm and adapter, seed by seed.

    Attributes:
      correct: [S, n] 1 where the run of a seed answered a test question correctly, else 0.
      answers: [S, n] index of the chosen option, -1 for none.
      records: for each seed, the content of its `run.json`.
      failed: (seed, reason) of the other runs.
    """

    correct: Float[np.ndarray, "S n"]
    answers: Int[np.ndarray, "S n"]
    records: list[dict[str, Any]]
    failed: list[tuple[int, str]]

    @property
    def has_vision(self) -> bool:
        """Whether the student gets the questions' images."""
        return any(record.get("sees") for record in self.records)


def load_systems(
    runs: Sequence[StudyRun], records: Sequence[dict[str, Any]], root: Path, problems: Sequence[Problem], split: str
) -> dict[Key, System]:
    """Groups runs by student, arm and adapter and reads their predictions."""
    systems: dict[Key, System] = {}
    for run, record in zip(runs, records, strict=True):
        key = (student_name(run.student), run.arm, run.adapter)
        nothing = System(np.zeros((0, len(problems))), np.zeros((0, len(problems)), int), [], [])
        system = systems.setdefault(key, nothing)
        if record["status"] != "finished":
            system.failed.append((run.seed, record["error"]))
            continue
        predictions = read_predictions(run.folder(root) / "eval" / split / "predictions.jsonl")
        correct = np.array(correctness(problems, predictions, str(run)), float)
        answers = [-1 if (answer := predictions.get(p.pid)) is None else answer for p in problems]
        systems[key] = system._replace(
            correct=np.vstack([system.correct, correct]),
            answers=np.vstack([system.answers, answers]),
            records=[*system.records, record],
        )
    return systems


def summarize_system(key: Key, system: System, problems: Sequence[Problem], over_seeds: bool) -> dict[str, Any]:
    """Accuracies in percent (means over seeds), the interval of the average, the spread over seeds, and costs."""
    student, arm, adapter = key
    row: dict[str, Any] = {
        "student": student, "arm": arm, "adapter": adapter, "failed": system.failed, "seeds": len(system.records),
    }  # fmt: skip
    if not system.records:
        return row
    by_seed = 100 * system.correct.mean(axis=1)
    if len(system.correct) == 1:
        low, high = accuracy_interval(system.correct[0].astype(bool).tolist())[1:]
    else:
        low, high = bootstrap_interval(np.zeros_like(system.correct), system.correct, over_seeds)
    columns = {}
    for column, belongs in COLUMNS.items():
        mask = [belongs(problem) for problem in problems]
        columns[column] = round(float(100 * system.correct[:, mask].mean()), 2) if any(mask) else None
    row |= {
        "columns": columns, "low": 100 * low, "high": 100 * high, "by_seed": by_seed.round(2).tolist(),
        "spread": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
        "unparsed": int((system.answers < 0).sum()),
        "inference": _mean_by_name([record["inference"] for record in system.records]),
        "evaluation_seconds": _mean([_evaluation_seconds(record["metrics"]) for record in system.records]),
    }  # fmt: skip
    first = system.records[0]
    if "training" in first:
        row["training"] = _mean_by_name([record["training"] for record in system.records])
        row["teacher"] = first["teacher"]  # every seed trains on the same replies, unless questions are sampled
        row["rows"], row["rows_by_source"] = first["dataset"]["rows"], first["dataset"]["rows_by_source"]
    return row


def _evaluation_seconds(metrics: Mapping[str, Any]) -> float | None:
    rate = metrics.get("questions_per_second")
    return metrics["n"]["AVG"] / rate if rate else None


def _mean_by_name(records: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {name: _mean([record[name] for record in records]) for name in records[0]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
