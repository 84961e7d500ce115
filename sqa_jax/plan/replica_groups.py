"""Replica groups of a collective, from each form in which HLO writes them."""

from __future__ import annotations

import math
import re

import numpy as np
from jaxtyping import Int

from sqa_jax.plan.hlo import Instruction


def replica_groups(instruction: Instruction, devices: int) -> Int[np.ndarray, "groups n"]:
    """The devices of each group of a collective.

    Raises:
      ValueError: they are written in an unknown form.
    """
    if pairs := instruction.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        return np.array(re.findall(r"\{(\d+),(\d+)\}", pairs), int)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction.text):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", match[1])}
        axes = match[2].split(",")
        if set(axes) <= set(sizes) and "device_ids" not in match[1]:
            ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
            ids = np.moveaxis(ids, [list(sizes).index(name) for name in axes], range(-len(axes), 0))
            return ids.reshape(-1, math.prod(sizes[name] for name in axes))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.text):
        shape, dims = (_numbers(part) for part in (match[1], match[2]))
        order = _numbers(match[3]) if match[3] else None
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", instruction.text):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])])
    if "replica_groups={}" in instruction.text:
        return np.arange(devices)[None]
    raise ValueError(f"{instruction.name}: its replica groups are written in an unknown form: {instruction.text[:300]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
