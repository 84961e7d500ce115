"""From finished runs to `results.json`: accuracies, hypotheses, costs, agreement, all with their uncertainty."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sqa_jax.data.problem import Problem
from sqa_jax.files import read_jsonl
from sqa_jax.metrics.intervals import accuracy_interval
from sqa_jax.metrics.leaderboard import COLUMNS, correctness, read_predictions, score
from sqa_jax.metrics.paired_tests import Comparison, bootstrap_interval, compare, holm
from sqa_jax.study.hypotheses import HYPOTHESES, verdict
from sqa_jax.study.matrix import NO_ADAPTER, ZERO_SHOT, Run, student_name

Key = tuple[str, str, str]  # student, arm, adapter


class System(NamedTuple):
    """The runs of one student, arm and adapter that finished, seed by seed.

    Attributes:
      correct: [S, n] whether each seed answered each test question rightly.
      answers: [S, n] index of the chosen option, -1 for none.
      records: of each seed, what `run.json` holds.
      failed: (seed, reason) of the others.
    """

    correct: np.ndarray
    answers: np.ndarray
    records: list[dict[str, Any]]
    failed: list[tuple[int, str]]

    @property
    def sees(self) -> bool:
        """Whether the student reads the questions' images."""
        return any(record.get("sees") for record in self.records)


def collect(
    runs: Sequence[Run], records: Sequence[dict[str, Any]], root: Path, problems: Sequence[Problem], split: str
) -> dict[Key, System]:
    """Groups runs by student, arm and adapter and reads their predictions."""
    systems: dict[Key, System] = {}
    for run, record in zip(runs, records, strict=True):
        key = (student_name(run.student), run.arm, run.adapter)
        system = systems.setdefault(
            key, System(np.zeros((0, len(problems))), np.zeros((0, len(problems)), int), [], [])
        )
        if record["status"] != "finished":
            system.failed.append((run.seed, record["error"]))
            continue
        predictions = read_predictions(run.folder(root) / "eval" / split / "predictions.jsonl")
        right = np.array(correctness(problems, predictions, str(run)), float)
        chosen = [-1 if (answer := predictions.get(p.pid)) is None else answer for p in problems]
        systems[key] = system._replace(
            correct=np.vstack([system.correct, right]),
            answers=np.vstack([system.answers, chosen]),
            records=[*system.records, record],
        )
    return systems


def summarize_system(key: Key, system: System, problems: Sequence[Problem], over_seeds: bool) -> dict[str, Any]:
    """Columns in percent (means over seeds), the interval of the average, its spread over seeds, and costs."""
    student, arm, adapter = key
    row: dict[str, Any] = {
        "student": student,
        "arm": arm,
        "adapter": adapter,
        "failed": system.failed,
        "seeds": len(system.records),
    }
    if not system.records:
        return row
    by_seed = 100 * system.correct.mean(axis=1)
    if len(system.correct) == 1:
        low, high = accuracy_interval(system.correct[0].astype(bool).tolist())[1:]
    else:
        low, high = bootstrap_interval(np.zeros_like(system.correct), system.correct, over_seeds)
    columns = {}
    for column, belongs in COLUMNS.items():
        own = [belongs(problem) for problem in problems]
        columns[column] = round(float(100 * system.correct[:, own].mean()), 2) if any(own) else None
    row |= {
        "columns": columns, "low": 100 * low, "high": 100 * high, "by_seed": by_seed.round(2).tolist(),
        "spread": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
        "unparsed": int((system.answers < 0).sum()),
        "inference": _mean([record["inference"] for record in system.records]),
        "evaluation_seconds": _mean_of([_evaluation_seconds(record["metrics"]) for record in system.records]),
    }  # fmt: skip
    if "training" in system.records[0]:
        row["training"] = _mean([record["training"] for record in system.records])
        row["teacher"] = system.records[0]["teacher"]  # the same replies teach every seed, unless questions are drawn
        row["rows"] = system.records[0]["dataset"]["rows"]
        row["rows_by_source"] = system.records[0]["dataset"]["rows_by_source"]
    return row


