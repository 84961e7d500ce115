"""Cost analysis of a compiled program on one chip: FLOPs, memory traffic, time, communication.

`Compiled.cost_analysis()` counts the body of a loop once, however often it runs; here every instruction is multiplied
by the trip counts of the loops around it. Otherwise the rules are those of XLA's HloCostAnalysis: a multiply-add is
two FLOPs; of a sliced operand only the slice is read; an in-place update writes only the update. Arrays count with
their padding to whole tiles.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from sqa_jax.parallel.chips import Chip
from sqa_jax.plan.hlo import Array, Computation, Instruction, Program, trip_count
from sqa_jax.plan.hlo_flops import KERNEL, kernel_flops, product_flops
from sqa_jax.plan.replica_groups import replica_groups

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions without memory traffic, or whose traffic is counted at their start.
_NO_TRAFFIC = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "copy-done", "slice-done", "async-start", "async-update", "async-done",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `COLLECTIVES`.
      payload: bytes of the whole array: the gathered, the reduced, or the exchanged one.
      groups: replica groups, as indices into the mesh's devices.
      overlapped: it runs concurrently with computation.
      count: executions in one step.
    """

    kind: str
    payload: float
    groups: Int[np.ndarray, "groups n"]
    overlapped: bool
    count: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one execution, by the ring algorithms (Thakur et al. 2005, section 4)."""
        n = self.groups.shape[1]
        if self.kind == "collective-permute":
            return self.payload
        return (2 if self.kind == "all-reduce" else 1) * (n - 1) / n * self.payload


@dataclasses.dataclass
class HloCost:
    """Totals of one execution on one chip.

    Attributes:
      flops: of matrix products.
      traffic: bytes between HBM and the core.
      busy: seconds of all instructions run serially. Each takes the maximum of: the compiler's estimate (for matrix
        products: its classic cost model, the only one that it marks as valid), its HBM traffic, and its VMEM traffic,
        over the bandwidths. Asynchronous copies and collectives are not included.
      uncounted: kernels whose FLOPs are unknown.
      collectives: all of them.
    """

    flops: float = 0.0
    traffic: float = 0.0
    busy: float = 0.0
    uncounted: set[str] = dataclasses.field(default_factory=set)
    collectives: list[Collective] = dataclasses.field(default_factory=list)


def count(program: Program, chip: Chip, devices: int, unknown_trips: int | None = None) -> HloCost:
    """The cost of a program on each of the `devices` that it was compiled for.

    Args:
      unknown_trips: iterations of loops whose condition depends on data.

    Raises:
      ValueError: a trip count or a replica group is written in an unknown form.
    """
    counter = _Counter(program, chip, devices, unknown_trips)
    counter.add_computation(program.entry, 1)
    return counter.cost


class _Counter:
    """Walks a program's computations and adds up their cost."""

    def __init__(self, program: Program, chip: Chip, devices: int, unknown_trips: int | None):
        self.program, self.chip, self.devices, self.unknown_trips = program, chip, devices, unknown_trips
        self.cost = HloCost()

    def add_computation(self, name: str, times: int) -> None:
        computation = self.program.computations[name]
        channels: set[str] = set()  # a collective that is spread over several fusions has one channel
        for instruction in computation.instructions.values():
            for called, runs in self._called(computation, instruction):
                self.add_computation(called, runs * times)
            self._add_instruction(computation, instruction, times, channels)

    def _called(self, parent: Computation, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Computations that an instruction runs, each with how often."""
        if instruction.opcode == "while":
            yield (
                instruction.computation_name("body"),
                trip_count(self.program, parent, instruction, self.unknown_trips),
            )
        elif instruction.opcode in ("call", "async-start"):
            yield instruction.called, 1
        elif instruction.opcode == "conditional":
            # Every branch counts, as any may be taken.
            branches = re.findall(r"branch_computations=\{[^}]*\}|(?:true|false)_computation=[^\s,]+", instruction.text)
            for branch in re.findall(r"%([^\s,}]+)", " ".join(branches)):
                yield branch, 1

    def _add_instruction(
        self, computation: Computation, instruction: Instruction, times: int, channels: set[str]
    ) -> None:
        cost, chip = self.cost, self.chip
        flops = 0.0
        for parent, fused in _with_fused(self.program, computation, instruction):
            if fused.opcode in ("dot", "convolution"):
                flops += product_flops(parent, fused)
            kind = fused.opcode.removesuffix("-start")
            channel = fused.attribute(r"channel_id=(\d+)") or fused.name
            if kind in COLLECTIVES and channel not in channels:
                channels.add(channel)
                overlapped = fused.opcode.endswith("-start") or parent is not computation
                cost.collectives.append(_collective(kind, parent, fused, overlapped, times, self.devices))
                cost.traffic += times * sum(
                    array.padded_bytes for array in _operands(parent, fused) + fused.arrays if array.in_hbm
                )
        seconds = _estimated_cycles(instruction) / chip.clock
        if KERNEL in instruction.text:
            flops, padded = kernel_flops(computation, instruction, chip.mxu_width)
            seconds = padded / chip.flops
            if not flops:
                cost.uncounted.add(instruction.name.split(".")[0])
        hbm = vmem = 0.0
        for in_hbm, size in _memory_traffic(self.program, computation, instruction):
            hbm, vmem = (hbm + size, vmem) if in_hbm else (hbm, vmem + size)
        if not instruction.opcode.endswith("-start"):
            cost.busy += times * max(seconds, hbm / chip.bandwidth, vmem / chip.vmem_bandwidth)
        cost.flops += times * flops
        cost.traffic += times * hbm


def _estimated_cycles(instruction: Instruction) -> int:
    match = re.search(r'"estimated_cycles":"(\d+)".*?"cost_model_type":"COST_MODEL_TYPE_(\w+)"', instruction.text)
    return int(match[1]) if match and match[2] != "INVALID" else 0


def _with_fused(
    program: Program, parent: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction and those fused into it, each with the computation that contains it."""
    yield parent, instruction
    if instruction.opcode == "fusion":
        computation = program.computations[instruction.called]
        for fused in computation.instructions.values():
            yield from _with_fused(program, computation, fused)


def _memory_traffic(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[bool, float]]:
    """What an instruction reads and writes: (in HBM?, bytes)."""
    if instruction.opcode in _NO_TRAFFIC or _is_collective(instruction):
        return
    if instruction.opcode == "custom-call" and KERNEL not in instruction.text:
        return  # other custom calls are annotations for the compiler
    if instruction.opcode == "fusion":
        yield from _fusion_traffic(program, program.computations[instruction.called])
        return
    if instruction.opcode.endswith(
        "-start"
    ):  # of a copy or slice: its result is (destination, source) or (source, slice)
        size = min(array.padded_bytes for array in instruction.arrays[:2])
        yield from ((array.in_hbm, size) for array in instruction.arrays[:2])
        return
    operands = _operands(computation, instruction)
    if instruction.opcode in _SLICES:
        result = instruction.arrays[0]
        yield operands[0].in_hbm, result.padded_bytes
        yield result.in_hbm, result.padded_bytes
    elif instruction.opcode == "dynamic-update-slice":
        yield operands[1].in_hbm, operands[1].padded_bytes
        yield instruction.arrays[0].in_hbm, operands[1].padded_bytes
    else:
        yield from ((array.in_hbm, array.padded_bytes) for array in [*operands, *instruction.arrays])


def _fusion_traffic(program: Program, fused: Computation) -> Iterator[tuple[bool, float]]:
    read = _bytes_read(program, fused)
    for instruction in fused.instructions.values():
        if instruction.opcode == "parameter":
            yield instruction.arrays[0].in_hbm, read.get(instruction.name, 0.0)
    root = fused.instructions[fused.root]
    for name in root.operands if root.opcode == "tuple" else (root.name,):
        result, producer = fused.instructions[name].arrays[0], fused.origin(name)
        if producer.opcode == "dynamic-update-slice":
            yield result.in_hbm, fused.instructions[producer.operands[1]].arrays[0].padded_bytes
        elif producer.opcode != "parameter" and not _is_collective(producer):
            yield result.in_hbm, result.padded_bytes


def _bytes_read(program: Program, fused: Computation) -> dict[str, float]:
    """Bytes that a fused computation reads of each parameter, by name."""
    read: dict[str, float] = {}
    for instruction in fused.instructions.values():
        if instruction.opcode in ("bitcast", "tuple") or _is_collective(instruction):
            continue
        inner = program.computations[instruction.called] if instruction.opcode == "fusion" else None
        inner_reads = list(_in_parameter_order(inner, _bytes_read(program, inner))) if inner else []
        for index, name in enumerate(instruction.operands):
            producer = fused.origin(name)
            whole = sum(array.padded_bytes for array in producer.arrays)
            if inner:
                size = inner_reads[index]
            elif index == 0 and instruction.opcode in _SLICES:
                size = instruction.arrays[0].padded_bytes
            elif index == 0 and instruction.opcode == "dynamic-update-slice":
                size = 0.0  # updated in place
            else:
                size = whole
            read[producer.name] = min(whole, read.get(producer.name, 0.0) + size)
    return read


def _in_parameter_order(fused: Computation, values: dict[str, float]) -> Iterator[float]:
    """Values by parameter name, in the order of the parameters' numbers."""
    parameters = [each for each in fused.instructions.values() if each.opcode == "parameter"]
    for parameter in sorted(parameters, key=lambda each: int(each.text.split(")")[0])):
        yield values.get(parameter.name, 0.0)


def _operands(computation: Computation, instruction: Instruction) -> tuple[Array, ...]:
    return tuple(array for name in instruction.operands for array in computation.instructions[name].arrays)


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-done").removesuffix("-start") in COLLECTIVES


def _collective(
    kind: str, computation: Computation, instruction: Instruction, overlapped: bool, times: int, devices: int
) -> Collective:
    groups = replica_groups(instruction, devices)
    payload = sum(array.bytes for array in _operands(computation, instruction))
    payload *= groups.shape[1] if kind == "all-gather" else 1
    return Collective(kind, payload, groups, overlapped, times)
