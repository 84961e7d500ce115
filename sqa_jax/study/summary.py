"""Learning curves, example questions and question counts: parts of results.json that need no statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqa_jax.data.problem import Problem
from sqa_jax.files import read_jsonl
from sqa_jax.metrics.leaderboard import score
from sqa_jax.study.matrix import StudyRun, student_name
from sqa_jax.study.systems import Key, System


def learning_curves(runs: Sequence[StudyRun], records: Sequence[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """For each trained run: training tokens, validation loss and validation accuracy at each validation."""
    curves = []
    for run, record in zip(runs, records, strict=True):
        if not run.trained or record["status"] != "finished":
            continue
        tokens, points = 0, []
        for line in (run.folder(root) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            tokens += row.get("tokens", 0)
            if "val_loss" in row:
                points.append({"tokens": tokens, "val_loss": row["val_loss"], "val_accuracy": row.get("val_accuracy")})
        name = {"student": student_name(run.student), "arm": run.arm, "adapter": run.adapter, "seed": run.seed}
        curves.append({**name, "points": points})
    return curves


def example_questions(
    systems: Mapping[Key, System],
    runs: Sequence[StudyRun],
    root: Path,
    problems: Sequence[Problem],
    split: str,
    count: int = 6,
) -> list[dict[str, Any]]:
    """Questions with all systems' answers: those that the systems disagree on most, the easiest and the hardest."""
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

    def replies(k: int) -> list[dict[str, Any]]:
        return [
            {"student": student, "arm": arm, "adapter": adapter, "text": texts[student, arm, adapter][k],
             "right": bool(system.correct[0][k])}
            for (student, arm, adapter), system in finished.items()
        ]  # fmt: skip

    fields = ("pid", "question", "choices", "answer", "hint", "caption", "solution")
    return [{**{name: getattr(problems[k], name) for name in fields}, "replies": replies(k)} for k in chosen]


def question_counts(problems: Sequence[Problem]) -> dict[str, int]:
    """Questions of each column of the leaderboard."""
    return score(problems, {}, "")["n"]
