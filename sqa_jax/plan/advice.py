"""What to change where a program does not fit into a chip's memory, computed from what it asked for."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.parallel.chips import CHIPS, GIB
from sqa_jax.parallel.mesh import make_mesh, row_shards
from sqa_jax.plan.programs import Data, Step, training_step

_USABLE = 0.95  # of a chip's memory; the rest is the runtime's


def advice(
    config: Any, student: DecoderConfig, kind: str, mesh: Mesh, data: Data, step: Step, temporaries: float | None
) -> list[str]:
    """Settings with which it should fit, each with the numbers that say so.

    Args:
      step: the one that does not fit.
      temporaries: bytes that the compiler wanted besides its arguments, where it came so far.
    """
    memory = _USABLE * CHIPS[kind].memory
    found = []
    if temporaries is not None and step.arguments < memory:
        shards = row_shards(mesh)
        rows = config.train.batch_rows // shards
        # Temporaries are activations above all, which grow with the rows.
        fit = (memory - step.arguments) / temporaries * rows
        if fewer := max((n for n in range(1, rows) if rows % n == 0 and n <= fit), default=0):
            found.append(
                f"config.train.batch_rows={fewer * shards} and config.train.accumulate="
                f"{config.train.accumulate * rows // fewer}: as large a batch, but {temporaries * fewer / rows / GIB:.1f} in "
                f"place of {temporaries / GIB:.1f} GiB besides the arguments' {step.arguments / GIB:.1f}"
            )
        if config.student.remat != "full":
            kept = 2 * student.num_layers * student.hidden_size * rows * config.train.row_length
            found.append(
                f"config.student.remat=full: keeps {kept / GIB:.1f} GiB for the backward pass and computes the rest again"
            )
    if step.arguments > memory / 4:
        found += _more_shards(config, student, mesh, data, step, memory)
    return found or ["a chip with more memory, or a slice with more chips and config.mesh.fsdp"]


def _more_shards(config: Any, student: DecoderConfig, mesh: Mesh, data: Data, step: Step, memory: float) -> list[str]:
    """The least sharding of the parameters that leaves a third of the memory free."""
    devices, tensor = list(mesh.devices.flat), mesh.shape["tensor"]
    for fsdp in range(mesh.shape["fsdp"] + 1, mesh.size // tensor + 1):
        other = ConfigDict(config.to_dict())
        other.mesh.data, other.mesh.fsdp, other.mesh.tensor = -1, fsdp, tensor
        try:
            held = training_step(other, student, make_mesh(other.mesh, devices), data).arguments
        except UserError:
            continue
        if held < 2 / 3 * memory:
            return [
                f"config.mesh.fsdp={fsdp}: parameters, state and batch then take {held / GIB:.1f} in place of "
                f"{step.arguments / GIB:.1f} GiB of each chip"
            ]
    return []
