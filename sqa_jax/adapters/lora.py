"""LoRA: low-rank updates of linear layers.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3:

    h = W₀ x + s · B A x        with  s = α / r

A is drawn at random and B is zero, so a new adapter changes nothing. With rank-stabilised scaling
(Kalajdzievski 2023, arXiv:2312.03732, eq. 4) s = α / √r. Rows are vectors here, so the update of a layer
is x · a · b with a [in, r] = Aᵀ and b [r, out] = Bᵀ.

Tree: {layer name: {"a": [L, in, r], "b": [L, r, out]}}, float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.errors import UserError
from sqa_jax.students.config import DecoderConfig

Tree = dict[str, Any]


def scale(settings) -> float:
    """s of the equation above, from `config.adapter.lora`."""
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


def init(settings, student: DecoderConfig, key: jax.Array) -> Tree:
    """A new adapter: a ~ U(±√(1/in)) as in the reference implementation and PEFT (Kaiming, a = √5), b = 0.

    Raises:
      UserError: a target is no linear layer of the student, or the rank is not positive.
    """
    shapes = student.linear_shapes()
    unknown = sorted(set(settings.targets) - set(shapes))
    if unknown or not settings.targets:
        raise UserError(f"config.adapter.lora.targets: {unknown or 'none given'}; choose from {', '.join(shapes)}")
    if settings.rank < 1:
        raise UserError(f"config.adapter.lora.rank is {settings.rank}; it must be 1 or more")
    tree = {}
    for name, layer_key in zip(sorted(settings.targets), jax.random.split(key, len(settings.targets)), strict=True):
        _, width_in, width_out = shapes[name]
        bound = width_in**-0.5
        a_shape = (student.num_layers, width_in, settings.rank)
        tree[name] = {
            "a": jax.random.uniform(layer_key, a_shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((student.num_layers, settings.rank, width_out), jnp.float32),
        }
    return tree


def activate(settings, tree: Tree) -> Tree:
    """The tree as the decoder uses it: the scale is put into b, where it costs nothing."""
    return {name: {"a": layer["a"], "b": layer["b"] * scale(settings)} for name, layer in tree.items()}


def merge(settings, tree: Tree, base: Tree, student: DecoderConfig) -> Tree:
    """The base with W₀ + s · a · b in place of W₀, computed in float32, in the base's own type."""
    layers = {module: dict(layer) for module, layer in base["layers"].items()}
    for name, layer in tree.items():
        module = student.linear_shapes()[name][0]
        kernel = layers[module][name]["kernel"]
        update = scale(settings) * jnp.einsum("lir,lro->lio", layer["a"], layer["b"], precision="highest")
        layers[module][name] = {**layers[module][name], "kernel": (kernel + update).astype(kernel.dtype)}
    return {**base, "layers": layers}
