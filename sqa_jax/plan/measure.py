"""Measures a program on a slice: memory, FLOPs, time and collectives of its compiled HLO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sqa_jax.parallel.chips import CHIPS, Chip, collective_seconds
from sqa_jax.parallel.mesh import AXES
from sqa_jax.plan.aot import OutOfMemory, compile_for_tpu
from sqa_jax.plan.hlo import parse
from sqa_jax.plan.hlo_cost import HloCost, count


def measure(
    lower: Callable[[], jax.stages.Lowered],
    kind: str,
    mesh: Mesh,
    arguments: int,
    model_flops: float,
    unknown_trips: int | None = None,
) -> dict[str, Any]:
    """Compiles a program for `mesh` and measures it.

    Args:
      lower: traces the program.
      kind: a key of `CHIPS`.
      arguments: bytes of parameters, state and batch on one chip.
      model_flops: of one execution on all chips, without rematerialization.
      unknown_trips: iterations of loops whose condition depends on data.

    Returns:
      fits; if it does not, only temporaries (bytes, or None). Else memory (bytes on one chip), flops and traffic
      (bytes) of one chip, seconds (see `times`), utilization (model FLOPs over peak, MFU) by the estimate and by the
      roofline, collectives, and uncounted_kernels.

    Raises:
      UserError: the compiler cannot print the compiled program, so that it cannot be analysed.
    """
    chip = CHIPS[kind]
    compiled = compile_for_tpu(lower, kind, arguments)
    if isinstance(compiled, OutOfMemory):
        return {"fits": False, "temporaries": compiled.temporaries}
    cost = count(parse(compiled.hlo), chip, mesh.size, unknown_trips)
    collectives = _collectives(cost, chip, mesh)
    seconds = times(cost, chip, collectives)
    peak = model_flops / mesh.size / chip.flops
    return {
        "fits": True,
        "memory": {**compiled.memory, "chip": chip.memory},
        "flops": cost.flops,
        "traffic": cost.traffic,
        "seconds": seconds,
        "utilization": {name: peak / seconds[name] for name in ("estimate", "roofline")},
        "collectives": collectives,
        "uncounted_kernels": sorted(cost.uncounted),
    }


def times(cost: HloCost, chip: Chip, collectives: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of one execution.

    estimate: all instructions run serially (`HloCost.busy`), plus the collectives that are not overlapped with compute.
    roofline: the maximum of compute (FLOPs at peak), memory (traffic at HBM bandwidth) and communication, as if the
    others were fully overlapped with it; `binds` names it.
    """
    exposed = sum(row["seconds"] for row in collectives if not row["overlapped"])
    overlapped = sum(row["seconds"] for row in collectives if row["overlapped"])
    parts = {
        "compute": cost.flops / chip.flops,
        "memory": cost.traffic / chip.bandwidth,
        "communication": exposed + overlapped,
    }
    binds = max(parts, key=lambda name: parts[name])
    return {
        "estimate": max(cost.busy, parts["memory"], overlapped) + exposed,
        "roofline": parts[binds],
        "binds": binds,
        **parts,
        "communication_not_overlapped": exposed,
    }


def _collectives(cost: HloCost, chip: Chip, mesh: Mesh) -> list[dict[str, Any]]:
    """Totals by kind, mesh axes and overlap with compute: count, payload and bytes sent by a chip, seconds."""
    devices, shape = list(mesh.devices.flat), mesh.devices.shape
    rows: dict[tuple, dict[str, Any]] = {}
    for each in cost.collectives:
        indices = np.stack(np.unravel_index(each.groups, shape))  # [axes, groups, n]
        over = "+".join(axis for axis, index in zip(AXES, indices, strict=True) if np.ptp(index, axis=1).any())
        row = rows.setdefault(
            (each.kind, over, each.overlapped),
            {"kind": each.kind, "over": over, "overlapped": each.overlapped, "count": 0, "payload": 0.0, "sent": 0.0, "seconds": 0.0},
        )  # fmt: skip
        row["count"] += each.count
        row["payload"] += each.count * each.payload
        row["sent"] += each.count * each.sent
        row["seconds"] += each.count * collective_seconds(chip, devices, each.groups, each.sent)
    return sorted(rows.values(), key=lambda row: -row["sent"])