def test_hypotheses(systems: dict[Key, System], problems: Sequence[Problem], over_seeds: bool) -> list[dict[str, Any]]:
    """Every hypothesis for each student and adapter, with Holm's correction over all that could be tested."""
    tested, untested = [], []
    pictured = _pictured(problems)
    for student, adapter in dict.fromkeys(
        (student, adapter) for student, _, adapter in systems if adapter != NO_ADAPTER
    ):
        sees = any(system.sees for (name, _, _), system in systems.items() if name == student)
        for hypothesis in HYPOTHESES:
            if not hypothesis.concerns(sees, adapter):
                continue
            arms = (hypothesis.first, hypothesis.second)
            keys = [(student, arm, NO_ADAPTER if arm in ZERO_SHOT else adapter) for arm in arms]
            first, second = map(systems.get, keys)
            row = {"student": student, "adapter": adapter, **dataclasses.asdict(hypothesis)}
            lacking = [
                key for key, system in zip(keys, (first, second), strict=True) if not (system and system.records)
            ]
            if lacking:
                why = "; ".join(_why_not(key[1], systems.get(key)) for key in lacking)
                untested.append({**row, "verdict": "not tested", "why": why})
            elif hypothesis.images and not pictured.any():
                untested.append({**row, "verdict": "not tested", "why": "no question of the test has an image"})
            elif over_seeds and _fewest(systems, keys) < 2:
                untested.append(
                    {**row, "verdict": "not tested", "why": "seeds are to be resampled, and fewer than two finished"}
                )
            else:
                own = pictured if hypothesis.images else slice(None)
                tested.append((row, hypothesis, _compare(first, second, over_seeds, own)))
    adjusted = holm([comparison.p for _, _, comparison in tested])
    rows = []
    for (row, hypothesis, comparison), p in zip(tested, adjusted, strict=True):
        word, why = verdict(hypothesis, comparison, p)
        rows.append({**row, "verdict": word, "why": why, **dataclasses.asdict(comparison), "adjusted_p": p})
    return rows + untested


def adapter_differences(
    systems: dict[Key, System], problems: Sequence[Problem], over_seeds: bool
) -> list[dict[str, Any]]:
    """Of each student and arm: each adapter minus the untrained student, and minus the adapters named before it.

    On all questions, and on those with an image; findings to look at, not tests.
    """
    rows = []
    pictured = _pictured(problems)
    for (student, arm, adapter), system in systems.items():
        if adapter == NO_ADAPTER or not system.records:
            continue
        others = [key for key in systems if key[0] == student and (key[1] == arm or key[1] == "zero_shot")]
        for other in others[: others.index((student, arm, adapter))]:
            if not systems[other].records:
                continue
            for questions, own in (("all", slice(None)), ("with an image", pictured)):
                if questions == "all" or pictured.any():
                    comparison = _compare(systems[other], system, over_seeds, own)
                    row = {
                        "student": student,
                        "arm": arm,
                        "adapter": adapter,
                        "minus": other[2],
                        "questions": questions,
                    }
                    rows.append({**row, **dataclasses.asdict(comparison)})
    return rows


def _fewest(systems: dict[Key, System], keys: Sequence[Key]) -> int:
    """Seeds of the system that has the fewest; an untrained student is the same with every seed."""
    return min(len(systems[key].records) for key in keys if key[2] != NO_ADAPTER)


def _pictured(problems: Sequence[Problem]) -> np.ndarray:
    return np.array([problem.image is not None for problem in problems], bool)


def _compare(first: System, second: System, over_seeds: bool, own: np.ndarray | slice = slice(None)) -> Comparison:
    """Compares on the questions `own`; a seed that failed in one of the two has no partner in `by_seed`.

    Seeds are resampled where both have several: an untrained student is the same with every seed.
    """
    over_seeds &= min(len(first.records), len(second.records)) > 1
    rows = {record["seed"]: row for row, record in enumerate(first.records)}
    pairs = [(rows[seed], row) for row, record in enumerate(second.records) if (seed := record["seed"]) in rows]
    return compare(first.correct[:, own], second.correct[:, own], over_seeds, pairs=pairs)


def _why_not(arm: str, system: System | None) -> str:
    if system is None:
        return f"arm {arm} is not part of this study"
    return f"arm {arm} failed: {system.failed[0][1]}"


