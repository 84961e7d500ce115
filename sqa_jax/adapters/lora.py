"""LoRA: low-rank updates of linear layers.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3:

    h = W₀ x + s · B A x        with  s = α / r

A is drawn at random and B is zero, so a new adapter changes nothing. With rank-stabilised scaling
(Kalajdzievski 2023, arXiv:2312.03732, eq. 4) s = α / √r. Rows are vectors here, so the update of a layer
is x · a · b with a [in, r] = Aᵀ and b [r, out] = Bᵀ.

Tree: {layer name: {"a": [L, in, r], "b": [L, r, out]}}, float32. A T5's layers are named with stack and module, such
as "decoder.cross_attn.q"; `config.adapter.lora.targets` are last parts of names, so that "q" adapts all three, as in
PEFT. With `config.adapter.lora.tower` the layers of a student's tower and connector have it, too: "vision.q_proj"; the
connector's are not stacked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.param_spec import ParamSpec
from sqa_jax.models.params import linear_layers, vision_linear_layers

Tree = dict[str, Any]


def scale(settings) -> float:
    """s of the equation above, from `config.adapter.lora`."""
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


def target_of(name: str) -> str:
    """What `config.adapter.lora.targets` calls a layer: the last part of its name."""
    return name.rpartition(".")[2]


def adaptable(student: StudentConfig, tower: bool = True) -> dict[str, ParamSpec]:
    """The kernels that LoRA may adapt, by their names in its tree; those of a tower, too, where there is one."""
    return linear_layers(student) | (vision_linear_layers(student) if tower else {})


def init(settings, student: StudentConfig, key: jax.Array) -> Tree:
    """A new adapter: a ~ U(±√(1/in)) as in the reference implementation and PEFT (Kaiming, a = √5), b = 0.

    Raises:
      UserError: a target is no linear layer of the student, it has no tower to adapt, or the rank is not positive.
    """
    if settings.tower and student.vision is None:
        raise UserError("config.adapter.lora.tower: this student reads text alone; leave it at False")
    layers = adaptable(student, settings.tower)
    targets = dict.fromkeys(map(target_of, layers))
    if unknown := sorted(set(settings.targets) - set(targets)):
        known = ", ".join(targets)
        raise UserError(f"config.adapter.lora.targets: {unknown} are no layers of this student; choose from {known}")
    if settings.rank < 1:
        raise UserError(f"config.adapter.lora.rank is {settings.rank}; it must be 1 or more")
    names = sorted(name for name in layers if target_of(name) in (settings.targets or targets))
    tree = {}
    for name, layer_key in zip(names, jax.random.split(key, len(names)), strict=True):
        *depth, width_in, width_out = layers[name].shape
        bound = width_in**-0.5
        tree[name] = {
            "a": jax.random.uniform(layer_key, (*depth, width_in, settings.rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((*depth, settings.rank, width_out), jnp.float32),
        }
    return tree


def scaled_matrices(settings, tree: Tree) -> Tree:
    """The tree as the decoder uses it: the scale is put into b, where it costs nothing."""
    return {name: {"a": layer["a"], "b": layer["b"] * scale(settings)} for name, layer in tree.items()}


def merge(settings, tree: Tree, base: Tree, student: StudentConfig) -> Tree:
    """The base with W₀ + s · a · b in place of W₀, computed in float32, in the base's own type."""
    layers = adaptable(student)
    name_of = {layers[name].path: name for name in tree}

    def merged(path, kernel):
        name = name_of.get(tuple(key.key for key in path))
        if name is None:
            return kernel
        a, b = tree[name]["a"], tree[name]["b"]
        update = scale(settings) * jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
        return (kernel + update).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(merged, base)
