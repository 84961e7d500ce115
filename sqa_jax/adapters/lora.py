"""LoRA: low-rank updates of linear layers.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3:

    h = W₀ x + s · B A x        with  s = α / r

A is random and B is zero at the start, so a new adapter changes nothing. With rank-stabilised scaling
(Kalajdzievski 2023, arXiv:2312.03732, eq. 4) s = α / √r. Activations are row vectors here, so the update of a layer
is x · a · b with a [in, r] = Aᵀ and b [r, out] = Bᵀ.

Tree: {layer name: {"a": [L, in, r], "b": [L, r, out]}}, float32. Layers of a T5 are named by stack and module, such
as "decoder.cross_attn.q"; `config.adapter.lora.targets` are the last parts of names, so that "q" adapts all three, as in
PEFT. With `config.adapter.lora.vision_encoder` the vision encoder and the connector of a vision-language model are adapted, too:
"vision.q_proj"; the connector's layers are not stacked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sqa_jax.errors import UserError
from sqa_jax.models.param_spec import ParamSpec, ParamTree
from sqa_jax.models.params import linear_layers, vision_linear_layers
from sqa_jax.models.student_config import StudentConfig


def scale(settings: Any) -> float:
    """s of the equation above, from `config.adapter.lora`."""
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


def target_of(name: str) -> str:
    """The entry of `config.adapter.lora.targets` for a layer: the last part of its name."""
    return name.rpartition(".")[2]


def adaptable(student: StudentConfig, vision_encoder: bool = True) -> dict[str, ParamSpec]:
    """The kernels that LoRA may adapt, by layer name.

    Args:
      vision_encoder: also those of the vision encoder and the connector, where the student has them.
    """
    return linear_layers(student) | (vision_linear_layers(student) if vision_encoder else {})


def init(settings: Any, student: StudentConfig, key: jax.Array) -> ParamTree:
    """A new adapter: a ~ U(±√(1/in)) as in the reference implementation and PEFT (Kaiming, a = √5), b = 0.

    Args:
      settings: `config.adapter.lora`.

    Raises:
      UserError: a target is no linear layer of the student, there is no vision encoder to adapt, or the rank is not
        positive.
    """
    if settings.vision_encoder and student.vision is None:
        raise UserError("config.adapter.lora.vision_encoder: this student is a text-only model; leave it at False")
    layers = adaptable(student, settings.vision_encoder)
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


def scaled_matrices(settings: Any, tree: ParamTree) -> ParamTree:
    """The tree as inputs of the forward pass: b is multiplied by the scale, which costs nothing there."""
    return {name: {"a": layer["a"], "b": layer["b"] * scale(settings)} for name, layer in tree.items()}


def merge(settings: Any, tree: ParamTree, base: ParamTree, student: StudentConfig) -> ParamTree:
    """The base with W₀ + s · a · b in place of W₀, computed in float32 and stored in the base's dtype."""
    layers = adaptable(student)
    name_of = {layers[name].path: name for name in tree}

    def merged(path: Any, kernel: jax.Array) -> jax.Array:
        name = name_of.get(tuple(key.key for key in path))
        if name is None:
            return kernel
        return (kernel + update(tree[name]["a"], tree[name]["b"], scale(settings))).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(merged, base)


def update(
    a: Float[Array | np.ndarray, "*L in r"], b: Float[Array | np.ndarray, "*L r out"], scale: float
) -> Float[Array, "*L in out"]:
    """s · a · b, what LoRA adds to a kernel."""
    return scale * jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
