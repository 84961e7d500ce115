"""Grouped-query scaled dot-product attention in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dot_product_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    mask: Bool[Array, "B T S"],
    softcap: float = 0.0,
) -> Float[Array, "B T H d"]:
    """Grouped-query scaled dot-product attention, softmax in float32 (Ainslie et al. 2023, arXiv:2305.13245).

    The G query heads that share a key head are laid out as rows of one matrix product, so that keys and values are never
    repeated and the products are plain batched ones, which CPUs need to be fast.

    Args:
      query: H = G·K heads.
      mask: which keys each query attends to; a query with none (padding) gets the mean of the values, which is not used.
      softcap: as `DecoderConfig.attention_softcap`.
    """
    B, T, H, d = query.shape
    S, K = key.shape[1:3]
    G = H // K
    q = query.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    k, v = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrd,bksd->bkrs", q, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = soft_cap(scores, softcap).reshape(B, K, G, T, S)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("bkrs,bksd->bkrd", weights, v)
    return out.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


def soft_cap(x: Float[Array, "..."], softcap: float) -> Float[Array, "..."]:
    """Logit soft-capping, c · tanh(x / c), between ±c; x itself for c = 0 (Gemma 2, arXiv:2408.00118, section 2)."""
    return softcap * jnp.tanh(x / softcap) if softcap else x
