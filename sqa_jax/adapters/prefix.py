"""Prefix tuning: trained keys and values in front of every layer's own.

Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190. Activations
of the P prefix positions are free parameters (eq. 3), either directly or, more stably, through an MLP with a
smaller matrix in front of it (section 4.3):

    P_θ[i, :] = MLP_θ(P'_θ[i, :]) = tanh(P'_θ[i, :] W₁ + c₁) W₂ + c₂

The MLP is PEFT's: hidden layer with tanh, output of 2 · L · K · d values. Keys are those after the rotary
embedding, and text positions start at P.

Tree without reparametrisation: {"key": [L, P, K·d], "value": [L, P, K·d]}.
With: {"embedding": [P, D], "hidden": {"kernel", "bias"}, "output": {"kernel": [hidden, 2·L·K·d], "bias"}}.

A T5 has the prefix in its decoder's self-attention alone, which is where PEFT puts it: PEFT leaves cross-attention
without one, and gives layer i of its decoder what is stored for layer 2 i mod L. Where L is even, layers i and i + L/2
so share one prefix, and only L/2 are used: these are all that the tree then holds, in the order of the layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.t5.config import T5Config

Tree = dict[str, Any]


def depth(student: StudentConfig) -> int:
    """Prefixes of a student: one a layer, but for a T5 whose layers share them."""
    halved = isinstance(student, T5Config) and student.num_layers % 2 == 0
    return student.num_layers // 2 if halved else student.num_layers


def init(settings, student: StudentConfig, key: jax.Array, activations: Tree | None) -> Tree:
    """A new prefix.

    Args:
      activations: {"key", "value"} of P real tokens in each layer, which is where a prefix without reparametrisation
        starts (Li & Liang, section 7.4: far better than random); also the MLP's output bias, so that the
        reparametrised prefix starts near the same place.

    Raises:
      UserError: the length is not positive.
    """
    P, D = settings.length, student.hidden_size
    if P < 1:
        raise UserError(f"config.adapter.prefix.length is {P}; it must be 1 or more")
    # Layers that share a prefix start at the mean of theirs.
    activations = {
        name: own.reshape(-1, depth(student), *own.shape[1:]).mean(axis=0).astype(jnp.float32)
        for name, own in activations.items()
    }
    if not settings.reparametrize:
        return activations
    width = 2 * depth(student) * student.num_kv_heads * student.head_dim
    k_embedding, k_hidden, k_output = jax.random.split(key, 3)
    # The bias is shared by all P positions, so it starts at their mean; the MLP adds what tells them apart.
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


def key_values(settings, tree: Tree, student: StudentConfig) -> Tree:
    """Keys and values [L, P, K·d], whether they are the parameters or the MLP's output."""
    if settings.reparametrize:
        hidden = jnp.tanh(tree["embedding"] @ tree["hidden"]["kernel"] + tree["hidden"]["bias"])
        flat = hidden @ tree["output"]["kernel"] + tree["output"]["bias"]
        stacked = flat.reshape(settings.length, depth(student), 2, -1)
        tree = {"key": stacked[:, :, 0].transpose(1, 0, 2), "value": stacked[:, :, 1].transpose(1, 0, 2)}
    layers = jnp.arange(student.num_layers) % depth(student)
    return {name: own[layers] for name, own in tree.items()} if depth(student) < student.num_layers else tree
