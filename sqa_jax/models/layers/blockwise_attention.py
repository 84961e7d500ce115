"""Blockwise (flash) attention in plain JAX: blocks of queries, and a backward pass that keeps no scores.

For where there is no fused kernel. A causal block computes no scores of later keys, which halves the work of long rows;
of the scores only each query's log-sum-exp is kept, and the backward pass recomputes them from it (Dao 2023,
arXiv:2307.08691, algorithm 2, with all of a block's keys at once).

Shapes: B rows, T queries, S keys, t queries of a block, s keys that it attends to, K key heads, G query heads of each,
d head width. Queries are laid out as [B, K, T·G, d], so that a block of them is one matrix per key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from sqa_jax.models.layers.attention import soft_cap

# Queries of a row from which on they are split; least queries of a block; and most blocks, which take long to compile.
_MIN_LENGTH, _MIN_BLOCK, _MAX_BLOCKS = 256, 64, 8
SAVED = "attention"  # name under which rematerialisation keeps attention's results


def blockwise_attention(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    mask: Bool[Array, "B T S"],
    softcap: float = 0.0,
    causal: bool = True,
) -> Float[Array, "B T H d"]:
    """`sqa_jax.models.layers.attention.dot_product_attention` with less memory; the same arguments and results.

    Args:
      causal: the queries are the last T of the S slots, and the mask hides later keys from all of them.
    """
    B, T, H, d = query.shape
    K = key.shape[2]
    q = (query * d**-0.5).reshape(B, T, K, H // K, d).swapaxes(1, 2).reshape(B, K, -1, d)
    out: Any = _attend(q, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, softcap, causal)
    return out.reshape(B, K, T, H // K, d).swapaxes(1, 2).reshape(B, T, H, d)


def _blocks(q: jax.Array, mask: jax.Array, causal: bool) -> Iterator[tuple[slice, int, jax.Array]]:
    """Of each block its rows of `q`, the number s of keys to attend to, and its part of the mask, [B, 1, t, 1, s]."""
    T, S = mask.shape[1:]
    block = max(_MIN_BLOCK, -(-T // _MAX_BLOCKS)) if T >= _MIN_LENGTH else T
    G = q.shape[2] // T
    for start in range(0, T, block):
        stop = min(start + block, T)
        num_keys = S - T + stop if causal else S
        yield slice(start * G, stop * G), num_keys, mask[:, None, start:stop, None, :num_keys]


def _scores(q: jax.Array, key: jax.Array, mask: jax.Array, softcap: float) -> Float[Array, "B K tG s"]:
    scores = soft_cap(jnp.einsum("bkrd,bksd->bkrs", q, key, preferred_element_type=jnp.float32), softcap)
    B, K, _, s = scores.shape
    split = scores.reshape(B, K, mask.shape[2], -1, s)
    return jnp.where(mask, split, jnp.finfo(jnp.float32).min).reshape(scores.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, softcap: float, causal: bool) -> jax.Array:
    return _forward(q, key, value, mask, softcap, causal)[0]


def _forward(q, key, value, mask, softcap, causal):
    outs, log_sums = [], []
    for rows, num_keys, block_mask in _blocks(q, mask, causal):
        scores = _scores(q[:, :, rows], key[:, :, :num_keys], block_mask, softcap)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bkrs,bksd->bkrd", weights.astype(value.dtype), value[:, :, :num_keys])
        outs.append((out / total).astype(value.dtype))
        log_sums.append(largest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=2), SAVED)
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=2), SAVED)
    return out, (q, key, value, mask, out, log_sum)


def _backward(softcap, causal, saved, d_out):
    q, key, value, mask, out, log_sum = saved
    delta = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)  # D of Dao 2023
    d_q, d_key, d_value = [], jnp.zeros_like(key), jnp.zeros_like(value)
    for rows, num_keys, block_mask in _blocks(q, mask, causal):
        k, v, d_o = key[:, :, :num_keys], value[:, :, :num_keys], d_out[:, :, rows]
        scores = _scores(q[:, :, rows], k, block_mask, softcap)
        weights = jnp.exp(scores - log_sum[:, :, rows])
        d_weights = jnp.einsum("bkrd,bksd->bkrs", d_o, v, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - delta[:, :, rows])
        if softcap:  # derivative of the cap, from its result; masked scores, far below it, have no weight
            d_scores *= 1 - (jnp.maximum(scores, -softcap) / softcap) ** 2
        d_scores = d_scores.astype(key.dtype)
        d_q.append(jnp.einsum("bkrs,bksd->bkrd", d_scores, k))
        d_key = d_key.at[:, :, :num_keys].add(jnp.einsum("bkrs,bkrd->bksd", d_scores, q[:, :, rows]))
        d_value = d_value.at[:, :, :num_keys].add(jnp.einsum("bkrs,bkrd->bksd", weights.astype(value.dtype), d_o))
    return jnp.concatenate(d_q, axis=2), d_key, d_value, None


_attend.defvjp(_forward, _backward)
