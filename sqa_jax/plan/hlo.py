"""XLA's compiled programs, read back from their text: computations, instructions, and how often each loop runs.

The grammar is that of HLO (https://openxla.org/xla/operation_semantics) as `Compiled.as_text()` prints it.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0}  # every other type says its width in its name
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*?\{$\n(.*?)^\}$", re.DOTALL | re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^  (ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)(?=^  (?:ROOT )?%|\Z)", re.DOTALL | re.MULTILINE
)


class Array(NamedTuple):
    """Type of one array.

    Attributes:
      layout: dimensions from minor to major, tiles, and memory space, as in "1,0:T(8,128)(2,1)S(1)".
    """

    type: str
    shape: tuple[int, ...]
    layout: str

    @property
    def main(self) -> bool:
        """Whether it lies in the chip's memory (HBM), not beside the core (VMEM) or elsewhere."""
        return "S(" not in self.layout

    @property
    def bytes(self) -> float:
        bits = _BITS[self.type] if self.type in _BITS else int(re.search(r"\d+", self.type)[0])
        return math.prod(self.shape) * bits / 8

    @property
    def held(self) -> float:
        """Bytes with the padding to whole tiles."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile or not self.shape:
            return self.bytes
        padded = list(self.shape)
        order = map(int, self.layout.split(":")[0].split(","))
        for dimension, size in zip(order, reversed(tile[1].split(",")), strict=False):
            padded[dimension] += -padded[dimension] % int(size)
        return self.bytes * math.prod(padded) / max(1, math.prod(self.shape))


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      arrays: of its result; a tuple's are in a row.
      operands: names of instructions of the same computation.
      text: what stands behind the opening bracket: operands and attributes.
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

    @property
    def called(self) -> str | None:
        """The computation that a fusion, call or asynchronous start runs."""
        return self.attribute(r"(?:calls|to_apply)=%([^\s,]+)")


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: str

    def origin(self, name: str) -> Instruction:
        """The instruction that a value comes from, behind copies and changes of layout."""
        found = self.instructions[name]
        while found.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
            found = self.instructions[found.operands[0]]
        return found


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The program in the text of `Compiled.as_text()`."""
    computations, entry = {}, ""
    for is_entry, name, body in _COMPUTATION.findall(text):
        instructions, root = {}, ""
        for is_root, own, result, opcode, rest in _INSTRUCTION.findall(body):
            arrays = tuple(
                Array(kind, tuple(map(int, filter(None, dims.split(",")))), layout)
                for kind, dims, layout in _ARRAY.findall(result)
            )
            operands = tuple(re.findall(r"%([^\s,)]+)", rest.split(")", 1)[0]))
            instructions[own] = Instruction(own, arrays, opcode, operands, rest)
            root = own if is_root else root
        computations[name] = Computation(instructions, root)
        entry = name if is_entry else entry
    return Program(computations, entry)


def trip_count(program: Program, inside: Computation, loop: Instruction, unknown: int | None) -> int:
    """How often the body of a `while` runs.

    Args:
      inside: the computation that holds it.
      unknown: the number for loops that end when the data say so.

    Raises:
      ValueError: the text does not say it and `unknown` is None.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (program.computations[loop.attribute(rf"{name}=%([^\s,]+)")] for name in ("condition", "body"))
    test = condition.instructions[condition.root]
    if test.opcode == "compare" and "direction=LT" in test.text:
        counter = condition.origin(test.operands[0]).attribute(r"index=(\d+)")
        last = _constant(condition, test.operands[1])
        if counter is not None and last is not None:
            first = _constant(inside, inside.instructions[loop.operands[0]].operands[int(counter)])
            added = body.origin(body.instructions[body.root].operands[int(counter)])
            step = _constant(body, added.operands[1]) if added.opcode == "add" else None
            if first is not None and step is not None:
                return -((first - last) // step)
    if unknown is None:
        raise ValueError(f"the loop {loop.name} does not say how often it runs")
    return unknown


def _constant(inside: Computation, name: str) -> int | None:
    found = inside.origin(name)
    return int(found.text.split(")")[0]) if found.opcode == "constant" else None
