"""Layers of T5's encoder and decoder: attention with relative position buckets, MLPs, blocks, and their stacks.

Shapes: B rows, T tokens of a row, M slots of the decoder, S keys, D hidden, H heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sqa_jax.models.layers.blockwise_attention import SAVED
from sqa_jax.models.layers.kv_cache import (
    prepend_prefix_kv,
    read_kv,
    write_kv,
)
from sqa_jax.models.layers.linear import KV, Linear, RMSNorm, scan_layers
from sqa_jax.models.t5.config import T5Config


@functools.cache
def distance_buckets(bidirectional: bool, buckets: int, max_distance: int) -> Int[np.ndarray, " distances"]:
    """Relative position buckets of the distances -max_distance, …, max_distance (key minus query).

    Near distances have a bucket each, farther ones share logarithmically wider ones (Raffel et al. 2020, section 2.1,
    with the rounding of the reference implementation, float32); those beyond `max_distance` the last one. In a causal
    stack, all later keys are in bucket 0.
    """
    relative = np.arange(-max_distance, max_distance + 1)
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets * (relative > 0)
        distance = np.abs(relative)
    else:
        distance = np.maximum(-relative, 0)
    near = buckets // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(near))
    scale = np.float32(np.log(max_distance / near))
    far = near + (ratio / scale * np.float32(buckets - near)).astype(np.int32)
    return offset + np.where(distance < near, distance, np.minimum(far, buckets - 1))


def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S H d"],
    value: Float[Array, "B S H d"],
    bias: Float[Array, "#B H T S"] | None,
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H d"]:
    """Unscaled dot-product attention with a position bias added to the scores; softmax in float32.

    A query whose keys are all masked (padding) gets the mean of the values, which is not used.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bhts,bhsd->bhtd", weights, v).swapaxes(1, 2), SAVED)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are computed separately: they may come from the encoder or a cache."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    def setup(self):
        inner = self.config.num_heads * self.config.head_dim
        self.q, self.k, self.v = (Linear(inner, False, self.dtype, self.lora_dropout) for _ in range(3))
        self.o = Linear(self.config.hidden_size, False, self.dtype, self.lora_dropout)

    def keys_and_values(self, x: jax.Array, lora: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] → two of [B, S, H, d]."""
        return self._heads(self.k(x, lora.get("k"))), self._heads(self.v(x, lora.get("v")))

    def __call__(self, x, key, value, bias, mask, lora: dict[str, Any]) -> jax.Array:
        out = attend(self._heads(self.q(x, lora.get("q"))), key, value, bias, mask)
        return self.o(out.reshape(*x.shape[:2], -1), lora.get("o"))

    def _heads(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)


class MLP(nn.Module):
    """Gated MLP, wo(gelu(wi_0(x)) · wi_1(x)) (Shazeer 2020, arXiv:2002.05202, GEGLU), or wo(relu(wi(x)))."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, lora: dict[str, Any]) -> jax.Array:
        c = self.config

        def linear(name, features, y):
            return Linear(features, False, self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        if c.gated:
            y = nn.gelu(linear("wi_0", c.intermediate_size, x)) * linear("wi_1", c.intermediate_size, x)
        else:
            y = nn.relu(linear("wi", c.intermediate_size, x))
        return linear("wo", c.hidden_size, y)


class EncoderBlock(nn.Module):
    """One encoder layer, with the signature of `nn.scan`: (carry, this layer's inputs, inputs shared by all layers)."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x, lora, bias_and_mask):
        c, attention_lora = self.config, lora.get("self_attn", {})
        attention = Attention(c, self.dtype, self.lora_dropout, name="self_attn")
        y = RMSNorm(c.norm_epsilon, name="self_attn_layernorm")(x)
        key, value = attention.keys_and_values(y, attention_lora)
        bias, mask = bias_and_mask
        x += attention(y, key, value, bias, mask, attention_lora)
        y = RMSNorm(c.norm_epsilon, name="mlp_layernorm")(x)
        return x + MLP(c, self.dtype, self.lora_dropout, name="mlp")(y, lora.get("mlp", {})), None


class DecoderContext(NamedTuple):
    """Inputs that all decoder layers share.

    Attributes:
      encoded: [B, T, D] the encoder's output; None where its keys and values are in the cache.
      bias: [B, H, M, S] position bias of self-attention.
      self_mask, cross_mask: [B, M, S] and [B, M, T], masks of self- and cross-attention.
      slots: [B, M] where new keys and values go in the cache.
    """

    encoded: jax.Array | None
    bias: jax.Array
    self_mask: jax.Array
    cross_mask: jax.Array
    slots: jax.Array | None


class DecoderBlock(nn.Module):
    """One decoder layer, with the signature of `nn.scan`."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, carry, inputs, context: DecoderContext):
        (x, cache), (layer, lora, prefix) = carry, inputs
        c = self.config
        self_lora, cross_lora = lora.get("self_attn", {}), lora.get("cross_attn", {})
        attention = Attention(c, self.dtype, self.lora_dropout, name="self_attn")
        cross = Attention(c, self.dtype, self.lora_dropout, name="cross_attn")
        y = RMSNorm(c.norm_epsilon, name="self_attn_layernorm")(x)
        key, value = attention.keys_and_values(y, self_lora)
        if cache is None:
            assert context.encoded is not None
            encoded = cross.keys_and_values(context.encoded, cross_lora)
            self.sow(KV, "of_decoder", (key, value))
            self.sow(KV, "of_encoder", encoded)
            key, value = prepend_prefix_kv(prefix, key, value)
        else:
            assert context.slots is not None
            cache = write_kv(cache, layer, jnp.arange(len(x)), context.slots, key, value)
            # Each slot of the cache holds keys and values of either the encoder's output or the decoder's tokens.
            key, value = encoded = read_kv(cache, layer, None, context.self_mask.shape[-1], self.dtype)
        x += attention(y, key, value, context.bias, context.self_mask, self_lora)
        y = RMSNorm(c.norm_epsilon, name="cross_attn_layernorm")(x)
        x += cross(y, *encoded, None, context.cross_mask, cross_lora)
        y = RMSNorm(c.norm_epsilon, name="mlp_layernorm")(x)
        x += MLP(c, self.dtype, self.lora_dropout, name="mlp")(y, lora.get("mlp", {}))
        return (x, cache), None


class Stack(nn.Module):
    """The layers of the encoder or of the decoder, the position bias that they share, and the final norm."""

    block: type[nn.Module]
    depth: int
    config: T5Config
    dtype: Any
    remat: str
    lora_dropout: float

    def setup(self):
        c = self.config
        self.relative_attention_bias = nn.Embed(c.num_buckets, c.num_heads)
        self.layers = scan_layers(self.block, self.depth, self.remat)(c, self.dtype, self.lora_dropout)
        self.norm = RMSNorm(c.norm_epsilon)

    def bias(self, relative: Int[Array, "B T S"], bidirectional: bool) -> Float[Array, "B H T S"]:
        """Position bias of each head's scores, from relative positions, key minus query."""
        c = self.config
        buckets = jnp.asarray(distance_buckets(bidirectional, c.num_buckets, c.max_distance))
        by_distance = self.relative_attention_bias(buckets)
        index = jnp.clip(relative, -c.max_distance, c.max_distance) + c.max_distance
        return jnp.moveaxis(by_distance[index], -1, 1)

    def __call__(self, carry, inputs, shared):
        return self.layers(carry, inputs, shared)[0]
