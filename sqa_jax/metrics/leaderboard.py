"""Accuracy by the columns of ScienceQA's leaderboard, and the predictions files it is computed from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import read_json, read_jsonl


def _grade(problem: Problem) -> int | None:
    match = re.search(r"\d+", problem.grade)
    return int(match[0]) if match else None


# Column → whether a question counts in it (Lu et al. 2022, table 4). TXT: a textual context. NO: no context at all.
COLUMNS: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda p: p.subject == "natural science",
    "SOC": lambda p: p.subject == "social science",
    "LAN": lambda p: p.subject == "language science",
    "TXT": lambda p: bool(p.hint.strip()),
    "IMG": lambda p: p.image is not None,
    "NO": lambda p: not p.hint.strip() and p.image is None,
    "G1-6": lambda p: (_grade(p) or 99) <= 6,
    "G7-12": lambda p: 7 <= (_grade(p) or 0) <= 12,
    "AVG": lambda p: True,
}


def read_predictions(path: str | Path) -> dict[str, int | None]:
    """{pid: answer or None} of a predictions file: JSONL rows, or ScienceQA's {"results": {pid: index}}.

    Raises:
      UserError: the file or a row is not of this form, or a pid occurs twice; the message names the row.
    """
    if Path(path).suffix == ".json":
        results = read_json(path, "predictions")
        results = results.get("results") if isinstance(results, dict) else None
        if not isinstance(results, dict):
            raise UserError(f'{path}: has no "results"; a .json file of predictions is {{"results": {{pid: index}}}}')
        rows = [{"pid": pid, "answer": answer} for pid, answer in results.items()]
    else:
        rows = read_jsonl(path, "predictions")
    predictions: dict[str, int | None] = {}
    for number, row in enumerate(rows, start=1):
        if "pid" not in row or "answer" not in row:
            raise UserError(
                f'{path}: prediction {number} lacks "pid" or "answer"; each row is {{"pid": …, "answer": index or null}}'
            )
        pid, answer = str(row["pid"]), row["answer"]
        if answer is not None and (isinstance(answer, bool) or not isinstance(answer, int)):
            raise UserError(f"{path}: question {pid}: answer {answer!r} is neither an index nor null; parse it first")
        if pid in predictions:
            raise UserError(f"{path}: question {pid} is predicted twice; remove one of the rows")
        predictions[pid] = answer
    return predictions


def correctness(
    problems: Sequence[Problem], predictions: Mapping[str, int | None], where: str = "predictions"
) -> list[bool]:
    """Whether each question was answered correctly; missing and unparsed answers count as wrong.

    Raises:
      UserError: a prediction is for a question that is not in `problems`, or outside its choices.
    """
    choices = {problem.pid: len(problem.choices) for problem in problems}
    for pid, answer in predictions.items():
        if pid not in choices:
            raise UserError(f"{where}: question {pid} is not in this split; check --split and --problems")
        if answer is not None and not 0 <= answer < choices[pid]:
            raise UserError(
                f"{where}: question {pid}: answer {answer} is outside its {choices[pid]} choices; indices start at 0"
            )
    return [predictions.get(problem.pid) == problem.answer for problem in problems]


def score(
    problems: Sequence[Problem], predictions: Mapping[str, int | None], where: str = "predictions"
) -> dict[str, Any]:
    """The metrics of a split: {column: percent or None, …, "n": {column: questions}, "unparsed", "missing"}.

    A column without questions is None. A question without a grade is in no grade column.

    Raises:
      UserError: as `correctness`, or there are no questions.
    """
    if not problems:
        raise UserError("the split has no questions to score")
    right = correctness(problems, predictions, where)
    metrics: dict[str, Any] = {}
    counts = {}
    for column, belongs in COLUMNS.items():
        of_column = [correct for problem, correct in zip(problems, right, strict=True) if belongs(problem)]
        counts[column] = len(of_column)
        metrics[column] = round(100 * sum(of_column) / len(of_column), 2) if of_column else None
    missing = sum(problem.pid not in predictions for problem in problems)
    unparsed = sum(answer is None for answer in predictions.values())
    return {**metrics, "n": counts, "unparsed": unparsed, "missing": missing}