def differences(
    systems: dict[Key, System], problems: Sequence[Problem], reference: str, over_seeds: bool
) -> list[dict[str, Any]]:
    """Each arm minus the reference arm, over all questions and by subject; a finding to look at, not a test.

    The untrained student is compared with the first adapter's reference.
    """
    rows = []
    adapters = list(dict.fromkeys(adapter for _, _, adapter in systems if adapter != NO_ADAPTER))
    for (student, arm, adapter), system in systems.items():
        base = systems.get((student, reference, adapters[0] if adapter == NO_ADAPTER else adapter))
        if arm == reference or not system.records or base is None or not base.records:
            continue
        for subject in ("", *sorted({p.subject for p in problems if p.subject})):
            own = np.array([not subject or p.subject == subject for p in problems])
            comparison = _compare(base, system, over_seeds, own)
            rows.append(
                {
                    "student": student,
                    "arm": arm,
                    "adapter": adapter,
                    "subject": subject,
                    **dataclasses.asdict(comparison),
                }
            )
    return rows


def agreement(systems: dict[Key, System]) -> dict[str, Any]:
    """How often two systems choose the same option (first seed), whether right or wrong: {"names", "share"}."""
    finished = {key: system for key, system in systems.items() if system.records}
    answers = np.array([system.answers[0] for system in finished.values()])
    share = (answers[:, None] == answers[None]).mean(axis=2) if len(answers) else np.zeros((0, 0))
    return {"names": [list(key) for key in finished], "share": share.round(4).tolist()}


def curves(runs: Sequence[Run], records: Sequence[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """Of each trained run: training tokens, validation loss and validation accuracy at each evaluation."""
    made = []
    for run, record in zip(runs, records, strict=True):
        if not run.trained or record["status"] != "finished":
            continue
        tokens, points = 0, []
        for line in (run.folder(root) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            tokens += row.get("tokens", 0)
            if "val_loss" in row:
                points.append({"tokens": tokens, "val_loss": row["val_loss"], "val_accuracy": row.get("val_accuracy")})
        made.append(
            {
                "student": student_name(run.student),
                "arm": run.arm,
                "adapter": run.adapter,
                "seed": run.seed,
                "points": points,
            }
        )
    return made


def examples(
    systems: dict[Key, System], runs: Sequence[Run], root: Path, problems: Sequence[Problem], split: str, count: int = 6
) -> list[dict[str, Any]]:
    """Questions to read: the ones on which the arms differ most, one that all get right and one that none does."""
    finished = {key: system for key, system in systems.items() if system.records}
    if not finished:
        return []
    share = np.mean([system.correct[0] for system in finished.values()], axis=0)
    order = np.argsort(np.abs(share - 0.5), kind="stable")
    chosen = dict.fromkeys([*order[: count - 2].tolist(), int(share.argmax()), int(share.argmin())])
    folders = {(student_name(run.student), run.arm, run.adapter, run.seed): run.folder(root) for run in runs}
    texts = {}
    for key, system in finished.items():
        file = folders[*key, system.records[0]["seed"]] / "eval" / split / "predictions.jsonl"
        texts[key] = [row["text"] for row in read_jsonl(file, "predictions")]
    return [
        {
            "pid": problems[k].pid, "question": problems[k].question, "choices": problems[k].choices, "answer": problems[k].answer,
            "hint": problems[k].hint, "caption": problems[k].caption, "solution": problems[k].solution,
            "replies": [{"student": key[0], "arm": key[1], "adapter": key[2], "text": texts[key][k], "right": bool(finished[key].correct[0][k])} for key in finished],
        }
        for k in chosen
    ]  # fmt: skip


def counts(problems: Sequence[Problem]) -> dict[str, int]:
    """Questions of each column."""
    return score(problems, {}, "")["n"]


def _evaluation_seconds(metrics: dict[str, Any]) -> float | None:
    rate = metrics.get("questions_per_second")
    return metrics["n"]["AVG"] / rate if rate else None


def _mean(records: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    return {name: _mean_of([record[name] for record in records]) for name in records[0]}


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
