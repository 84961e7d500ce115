"""Baselines on the same questions: recorded replies of existing models, the bag-of-words baseline, and chance."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from sqa_jax.batches.config_data import config_records
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.metrics.costs import TeacherCost, teacher_cost
from sqa_jax.metrics.intervals import accuracy_interval
from sqa_jax.metrics.leaderboard import correctness, score
from sqa_jax.teach.prompts import prompt_of_record


class RecordedModel(TypedDict):
    """Accuracy and cost of one model and setting, from one file of replies.

    Attributes:
      system, setting: the model's name, and the parts of its prompt.
      form: format of its replies.
      metrics: as `leaderboard.score` returns them.
      low, high: 95 % interval of the accuracy, as fractions.
      records: the scored replies.
    """

    system: str
    setting: str
    form: Literal["JSON", "text"]
    metrics: dict[str, Any]
    low: float
    high: float
    cost: TeacherCost
    records: list[TeacherRecord]


def existing_models(config, problems: ProblemSet) -> list[RecordedModel]:
    """Accuracy and cost of each file, model and setting of `config.study.benchmark`, on the questions it replied to."""
    by_pid = problems.all()
    groups: dict[tuple[str, str, str], list[TeacherRecord]] = collections.defaultdict(list)
    for file in config.study.benchmark:
        file_config = config.copy_and_resolve_references()
        file_config.data.teacher = (file,)
        for record in config_records(file_config, problems):
            if record.sample == 0:
                groups[file, record.model, record.setting].append(record)
    rows: list[RecordedModel] = []
    for (_, model, setting), records in groups.items():
        order = [by_pid[record.pid] for record in records]
        predictions = {record.pid: record.answer for record in records}
        interval = accuracy_interval(correctness(order, predictions, model))
        rows.append(
            {
                "system": model, "setting": setting, "form": reply_format(records), "metrics": score(order, predictions, model),
                "low": interval.low, "high": interval.high,
                "cost": teacher_cost(zip(order, records, strict=True), config.teach.prices, prompt_of_record),
                "records": records,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["system"], row["setting"], row["form"]))


def reply_format(records: Sequence[TeacherRecord]) -> Literal["JSON", "text"]:
    """The format of most replies; a single reply may be empty or malformed."""
    objects = sum(record.raw.lstrip().startswith(("{", "```json")) for record in records)
    return "JSON" if 2 * objects > len(records) else "text"


def bag_of_words_correctness(train: Sequence[Problem], test: Sequence[Problem]) -> list[bool]:
    """Whether the bag-of-words baseline answers each test question correctly."""
    from sqa_jax.metrics.bag_of_words import predict

    return correctness(test, predict(train, test), "bag of words")


def chance(problems: Sequence[Problem]) -> float:
    """Expected accuracy of a uniformly random choice, as a fraction."""
    return sum(1 / len(problem.choices) for problem in problems) / len(problems)
