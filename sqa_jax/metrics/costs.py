"""Cost accounting: tokens, FLOPs, time and US dollars of supervision, training and inference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.errors import UserError
from sqa_jax.models.flops import forward_flops, training_flops
from sqa_jax.models.student_config import StudentConfig

CHARACTERS_PER_TOKEN = 4  # Gemini's documentation: "a token is equivalent to about 4 characters"


class TrainingCost(TypedDict):
    """Of one training run.

    Attributes:
      tokens: of all steps, padding not counted.
      target_tokens: those that the loss was computed on.
      flops: of the model, without rematerialisation.
      seconds: with compilation, without evaluation.
      trained_parameters: how many were updated.
    """

    tokens: float
    target_tokens: float
    flops: float
    seconds: float
    trained_parameters: int


class InferenceCost(TypedDict):
    """Of one question on average: prompt tokens, generated tokens, FLOPs."""

    tokens_read: float
    tokens_written: float
    flops: float


class TeacherCost(TypedDict):
    """Of a set of teacher replies.

    Attributes:
      replies: how many.
      prompt_tokens, output_tokens: sums.
      price: US dollars, None where a model's price is not known.
      estimated: whether some token count was estimated from the length of a text.
    """

    replies: int
    prompt_tokens: int
    output_tokens: int
    price: float | None
    estimated: bool


def training_cost(folder: Path, config, student: StudentConfig, mean_length: float) -> TrainingCost:
    """Sums over a run's metrics.jsonl.

    Args:
      folder: the run's.
      mean_length: tokens of a training sequence; a token attends to half of them on average.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    trained = json.loads((folder / "train.json").read_text(encoding="utf-8"))["trained_parameters"]
    tokens, seconds = (sum(row[name] for row in steps) for name in ("tokens", "seconds"))
    # A row's targets are those of one step, not summed like its tokens: the logged steps stand for all.
    targets = sum(row["targets"] for row in steps) * (steps[-1]["step"] / len(steps)) if steps else 0.0
    methods = tuple(config.adapter.methods)
    flops = training_flops(student, methods, trained, tokens, mean_length / 2, targets)
    return {
        "tokens": tokens, "target_tokens": targets, "flops": flops, "seconds": seconds, "trained_parameters": trained,
    }  # fmt: skip


def inference_cost(metrics: Mapping[str, Any], student: StudentConfig) -> InferenceCost:
    """Cost of one question on average, from the metrics of an evaluation."""
    n = metrics["n"]["AVG"]
    prompt, generated, scored = (metrics[f"tokens_{name}"] / n for name in ("read", "written", "scored"))
    tokens = prompt + generated
    flops = forward_flops(student, tokens, tokens / 2, generated + scored)
    return {"tokens_read": prompt, "tokens_written": generated, "flops": flops}


def token_prices(table: Iterable[Sequence[Any]]) -> dict[str, tuple[float, float]]:
    """{model: US dollars of a million input tokens, of a million output tokens} of `config.teach.prices`.

    Raises:
      UserError: a row is malformed.
    """
    prices: dict[str, tuple[float, float]] = {}
    for row in table:
        numbers = row[1:] if isinstance(row, tuple) and len(row) == 3 else ()
        if not numbers or not all(isinstance(price, (int, float)) and price >= 0 for price in numbers):
            raise UserError(
                f"config.teach.prices: {row!r}; each row is (model, US dollars a million input tokens, a million output tokens)"
            )
        prices[row[0]] = (row[1], row[2])
    return prices


def chip_prices(table: Iterable[tuple[str, float, float]], chip: str) -> tuple[float | None, float | None]:
    """US dollars of a chip-hour (on demand, spot) in `config.plan.prices`; None where the price is not known."""
    on_demand, spot = next(((first, second) for name, first, second in table if name == chip), (0.0, 0.0))
    return on_demand or None, spot or None


def teacher_cost(
    replies: Iterable[tuple[Problem, TeacherRecord]],
    prices: Iterable[tuple[str, float, float]],
    prompt_of: Callable[[Problem, TeacherRecord], str],
) -> TeacherCost:
    """Cost of teacher replies from their records; a token count that is missing is estimated from the text's length.

    Args:
      replies: each counts once, however many examples were built from it.
      prices: `config.teach.prices`.
      prompt_of: (problem, record) → the prompt, for replies without a token count.
    """
    prices_by_model = token_prices(prices)
    unique = {
        (record.model, record.setting, record.raw, record.sample, problem.pid): (problem, record)
        for problem, record in replies
    }
    prompt_total = output_total = 0
    total: float | None = 0.0
    estimated = False
    for problem, record in unique.values():
        prompt, output = record.prompt_tokens, record.output_tokens
        estimated |= prompt is None or output is None
        prompt = len(prompt_of(problem, record)) // CHARACTERS_PER_TOKEN if prompt is None else prompt
        output = len(record.raw) // CHARACTERS_PER_TOKEN if output is None else output
        prompt_total, output_total = prompt_total + prompt, output_total + output
        price = record.price
        if price is None and record.model in prices_by_model:
            per_prompt, per_output = prices_by_model[record.model]
            price = (prompt * per_prompt + output * per_output) / 1e6
        total = None if total is None or price is None else total + price
    return {
        "replies": len(unique), "prompt_tokens": prompt_total, "output_tokens": output_total, "price": total,
        "estimated": estimated,
    }  # fmt: skip
