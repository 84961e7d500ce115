"""What a compiled program does on one chip: operations, memory traffic, time, communication.

`Compiled.cost_analysis()` counts the body of a loop once, however often it runs; here every instruction counts as
often as the loops around it run. Otherwise the rules are those of XLA's own analysis: a multiply-add is two
operations; of a sliced operand only the slice is read; an update in place writes only the update. Arrays count as
they lie in memory, padded to whole tiles.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from sqa_jax.parallel.chips import Chip
from sqa_jax.plan.hlo import Array, Computation, Instruction, Program, trip_count

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions that move nothing, or whose traffic is counted where they start.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "copy-done", "slice-done", "async-start", "async-update", "async-done",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_KERNEL = 'custom_call_target="tpu_custom_call"'  # Pallas: XLA does not see into it
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}  # of matrices, for each block of scores


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `COLLECTIVES`.
      payload: bytes of the whole array: the gathered, the reduced, or the exchanged one.
      groups: [groups, n] devices that act together, as places in the mesh.
      overlapped: it runs while the core computes.
      count: how often a step runs it.
    """

    kind: str
    payload: float
    groups: np.ndarray
    overlapped: bool
    count: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one run, by the ring algorithms (Thakur et al. 2005, section 4)."""
        n = self.groups.shape[1]
        if self.kind == "collective-permute":
            return self.payload
        return (2 if self.kind == "all-reduce" else 1) * (n - 1) / n * self.payload


@dataclasses.dataclass
class HloCost:
    """Totals of one run on one chip.

    Attributes:
      flops: of matrix products.
      traffic: bytes between HBM and core.
      busy: seconds of all instructions one after the other. Each takes the longest of: the compiler's own estimate
        (matrix products: its classic cost model, the only one that it marks as valid), its traffic to HBM, and its
        traffic to VMEM. Copies and collectives that run beside the core are not among them.
      uncounted: kernels whose operations are not known.
      collectives: all of them.
    """

    flops: float = 0.0
    traffic: float = 0.0
    busy: float = 0.0
    uncounted: set[str] = dataclasses.field(default_factory=set)
    collectives: list[Collective] = dataclasses.field(default_factory=list)


def count(program: Program, chip: Chip, devices: int, unknown_trips: int | None = None) -> HloCost:
    """The work of a program on each of the `devices` that it was compiled for.

    Args:
      unknown_trips: runs of loops that end when the data say so.

    Raises:
      ValueError: the length of a loop, or a group of devices, is written in a way that is not known.
    """
    work = HloCost()
    _count(program, program.entry, 1, chip, devices, unknown_trips, work)
    return work


def _count(
    program: Program, name: str, times: int, chip: Chip, devices: int, unknown: int | None, work: HloCost
) -> None:
    inside = program.computations[name]
    channels: set[str] = set()  # a collective that is spread over several fusions has one channel
    for own in inside.instructions.values():
        if own.opcode == "while":
            runs = times * trip_count(program, inside, own, unknown)
            _count(program, own.attribute(r"body=%([^\s,]+)"), runs, chip, devices, unknown, work)
        elif own.opcode in ("call", "async-start"):
            _count(program, own.called, times, chip, devices, unknown, work)
        elif own.opcode == "conditional":
            # Each branch counts, as any may be taken.
            named = re.findall(r"branch_computations=\{[^}]*\}|(?:true|false)_computation=[^\s,]+", own.text)
            for branch in re.findall(r"%([^\s,}]+)", " ".join(named)):
                _count(program, branch, times, chip, devices, unknown, work)

        flops = 0.0
        for where, one in _with_fused(program, inside, own):
            if one.opcode in ("dot", "convolution"):
                flops += _product_flops(where, one)
            kind = one.opcode.removesuffix("-start")
            channel = one.attribute(r"channel_id=(\d+)") or one.name
            if kind in COLLECTIVES and channel not in channels:
                channels.add(channel)
                beside = one.opcode.endswith("-start") or where is not inside
                work.collectives.append(_collective(kind, where, one, beside, times, devices))
                work.traffic += times * sum(array.held for array in _operands(where, one) + one.arrays if array.main)
        seconds = _estimated_cycles(own) / chip.clock
        if _KERNEL in own.text:
            flops, padded = _kernel_flops(inside, own, chip.mxu_width)
            seconds = padded / chip.flops
            if not flops:
                work.uncounted.add(own.name.split(".")[0])
        main = core = 0.0
        for in_main, size in _memory_traffic(program, inside, own):
            main, core = (main + size, core) if in_main else (main, core + size)
        if not own.opcode.endswith("-start"):
            work.busy += times * max(seconds, main / chip.bandwidth, core / chip.vmem_bandwidth)
        work.flops += times * flops
        work.traffic += times * main


def _estimated_cycles(own: Instruction) -> int:
    match = re.search(r'"estimated_cycles":"(\d+)".*?"cost_model_type":"COST_MODEL_TYPE_(\w+)"', own.text)
    return int(match[1]) if match and match[2] != "INVALID" else 0


def _with_fused(program: Program, inside: Computation, own: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, and those that are fused into it, each with its computation."""
    yield inside, own
    if own.opcode == "fusion":
        fused = program.computations[own.called]
        for one in fused.instructions.values():
            yield from _with_fused(program, fused, one)


