"""FLOPs of single HLO instructions: dots, convolutions, and known Pallas kernels."""

from __future__ import annotations

import math
import re

import numpy as np

from sqa_jax.plan.hlo import Computation, Instruction

KERNEL = 'custom_call_target="tpu_custom_call"'  # Pallas, which XLA does not analyse
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}  # matrix products for each block of attention scores


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a matrix product, which TPUs write as a convolution."""
    left, right = (computation.instructions[name].arrays[0].shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    if instruction.opcode == "dot":
        contracted = (instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
        return 2.0 * math.prod(out) * math.prod(left[int(k)] for k in contracted if k)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    assert labels is not None, instruction.text
    lhs, rhs, result = labels.groups()
    window = dict(re.findall(r"(\w+)=([\w\-x]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    total = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    for spatial, label in enumerate(filter(str.isdigit, result)):
        stride, low, lhs_dilation, rhs_dilation = (
            int(window[name].split("x")[spatial].split("_")[0]) if name in window else default
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        # Pairs of output and kernel positions that meet an input: a batch dimension is one where each meets only one.
        size, inputs = right[rhs.index(label)], left[lhs.index(label)]
        position = stride * np.arange(out[result.index(label)])[:, None] + rhs_dilation * np.arange(size) - low
        in_range = (position >= 0) & (position <= (inputs - 1) * lhs_dilation)
        total *= ((position % lhs_dilation == 0) & in_range).sum()
    return float(total)


def kernel_flops(computation: Computation, instruction: Instruction, mxu_width: int) -> tuple[float, float]:
    """FLOPs of splash attention: of whole blocks on or below the diagonal.

    Returns:
      FLOPs; and FLOPs with the head dimension padded to a multiple of `mxu_width`, which determine the MXUs' time.
      Zeros for an unknown kernel.
    """
    products = next((n for name, n in _KERNEL_PRODUCTS.items() if name in instruction.name), 0)
    block_q, block_kv = (
        re.search(rf'\\"{name}(?:_dkv)?\\": (\d+)', instruction.text) for name in ("block_q", "block_kv")
    )
    if not products or block_q is None or block_kv is None:
        return 0.0, 0.0
    rows, columns = int(block_q[1]), int(block_kv[1])
    arrays = (computation.instructions[name].arrays[0] for name in instruction.operands)
    *batch, length, head = next(array.shape for array in arrays if array.type in ("bf16", "f32"))  # the queries
    blocks = sum(-(-(start + rows) // columns) for start in range(0, length, rows))
    flops = 2.0 * products * math.prod(batch) * head * blocks * rows * columns
    return flops, flops * -(-head // mxu_width) * mxu_width / head
