"""Compiles a lowered program for a slice, and measures it: memory, FLOPs, time, collectives."""

from __future__ import annotations

import re
import warnings
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sqa_jax.errors import UserError
from sqa_jax.parallel.chips import CHIPS, GIB, Chip, collective_seconds, quiet_compiler
from sqa_jax.parallel.mesh import AXES
from sqa_jax.plan.hlo import parse
from sqa_jax.plan.hlo_cost import HloCost, count

# The compiler's out-of-memory messages: bytes of temporaries, or of everything together.
_TEMPORARIES, _TOTAL = r"temporaries \(([\d.]+)G\)", r"[Uu]sed ([\d.]+)G of"


def measure(
    lowered: jax.stages.Lowered,
    kind: str,
    mesh: Mesh,
    arguments: int,
    model_flops: float,
    unknown_trips: int | None = None,
) -> dict[str, Any]:
    """Compiles a program for `mesh` and measures it.

    Args:
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
    try:
        with quiet_compiler(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # programs for detached devices are not in JAX's compilation cache
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = None
        if match := re.search(_TEMPORARIES, str(error)):
            needed = float(match[1]) * GIB
        elif match := re.search(_TOTAL, str(error)):
            needed = float(match[1]) * GIB - arguments
        return {"fits": False, "temporaries": needed}
    sizes: Any = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "donated": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    memory["peak"] = sum(memory.values()) - 2 * memory["donated"]
    cost = count(parse(_text(compiled, kind, memory["peak"])), chip, mesh.size, unknown_trips)
    collectives = _collectives(cost, chip, mesh)
    seconds = times(cost, chip, collectives)
    peak = model_flops / mesh.size / chip.flops
    return {
        "fits": True,
        "memory": {**memory, "chip": chip.memory},
        "flops": cost.flops,
        "traffic": cost.traffic,
        "seconds": seconds,
        "utilization": {name: peak / seconds[name] for name in ("estimate", "roofline")},
        "collectives": collectives,
        "uncounted_kernels": sorted(cost.uncounted),
    }


def _text(compiled: jax.stages.Compiled, kind: str, peak: int) -> str:
    try:
        text = compiled.as_text()
        assert text is not None
        return text
    except jax.errors.JaxRuntimeError as error:  # libtpu of 2026, if a v5p's sparse cores take part
        raise UserError(
            f"the program fits ({peak / GIB:.1f} of {CHIPS[kind].memory / GIB:.0f} GiB), but the TPU's compiler cannot print it, "
            f"so its time is unknown ({str(error).splitlines()[0][:120]}); plan with other rows a chip, or for another --topology"
        ) from None


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
