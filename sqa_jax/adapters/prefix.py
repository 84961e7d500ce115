"""Prefix tuning: trained keys and values prepended to those of every attention layer.

Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190. The activations
of the P prefix positions are free parameters (eq. 3), either directly or, more stably, the output of an MLP over a
smaller matrix (reparametrisation, section 4.3):

    P_θ[i, :] = MLP_θ(P'_θ[i, :]) = tanh(P'_θ[i, :] W₁ + c₁) W₂ + c₂

The MLP is PEFT's: one hidden layer with tanh, output of 2 · L · K · d values. Keys are those after the rotary
embedding, and text positions start at P.

Tree without reparametrisation: {"key": [L, P, K·d], "value": [L, P, K·d]}.
With: {"embedding": [P, D], "hidden": {"kernel", "bias"}, "output": {"kernel": [hidden, 2·L·K·d], "bias"}}.

A T5 has the prefix in the self-attention of its decoder only, as in PEFT: PEFT leaves cross-attention without one, and
gives layer i of the decoder what is stored for layer 2 i mod L. Where L is even, layers i and i + L/2 so share one
prefix, and only L/2 are used: these are all that the tree then contains, in the order of the layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sqa_jax.errors import UserError
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.student_config import StudentConfig


def num_prefixes(student: StudentConfig) -> int:
    """The number of distinct prefixes: one a layer, but half as many for a T5 whose layers share them."""
    halved = student.is_encoder_decoder and student.num_layers % 2 == 0
    return student.num_layers // 2 if halved else student.num_layers


def init(
    settings: Any, student: StudentConfig, key: jax.Array, activations: dict[str, Float[Array, "L P K·d"]]
) -> ParamTree:
    """A new prefix.

    Args:
      settings: `config.adapter.prefix`.
      activations: {"key", "value"} of P real tokens in each layer, which a prefix without reparametrisation is
        initialised from (Li & Liang, section 7.4: far better than random); also the MLP's output bias, so that the
        reparametrised prefix starts near the same values.

    Raises:
      UserError: the length is not positive.
    """
    P, D = settings.length, student.hidden_size
    if P < 1:
        raise UserError(f"config.adapter.prefix.length is {P}; it must be 1 or more")
    # Layers that share a prefix start at the mean of their activations.
    activations = {
        name: layers.reshape(-1, num_prefixes(student), *layers.shape[1:]).mean(axis=0).astype(jnp.float32)
        for name, layers in activations.items()
    }
    if not settings.reparametrize:
        return activations
    width = 2 * num_prefixes(student) * student.num_kv_heads * student.head_dim
    k_embedding, k_hidden, k_output = jax.random.split(key, 3)
    # All P positions share the bias, so it starts at their mean; the MLP adds what differs between them.
    mean = jnp.stack([activations["key"], activations["value"]], axis=1).mean(axis=2)  # [L, 2, K·d]
    return {
        "embedding": jax.random.normal(k_embedding, (P, D), jnp.float32),
        "hidden": {
            "kernel": jax.random.normal(k_hidden, (D, settings.hidden), jnp.float32) * D**-0.5,
            "bias": jnp.zeros((settings.hidden,), jnp.float32),
        },
        "output": {
            "kernel": jax.random.normal(k_output, (settings.hidden, width), jnp.float32) * 0.1 * settings.hidden**-0.5,
            "bias": mean.reshape(width),
        },
    }


def key_values(settings: Any, tree: ParamTree, student: StudentConfig) -> dict[str, Float[Array, "L P K·d"]]:
    """The prefix KV {"key", "value"} of all layers, whether they are the parameters or the MLP's output."""
    prefixes = num_prefixes(student)
    if settings.reparametrize:
        hidden = jnp.tanh(tree["embedding"] @ tree["hidden"]["kernel"] + tree["hidden"]["bias"])
        flat = hidden @ tree["output"]["kernel"] + tree["output"]["bias"]
        stacked = flat.reshape(settings.length, prefixes, 2, -1)
        tree = {"key": stacked[:, :, 0].transpose(1, 0, 2), "value": stacked[:, :, 1].transpose(1, 0, 2)}
    tree = {name: jnp.asarray(values) for name, values in tree.items()}
    layers = jnp.arange(student.num_layers) % prefixes
    return {name: values[layers] for name, values in tree.items()} if prefixes < student.num_layers else tree
