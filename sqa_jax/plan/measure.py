"""A lowered program compiled for a slice, and everything about it in numbers."""

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

# How the compiler says what it lacks: bytes of temporaries, or of everything together.
_TEMPORARIES, _EVERYTHING = r"temporaries \(([\d.]+)G\)", r"[Uu]sed ([\d.]+)G of"


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
      model_flops: of one run on all chips, without recomputation.
      unknown_trips: runs of loops that end when the data say so.

    Returns:
      fits; where it does not, only temporaries (bytes, or None). Else memory (bytes on one chip), flops and traffic
      (bytes) of one chip, seconds (see `times`), utilization (model operations over peak) by the estimate and by the
      roofline, collectives, and uncounted_kernels.

    Raises:
      UserError: the compiler cannot write down the program that it made, so nothing in it can be counted.
    """
    chip = CHIPS[kind]
    try:
        with quiet_compiler(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # programs for absent devices cannot come from JAX's cache on disk
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = None
        if match := re.search(_TEMPORARIES, str(error)):
            needed = float(match[1]) * GIB
        elif match := re.search(_EVERYTHING, str(error)):
            needed = float(match[1]) * GIB - arguments
        return {"fits": False, "temporaries": needed}
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "donated": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    memory["peak"] = sum(memory.values()) - 2 * memory["donated"]
    work = count(parse(_text(compiled, kind, memory["peak"])), chip, mesh.size, unknown_trips)
    collectives = _collectives(work, chip, mesh)
    seconds = times(work, chip, collectives)
    peak = model_flops / mesh.size / chip.flops
    return {
        "fits": True,
        "memory": {**memory, "chip": chip.memory},
        "flops": work.flops,
        "traffic": work.traffic,
        "seconds": seconds,
        "utilization": {name: peak / seconds[name] for name in ("estimate", "roofline")},
        "collectives": collectives,
        "uncounted_kernels": sorted(work.uncounted),
    }


def _text(compiled: jax.stages.Compiled, kind: str, peak: int) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # as libtpu's of 2026 where a v5p's sparse cores take part
        raise UserError(
            f"the program fits ({peak / GIB:.1f} of {CHIPS[kind].memory / GIB:.0f} GiB), but the TPU's compiler cannot write it "
            f"down, so its time is not known ({str(error).splitlines()[0][:120]}); plan with other rows a chip, or for another --topology"
        ) from None


def times(work: HloCost, chip: Chip, collectives: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of one run.

    estimate: every instruction after the other (`Work.busy`), with collectives that do not run beside them.
    roofline: the longest of compute (operations at peak), memory (traffic at HBM's bandwidth) and communication, as
    if everything else were hidden behind it; `binds` names it.
    """
    alone = sum(row["seconds"] for row in collectives if not row["overlapped"])
    beside = sum(row["seconds"] for row in collectives if row["overlapped"])
    parts = {
        "compute": work.flops / chip.flops,
        "memory": work.traffic / chip.bandwidth,
        "communication": alone + beside,
    }
    binds = max(parts, key=parts.get)
    return {
        "estimate": max(work.busy, parts["memory"], beside) + alone,
        "roofline": parts[binds],
        "binds": binds,
        **parts,
        "communication_not_overlapped": alone,
    }


def _collectives(work: HloCost, chip: Chip, mesh: Mesh) -> list[dict[str, Any]]:
    """Totals by kind, mesh axes and whether they overlap: count, payload and bytes sent by a chip, seconds."""
    devices, shape = list(mesh.devices.flat), mesh.devices.shape
    rows: dict[tuple, dict[str, Any]] = {}
    for one in work.collectives:
        places = np.stack(np.unravel_index(one.groups, shape))  # [axes, groups, n]
        over = "+".join(axis for axis, place in zip(AXES, places, strict=True) if np.ptp(place, axis=1).any())
        row = rows.setdefault(
            (one.kind, over, one.overlapped),
            {"kind": one.kind, "over": over, "overlapped": one.overlapped, "count": 0, "payload": 0.0, "sent": 0.0, "seconds": 0.0},
        )  # fmt: skip
        row["count"] += one.count
        row["payload"] += one.count * one.payload
        row["sent"] += one.count * one.sent
        row["seconds"] += one.count * collective_seconds(chip, devices, one.groups, one.sent)
    return sorted(rows.values(), key=lambda row: -row["sent"])
