"""Advice for a program that does not fit in a chip's memory: settings that should fit, with their numbers."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from sqa_jax.errors import UserError
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.chips import CHIPS, GIB
from sqa_jax.parallel.mesh import make_mesh, row_shards
from sqa_jax.plan.epoch_stats import EpochStats
from sqa_jax.plan.programs import TrainingProgram, training_program, with_mesh

_USABLE = 0.95  # fraction of a chip's memory; the rest is the runtime's


def advice(
    config: Any,
    student: StudentConfig,
    kind: str,
    mesh: Mesh,
    stats: EpochStats,
    program: TrainingProgram,
    temporaries: float | None,
) -> list[str]:
    """Settings with which the training step should fit, each with its numbers.

    Args:
      program: does not fit.
      temporaries: bytes that the compiler needs besides the arguments, None if it was not run.
    """
    memory = _USABLE * CHIPS[kind].memory
    found = []
    if temporaries is not None and program.argument_bytes < memory:
        shards = row_shards(mesh)
        rows = config.train.batch_rows // shards
        # Temporaries are mostly activations, which are proportional to the rows.
        max_rows = (memory - program.argument_bytes) / temporaries * rows
        if fewer := max((n for n in range(1, rows) if rows % n == 0 and n <= max_rows), default=0):
            found.append(
                f"config.train.batch_rows={fewer * shards} and config.train.accumulate="
                f"{config.train.accumulate * rows // fewer}: as large a batch, but {temporaries * fewer / rows / GIB:.1f} in "
                f"place of {temporaries / GIB:.1f} GiB besides the arguments' {program.argument_bytes / GIB:.1f}"
            )
        if config.student.remat != "full":
            kept = 2 * student.num_layers * student.hidden_size * rows * config.train.row_length
            found.append(
                f"config.student.remat=full: keeps {kept / GIB:.1f} GiB for the backward pass and recomputes the rest"
            )
    if program.argument_bytes > memory / 4:
        found += _more_shards(config, student, mesh, stats, program, memory)
    return found or ["a chip with more memory, or a slice with more chips and config.mesh.fsdp"]


def _more_shards(
    config: Any, student: StudentConfig, mesh: Mesh, stats: EpochStats, program: TrainingProgram, memory: float
) -> list[str]:
    """The smallest `fsdp` that leaves a third of the memory free."""
    devices, tensor = list(mesh.devices.flat), mesh.shape["tensor"]
    for fsdp in range(mesh.shape["fsdp"] + 1, mesh.size // tensor + 1):
        resharded = with_mesh(config, -1, fsdp, tensor)
        try:
            argument_bytes = training_program(
                resharded, student, make_mesh(resharded.mesh, devices), stats
            ).argument_bytes
        except UserError:
            continue
        if argument_bytes < 2 / 3 * memory:
            return [
                f"config.mesh.fsdp={fsdp}: parameters, state and batch then take {argument_bytes / GIB:.1f} in place of "
                f"{program.argument_bytes / GIB:.1f} GiB of each chip"
            ]
    return []
