"""One plan: what a configuration takes on a slice, and what it costs there."""

from __future__ import annotations

from typing import Any

from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.parallel.chips import CHIPS
from sqa_jax.parallel.mesh import AXES, make_mesh, row_shards
from sqa_jax.plan.advice import advice
from sqa_jax.plan.measure import measure
from sqa_jax.plan.programs import Data, decode_loop, training_step


def plan(config: Any, student: DecoderConfig, kind: str, devices: list[Any], data: Data) -> dict[str, Any]:
    """Compiles the training step for `devices` and returns everything about it.

    Returns:
      What `sqa_jax.plan.measure.measure` returns, and: mesh, batch, parameters, donated (whether the state's memory
      is reused), tokens_per_second, expected (bytes sent by formula), epoch (seconds, chip_hours, dollars); where it
      does not fit, advice.

    Raises:
      UserError: configuration, mesh, batch and student do not fit each other.
    """
    mesh = make_mesh(config.mesh, devices)
    step = training_step(config, student, mesh, data)
    shards = row_shards(mesh)
    row: dict[str, Any] = {
        "mesh": {axis: mesh.shape[axis] for axis in AXES},
        "batch": {
            "rows_per_chip": config.train.batch_rows // shards,
            **{name: config.train[name] for name in ("batch_rows", "accumulate", "row_length")},
            "targets_per_row": data.limits.targets,
            "tokens": step.tokens,
        },
        "parameters": step.parameters,
        "trained_parameters": step.trained,
        "arguments": step.arguments,
        "expected_sent": step.expected,
    }
    if step.arguments > CHIPS[kind].memory:  # the compiler would take minutes to say the same
        row |= {"fits": False, "temporaries": None}
    else:
        row |= measure(step.lower(), kind, mesh, step.arguments, step.model_flops)
    if not row["fits"]:
        return {**row, "advice": advice(config, student, kind, mesh, data, step, row["temporaries"])}
    seconds = row["seconds"]["estimate"]
    return {
        **row,
        "donated": row["memory"]["donated"] >= step.state,
        "model_flops": step.model_flops,
        "tokens_per_second": step.tokens / seconds,
        "epoch": epoch(config, kind, len(devices), data, step.tokens / seconds),
    }


def plan_generation(config: Any, student: DecoderConfig, kind: str, devices: list[Any]) -> dict[str, Any]:
    """Compiles the loop that generates for `devices`: as `plan`, with tokens_per_second of all texts together.

    The loop is taken to run until the last text is as long as `config.eval.max_new_tokens` allows.

    Raises:
      UserError: configuration, mesh and student do not fit each other.
    """
    mesh = make_mesh(config.mesh, devices)
    lowered, arguments, model_flops, tokens = decode_loop(config, student, mesh)
    longest = config.eval.max_new_tokens
    row = measure(lowered, kind, mesh, arguments, model_flops, longest)
    row |= {"mesh": {axis: mesh.shape[axis] for axis in AXES}, "texts": tokens // longest, "new_tokens": longest}
    if row["fits"]:
        row |= {"tokens_per_second": tokens / row["seconds"]["estimate"]}
    return row


def epoch(config: Any, kind: str, chips: int, data: Data, tokens_per_second: float) -> dict[str, Any]:
    """Time and price of one pass over the data."""
    seconds = data.tokens / tokens_per_second
    hours = chips * seconds / 3600
    prices = next((row[1:] for row in config.plan.prices if row[0] == kind), (0.0, 0.0))
    on_demand, spot = (price * hours if price else None for price in prices)
    return {
        "tokens": data.tokens,
        "source": data.source,
        "seconds": seconds,
        "chip_hours": hours,
        "dollars": {"on_demand": on_demand, "spot": spot},
    }
