"""Communication model of a training step, against which the compiled program's collectives are compared.

Bytes that each chip sends in one step, with A micro-batches of b rows of T tokens on each chip, M target positions a
row, hidden size D, L layers, LoRA of rank r on m projections of a block, c bytes for each number of the compute dtype,
and a mesh of d × f × t (data, fsdp, tensor). In a ring of n chips, all-gather, reduce-scatter and all-to-all of W bytes
send (n-1)/n · W from each chip; all-reduce sends twice that (Thakur et al. 2005, section 4).

    weights      f  A · 2 · (f-1)/f · c · (kernels of all layers) / t       forward, and again backward
                 f  A · (1 + 2 k) · (f-1)/f · c · V · D / t                 embedding table, and the output layer in each
                                                                            of the loss' k chunks: logits and gradients
                 f  A · 2 · (f-1)/f · c · (adapter leaves sharded over f)
    gradients       A · 2 · (n-1)/n · c · (adapter leaves replicated over f) / t            n = d · f
                 f  A · 2 · ((f-1)/f + (d-1)/d / f) · c · (those sharded over f) / t
    activations  t  A · 2 · (t-1)/t · c · b · ((p L + 1) · T · D + M · D + m L T r)
                 f  A · 2 · (f-1)/f · c · b · T · D / t                     rows looked up in the embedding table

A line with f or t applies if that axis is larger than 1. p all-reduces a layer run over `tensor`: of the outputs of o
and down in the forward pass, and in the backward pass of the input gradients of q, k, v and of gate, up, which are
added before the all-reduce (Shoeybi et al. 2019, arXiv:1909.08053, section 3), except those of projections with LoRA,
which the compiler reduces separately: p is 4 without LoRA, 7 with LoRA everywhere. Gradients are of the adapter alone,
which is what makes its training cheap on a slow network; full fine-tuning is the case in which the adapter is the
whole model. Of a prefix with an MLP reparameterization, only the gradient of the MLP's output is reduced: less than
the formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sqa_jax.models.log_probs import CHUNK
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.rules import path_name, spec_for

_SHARED_INPUTS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # projections that share an input


def expected_bytes(
    student: StudentConfig, base: Any, adapter: Any, mesh: Mesh, train: Any, targets: int, dtype: Any
) -> dict[str, float]:
    """The formula above: {"weights", "gradients", "activations"}, bytes that a chip sends in one step.

    Args:
      base, adapter: trees of shapes.
      train: `config.train`.
      targets: M.
      dtype: of the computation (activations and gathered weights).
    """
    d, f, t = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    A, B, T, M = train.accumulate, train.batch_rows, train.row_length, targets
    b, c, D, L = B // (d * f), jnp.dtype(dtype).itemsize, student.hidden_size, student.num_layers
    chunks = -(-B * M // (CHUNK * d * f))
    tables = ("embed_tokens/embedding", "lm_head/kernel")

    kernels = table = 0.0
    for name, leaf, axes in _leaves(base or adapter.get("full", {}), mesh):
        if name.endswith(tables):
            table = leaf.size / t
        elif "fsdp" in axes:
            kernels += leaf.size / (t if "tensor" in axes else 1)
    replicated = sharded = gathered = 0.0
    rank, adapted = 0, set()
    for name, leaf, axes in _leaves(adapter, mesh):
        size = leaf.size / (t if "tensor" in axes else 1)
        replicated += 0.0 if "fsdp" in axes else size
        sharded += size if "fsdp" in axes else 0.0
        gathered += size if "fsdp" in axes and "full" not in adapter else 0.0
        if name.endswith("/a"):
            rank += leaf.shape[-1]
            adapted.add(name.split("/")[-2])
    products = 2 + sum(len(group & adapted) + bool(group - adapted) for group in _SHARED_INPUTS)
    of_f, of_d, of_n, of_t = ((n - 1) / n for n in (f, d, d * f, t))
    return {
        "weights": A * c * of_f * (2 * kernels + (1 + 2 * chunks) * table + 2 * gathered),
        "gradients": 2 * A * c * (of_n * replicated + (of_f + of_d / f) * sharded),
        "activations": 2 * A * c * b * (of_t * ((products * L + 1) * T * D + M * D + L * T * rank) + of_f * T * D / t),
    }


def _leaves(tree: Any, mesh: Mesh) -> Iterator[tuple[str, Any, set[str]]]:
    """The name of each leaf, its shape, and the mesh axes over which it is sharded."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        spec = spec_for(name, leaf.shape, mesh)
        yield name, leaf, {axis for axis in spec if axis and mesh.shape[axis] > 1}
