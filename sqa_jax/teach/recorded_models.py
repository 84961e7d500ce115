"""Existing models on the same questions: recorded replies, a baseline that counts words, and chance."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from sqa_jax.batches.config_data import config_records
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.metrics.costs import teacher_cost
from sqa_jax.metrics.intervals import accuracy_interval
from sqa_jax.metrics.leaderboard import correctness, score
from sqa_jax.teach.prompts import prompt_of_record


def existing_models(config, problems: ProblemSet) -> list[dict[str, Any]]:
    """A row for each file, model and setting of `config.study.benchmark`, on the questions that it was asked.

    Returns:
      {system, setting, form, metrics, low, high, cost, records}; `records` are those that were scored.
    """
    everything = problems.all()
    groups: dict[tuple[str, str, str], list[TeacherRecord]] = collections.defaultdict(list)
    for file in config.study.benchmark:
        named = config.copy_and_resolve_references()
        named.data.teacher = (file,)
        for record in config_records(named, problems):
            if record.sample == 0:
                groups[file, record.model, record.setting].append(record)
    rows = []
    for (_, model, setting), records in groups.items():
        order = [everything[record.pid] for record in records]
        predictions = {record.pid: record.answer for record in records}
        interval = accuracy_interval(correctness(order, predictions, model))
        rows.append(
            {
                "system": model, "setting": setting, "form": form_of(records), "metrics": score(order, predictions, model),
                "low": interval.low, "high": interval.high,
                "cost": teacher_cost(zip(order, records, strict=True), config.teach.prices, prompt_of_record),
                "records": records,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["system"], row["setting"], row["form"]))


def form_of(records: Sequence[TeacherRecord]) -> str:
    """ "JSON" or "text": what most replies of one file are; an empty reply does not show what was asked for."""
    objects = sum(record.raw.lstrip().startswith(("{", "```json")) for record in records)
    return "JSON" if 2 * objects > len(records) else "text"


def word_counts(train: Sequence[Problem], test: Sequence[Problem]) -> list[bool]:
    """Which test questions the bag-of-words baseline answers rightly."""
    from sqa_jax.metrics.bag_of_words import predict

    return correctness(test, predict(train, test), "bag of words")


def chance(problems: Sequence[Problem]) -> float:
    """Expected accuracy of choosing at random."""
    return sum(1 / len(problem.choices) for problem in problems) / len(problems)