def _product_flops(inside: Computation, own: Instruction) -> float:
    """Operations of a matrix product, which TPUs write as a convolution."""
    left, right = (inside.instructions[name].arrays[0].shape for name in own.operands[:2])
    out = own.arrays[0].shape
    if own.opcode == "dot":
        contracted = own.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",")
        return 2.0 * math.prod(out) * math.prod(left[int(k)] for k in contracted if k)
    lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", own.text).groups()
    window = dict(re.findall(r"(\w+)=([\w\-x]+)", own.attribute(r"window=\{([^}]*)\}") or ""))
    total = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    for place, label in enumerate(filter(str.isdigit, result)):
        stride, low, spread, dilate = (
            int(window[name].split("x")[place].split("_")[0]) if name in window else default
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        # Pairs of output and kernel places that meet an input: a batch is a dimension where only one of them does.
        size, inputs = right[rhs.index(label)], left[lhs.index(label)]
        position = stride * np.arange(out[result.index(label)])[:, None] + dilate * np.arange(size) - low
        total *= ((position % spread == 0) & (position >= 0) & (position <= (inputs - 1) * spread)).sum()
    return float(total)


def _memory_traffic(program: Program, inside: Computation, own: Instruction) -> Iterator[tuple[bool, float]]:
    """What an instruction reads and writes: (in HBM?, bytes)."""
    if own.opcode in _FREE or _communicates(own):
        return
    if own.opcode == "custom-call" and _KERNEL not in own.text:
        return  # other calls only tell the compiler something
    if own.opcode == "fusion":
        yield from _moved_by_fusion(program, program.computations[own.called])
        return
    if own.opcode.endswith("-start"):  # of a copy or slice; its result is destination and source, or source and slice
        size = min(array.held for array in own.arrays[:2])
        yield from ((array.main, size) for array in own.arrays[:2])
        return
    operands = _operands(inside, own)
    if own.opcode in _SLICES:
        yield operands[0].main, own.arrays[0].held
        yield own.arrays[0].main, own.arrays[0].held
    elif own.opcode == "dynamic-update-slice":
        yield operands[1].main, operands[1].held
        yield own.arrays[0].main, operands[1].held
    else:
        yield from ((array.main, array.held) for array in [*operands, *own.arrays])


def _moved_by_fusion(program: Program, fused: Computation) -> Iterator[tuple[bool, float]]:
    read = _read_by_fusion(program, fused)
    for one in fused.instructions.values():
        if one.opcode == "parameter":
            yield one.arrays[0].main, read.get(one.name, 0.0)
    root = fused.instructions[fused.root]
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        written, made = fused.instructions[name].arrays[0], fused.origin(name)
        if made.opcode == "dynamic-update-slice":
            yield written.main, fused.instructions[made.operands[1]].arrays[0].held
        elif made.opcode != "parameter" and not _communicates(made):
            yield written.main, written.held


def _read_by_fusion(program: Program, fused: Computation) -> dict[str, float]:
    """Of each parameter, by name, the bytes that are read."""
    read: dict[str, float] = {}
    for one in fused.instructions.values():
        if one.opcode in ("bitcast", "tuple") or _communicates(one):
            continue
        inner = program.computations[one.called] if one.opcode == "fusion" else None
        reads = list(_by_number(inner, _read_by_fusion(program, inner))) if inner else []
        for place, name in enumerate(one.operands):
            made = fused.origin(name)
            whole = sum(array.held for array in made.arrays)
            if inner:
                size = reads[place]
            elif place == 0 and one.opcode in _SLICES:
                size = one.arrays[0].held
            elif place == 0 and one.opcode == "dynamic-update-slice":
                size = 0.0  # updated in place
            else:
                size = whole
            read[made.name] = min(whole, read.get(made.name, 0.0) + size)
    return read


def _by_number(fused: Computation, values: dict[str, float]) -> Iterator[float]:
    """Values of parameters in the order of their numbers."""
    parameters = [one for one in fused.instructions.values() if one.opcode == "parameter"]
    for one in sorted(parameters, key=lambda one: int(one.text.split(")")[0])):
        yield values.get(one.name, 0.0)


def _operands(inside: Computation, own: Instruction) -> tuple[Array, ...]:
    return tuple(array for name in own.operands for array in inside.instructions[name].arrays)


def _communicates(own: Instruction) -> bool:
    return own.opcode.removesuffix("-done").removesuffix("-start") in COLLECTIVES


def _collective(kind: str, inside: Computation, own: Instruction, beside: bool, times: int, devices: int) -> Collective:
    groups = _groups(own, devices)
    payload = sum(array.bytes for array in _operands(inside, own))
    payload *= groups.shape[1] if kind == "all-gather" else 1
    return Collective(kind, payload, groups, beside, times)


def _groups(own: Instruction, devices: int) -> np.ndarray:
    """The devices of each group, [groups, n], from any of the forms in which HLO writes them."""
    if pairs := own.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        return np.array(re.findall(r"\{(\d+),(\d+)\}", pairs), int)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", own.text):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", match[1])}
        chosen = match[2].split(",")
        if set(chosen) <= set(sizes) and "device_ids" not in match[1]:
            places = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
            places = np.moveaxis(places, [list(sizes).index(name) for name in chosen], range(-len(chosen), 0))
            return places.reshape(-1, math.prod(sizes[name] for name in chosen))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", own.text):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", own.text):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])
    if "replica_groups={}" in own.text:
        return np.arange(devices)[None]
    raise ValueError(f"{own.name}: its groups of devices are written in a way that is not known: {own.text[:300]}")


def _kernel_flops(inside: Computation, own: Instruction, width: int) -> tuple[float, float]:
    """Splash attention's operations: of whole blocks on or below the diagonal.

    Returns:
      The operations; and those of which the matrix units take the time: they work on `width` places of a head at
      once, however narrow it is. Zeros for an unknown kernel.
    """
    products = next((n for name, n in _KERNEL_PRODUCTS.items() if name in own.name), 0)
    sizes = [re.search(rf'\\"{name}(?:_dkv)?\\": (\d+)', own.text) for name in ("block_q", "block_kv")]
    if not products or None in sizes:
        return 0.0, 0.0
    rows, columns = (int(match[1]) for match in sizes)
    arrays = (inside.instructions[name].arrays[0] for name in own.operands)
    *batch, length, head = next(array.shape for array in arrays if array.type in ("bf16", "f32"))  # the queries
    blocks = sum(-(-(start + rows) // columns) for start in range(0, length, rows))
    flops = 2.0 * products * math.prod(batch) * head * blocks * rows * columns
    return flops, flops * -(-head // width) * width / head
