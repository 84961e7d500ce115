"""A parser of compiled HLO text: computations, instructions, and the trip counts of loops.

The grammar is that of HLO (https://openxla.org/xla/operation_semantics) as `Compiled.as_text()` prints it.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0}  # every other type has its width in its name
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*?\{$\n(.*?)^\}$", re.DOTALL | re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^  (ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)(?=^  (?:ROOT )?%|\Z)", re.DOTALL | re.MULTILINE
)


class Array(NamedTuple):
    """Shape of one array.

    Attributes:
      layout: dimensions from minor to major, tiling, and memory space, as in "1,0:T(8,128)(2,1)S(1)".
    """

    type: str
    shape: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """Whether its memory space is HBM, in contrast to VMEM or others."""
        return "S(" not in self.layout

    @property
    def bytes(self) -> float:
        if self.type in _BITS:
            bits = _BITS[self.type]
        else:
            width = re.search(r"\d+", self.type)
            assert width is not None, self.type
            bits = int(width[0])
        return math.prod(self.shape) * bits / 8

    @property
    def padded_bytes(self) -> float:
        """Bytes including the padding to whole tiles."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile or not self.shape:
            return self.bytes
        padded = list(self.shape)
        minor_to_major = map(int, self.layout.split(":")[0].split(","))
        for dimension, size in zip(minor_to_major, reversed(tile[1].split(",")), strict=False):
            padded[dimension] += -padded[dimension] % int(size)
        return self.bytes * math.prod(padded) / max(1, math.prod(self.shape))


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      arrays: of its result; those of a tuple in order.
      operands: names of instructions of the same computation.
      text: after the opening parenthesis: operands and attributes.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the text, or None."""
        match = re.search(pattern, self.text)
        return match and match[1]

    def computation_name(self, attribute: str) -> str:
        """Name of the computation that an attribute such as "body" or "calls" refers to.

        Raises:
          ValueError: there is no such attribute.
        """
        name = self.attribute(rf"(?:{attribute})=%([^\s,]+)")
        if name is None:
            raise ValueError(f"the instruction {self.name} has no attribute {attribute}")
        return name

    @property
    def called(self) -> str:
        """Name of the computation that a fusion, call or asynchronous start runs."""
        return self.computation_name("calls|to_apply")


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: str

    def origin(self, name: str) -> Instruction:
        """The instruction that produces a value, looking through copies and bitcasts."""
        found = self.instructions[name]
        while found.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
            found = self.instructions[found.operands[0]]
        return found


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Parses the text of `Compiled.as_text()`."""
    computations, entry = {}, ""
    for is_entry, name, body in _COMPUTATION.findall(text):
        instructions, root = {}, ""
        for is_root, instruction, result, opcode, rest in _INSTRUCTION.findall(body):
            arrays = tuple(
                Array(kind, tuple(map(int, filter(None, dims.split(",")))), layout)
                for kind, dims, layout in _ARRAY.findall(result)
            )
            operands = tuple(re.findall(r"%([^\s,)]+)", rest.split(")", 1)[0]))
            instructions[instruction] = Instruction(instruction, arrays, opcode, operands, rest)
            root = instruction if is_root else root
        computations[name] = Computation(instructions, root)
        entry = name if is_entry else entry
    return Program(computations, entry)


def trip_count(program: Program, parent: Computation, loop: Instruction, unknown: int | None) -> int:
    """Number of iterations of a `while` loop.

    Args:
      parent: the computation that contains the loop.
      unknown: the number for loops whose condition depends on data.

    Raises:
      ValueError: the text does not determine it and `unknown` is None.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (program.computations[loop.computation_name(name)] for name in ("condition", "body"))
    test = condition.instructions[condition.root]
    if test.opcode == "compare" and "direction=LT" in test.text:
        counter = condition.origin(test.operands[0]).attribute(r"index=(\d+)")
        last = _constant(condition, test.operands[1])
        if counter is not None and last is not None:
            first = _constant(parent, parent.instructions[loop.operands[0]].operands[int(counter)])
            increment = body.origin(body.instructions[body.root].operands[int(counter)])
            step = _constant(body, increment.operands[1]) if increment.opcode == "add" else None
            if first is not None and step is not None:
                return -((first - last) // step)
    if unknown is None:
        raise ValueError(f"the loop {loop.name} has no known trip count")
    return unknown


def _constant(computation: Computation, name: str) -> int | None:
    found = computation.origin(name)
    return int(found.text.split(")")[0]) if found.opcode == "constant" else None
