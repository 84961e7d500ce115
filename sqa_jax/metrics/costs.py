"""What supervision, training and answering cost: tokens, operations, time, money."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.flops import forward_flops, training_flops

CHARACTERS_A_TOKEN = 4  # Gemini's documentation: "a token is equivalent to about 4 characters"


def training_cost(folder: Path, config, student: DecoderConfig, mean_length: float) -> dict[str, float]:
    """Sums over a run's metrics.jsonl.

    Args:
      mean_length: tokens of a training sequence, the half of which a token sees on average.

    Returns:
      tokens (without padding), target tokens, operations, and seconds with compilation and without evaluation.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    trained = json.loads((folder / "train.json").read_text(encoding="utf-8"))["trained_parameters"]
    tokens, seconds = (sum(row[name] for row in steps) for name in ("tokens", "seconds"))
    # Targets are written of the step itself, not summed like tokens; every log_every-th step stands for all.
    targets = sum(row["targets"] for row in steps) * (steps[-1]["step"] / len(steps)) if steps else 0.0
    methods = tuple(config.adapter.methods)
    flops = training_flops(student, methods, trained, tokens, mean_length / 2, targets)
    return {
        "tokens": tokens,
        "target_tokens": targets,
        "flops": flops,
        "seconds": seconds,
        "trained_parameters": trained,
    }


def inference_cost(metrics: Mapping[str, Any], student: DecoderConfig) -> dict[str, float]:
    """Of one question on average, from an evaluation's metrics: tokens read and written, and operations."""
    n = metrics["n"]["AVG"]
    read, written, scored = (metrics[f"tokens_{name}"] / n for name in ("read", "written", "scored"))
    tokens = read + written
    flops = forward_flops(student, tokens, tokens / 2, written + scored)
    return {"tokens_read": read, "tokens_written": written, "flops": flops}


def teacher_cost(
    replies: Iterable[tuple[Problem, TeacherRecord]], prices: Iterable[tuple[str, float, float]], prompt_of
) -> dict[str, Any]:
    """What replies cost, from their records; what was not recorded is estimated from the length of the texts.

    Args:
      replies: each reply counts once, however many examples were made of it.
      prices: `config.teach.prices`: (model, US dollars a million prompt tokens, a million output tokens).
      prompt_of: (problem, record) → the text that was asked, for replies without a token count.

    Returns:
      replies, prompt_tokens, output_tokens, price (None where a model has no price), estimated (bool).
    """
    price_of = {model: (per_prompt, per_output) for model, per_prompt, per_output in prices}
    unique = {
        (record.model, record.setting, record.raw, record.sample, problem.pid): (problem, record)
        for problem, record in replies
    }
    prompt = output = 0
    price: float | None = 0.0
    estimated = False
    for problem, record in unique.values():
        asked, said = record.prompt_tokens, record.output_tokens
        estimated |= asked is None or said is None
        asked = len(prompt_of(problem, record)) // CHARACTERS_A_TOKEN if asked is None else asked
        said = len(record.raw) // CHARACTERS_A_TOKEN if said is None else said
        prompt, output = prompt + asked, output + said
        if record.price is not None:
            own = record.price
        elif record.model in price_of:
            per_prompt, per_output = price_of[record.model]
            own = (asked * per_prompt + said * per_output) / 1e6
        else:
            own = None
        price = None if price is None or own is None else price + own
    return {
        "replies": len(unique), "prompt_tokens": prompt, "output_tokens": output, "price": price, "estimated": estimated,
    }  # fmt: skip
