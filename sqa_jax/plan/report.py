"""The plan of one configuration on a slice: memory, time, communication, and the price of an epoch."""

from __future__ import annotations

from typing import Any

from sqa_jax.metrics.costs import chip_prices
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.chips import CHIPS
from sqa_jax.parallel.mesh import AXES, make_mesh, row_shards
from sqa_jax.plan.advice import advice
from sqa_jax.plan.epoch_stats import EpochStats
from sqa_jax.plan.measure import measure
from sqa_jax.plan.programs import decoding_program, training_program


def plan_training(
    config: Any, student: StudentConfig, kind: str, devices: list[Any], stats: EpochStats
) -> dict[str, Any]:
    """Compiles the training step for `devices`, and analyses it.

    Returns:
      What `sqa_jax.plan.measure.measure` returns, and: mesh, batch, parameters, donated (whether the state is
      updated in place), tokens_per_second, expected_sent (bytes by formula), epoch (seconds, chip_hours, dollars); if
      it does not fit, advice.

    Raises:
      UserError: configuration, mesh, batch and student do not fit each other.
    """
    mesh = make_mesh(config.mesh, devices)
    program = training_program(config, student, mesh, stats)
    shards = row_shards(mesh)
    row: dict[str, Any] = {
        "mesh": {axis: mesh.shape[axis] for axis in AXES},
        "batch": {
            "rows_per_chip": config.train.batch_rows // shards,
            **{name: config.train[name] for name in ("batch_rows", "accumulate", "row_length")},
            "targets_per_row": stats.limits.targets,
            "tokens": program.tokens,
        },
        "parameters": program.parameters,
        "trained_parameters": program.trained,
        "arguments": program.argument_bytes,
        "expected_sent": program.expected,
    }
    if program.argument_bytes > CHIPS[kind].memory:  # without minutes of compilation
        row |= {"fits": False, "temporaries": None}
    else:
        row |= measure(program.lower, kind, mesh, program.argument_bytes, program.model_flops)
    if not row["fits"]:
        return {**row, "advice": advice(config, student, kind, mesh, stats, program, row["temporaries"])}
    seconds = row["seconds"]["estimate"]
    return {
        **row,
        "donated": row["memory"]["donated"] >= program.state_bytes,
        "model_flops": program.model_flops,
        "tokens_per_second": program.tokens / seconds,
        "epoch": epoch_cost(config, kind, len(devices), stats, program.tokens / seconds),
    }


def plan_generation(config: Any, student: StudentConfig, kind: str, devices: list[Any]) -> dict[str, Any]:
    """Compiles the decoding loop for `devices`: as `plan_training`, with tokens_per_second of all slots together.

    The loop is assumed to run until the last slot has generated `config.eval.max_new_tokens` tokens.

    Raises:
      UserError: configuration, mesh and student do not fit each other.
    """
    mesh = make_mesh(config.mesh, devices)
    program = decoding_program(config, student, mesh)
    steps = config.eval.max_new_tokens
    row = measure(program.lower, kind, mesh, program.argument_bytes, program.model_flops, steps)
    row |= {"mesh": {axis: mesh.shape[axis] for axis in AXES}, "texts": program.tokens // steps, "new_tokens": steps}
    if row["fits"]:
        row |= {"tokens_per_second": program.tokens / row["seconds"]["estimate"]}
    return row


def epoch_cost(config: Any, kind: str, chips: int, stats: EpochStats, tokens_per_second: float) -> dict[str, Any]:
    """Time and price of one pass over the data."""
    seconds = stats.tokens / tokens_per_second
    hours = chips * seconds / 3600
    on_demand, spot = (price and price * hours for price in chip_prices(config.plan.prices, kind))
    return {
        "tokens": stats.tokens,
        "source": stats.source,
        "seconds": seconds,
        "chip_hours": hours,
        "dollars": {"on_demand": on_demand, "spot": spot},
    }
