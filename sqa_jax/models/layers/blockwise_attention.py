"""Attention of whole rows in blocks of queries, with a backward pass that keeps no scores.

Plain JAX, for where no fused kernel is. A causal block sees no keys behind it, which halves the work of long rows; of the
scores only each query's log-sum-exp is kept, and the backward pass computes them again from it (Dao 2023,
arXiv:2307.08691, algorithm 2, with all of a block's keys at once).

Shapes in comments: B rows, T queries, S keys, t queries of a block, s keys that it sees, K key heads, G query heads
of each, d head width. Queries lie as [B, K, T·G, d], so that a block of them is one matrix a key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sqa_jax.models.layers.attention import soft_cap

# Queries of a row that are worth splitting, least queries of a block, and most blocks, which take long to compile.
_LONG, _BLOCK, _BLOCKS = 256, 64, 8
SAVED = "attention"  # name under which attention's results are kept for the backward pass


def blockwise_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float = 0.0, causal: bool = True
) -> jax.Array:
    """`attention.dot_product_attention`, whose arguments and shapes these are.

    Args:
      causal: the queries are the last T of the S places, and none sees a later one.
    """
    B, T, H, d = query.shape
    K = key.shape[2]
    q = (query * d**-0.5).reshape(B, T, K, H // K, d).swapaxes(1, 2).reshape(B, K, -1, d)
    out = _attend(q, key.swapaxes(1, 2), value.swapaxes(1, 2), visible, softcap, causal)
    return out.reshape(B, K, T, H // K, d).swapaxes(1, 2).reshape(B, T, H, d)


def _blocks(q: jax.Array, visible: jax.Array, causal: bool) -> Iterator[tuple[slice, int, jax.Array]]:
    """Of each block its rows of `q`, how many keys it sees, and which of them, [B, 1, t, 1, s]."""
    T, S = visible.shape[1:]
    block = max(_BLOCK, -(-T // _BLOCKS)) if T >= _LONG else T
    G = q.shape[2] // T
    for start in range(0, T, block):
        stop = min(start + block, T)
        seen = S - T + stop if causal else S
        yield slice(start * G, stop * G), seen, visible[:, None, start:stop, None, :seen]


def _scores(q: jax.Array, key: jax.Array, visible: jax.Array, softcap: float) -> jax.Array:
    """[B, K, t·G, s] in float32."""
    scores = soft_cap(jnp.einsum("bkrd,bksd->bkrs", q, key, preferred_element_type=jnp.float32), softcap)
    B, K, rows, s = scores.shape
    split = scores.reshape(B, K, visible.shape[2], -1, s)
    return jnp.where(visible, split, jnp.finfo(jnp.float32).min).reshape(scores.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float, causal: bool
) -> jax.Array:
    return _forward(q, key, value, visible, softcap, causal)[0]


def _forward(q, key, value, visible, softcap, causal):
    outs, sums = [], []
    for rows, seen, sight in _blocks(q, visible, causal):
        scores = _scores(q[:, :, rows], key[:, :, :seen], sight, softcap)
        most = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bkrs,bksd->bkrd", weights.astype(value.dtype), value[:, :, :seen])
        outs.append((out / total).astype(value.dtype))
        sums.append(most + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=2), SAVED)
    log_sum = checkpoint_name(jnp.concatenate(sums, axis=2), SAVED)
    return out, (q, key, value, visible, out, log_sum)


def _backward(softcap, causal, saved, d_out):
    q, key, value, visible, out, log_sum = saved
    own = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    d_q, d_key, d_value = [], jnp.zeros_like(key), jnp.zeros_like(value)
    for rows, seen, sight in _blocks(q, visible, causal):
        k, v, d_o = key[:, :, :seen], value[:, :, :seen], d_out[:, :, rows]
        scores = _scores(q[:, :, rows], k, sight, softcap)
        weights = jnp.exp(scores - log_sum[:, :, rows])
        d_weights = jnp.einsum("bkrd,bksd->bkrs", d_o, v, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - own[:, :, rows])
        if softcap:  # the derivative of the cap, from what it gave; hidden keys, far below it, have no weight
            d_scores *= 1 - (jnp.maximum(scores, -softcap) / softcap) ** 2
        d_scores = d_scores.astype(key.dtype)
        d_q.append(jnp.einsum("bkrs,bksd->bkrd", d_scores, k))
        d_key = d_key.at[:, :, :seen].add(jnp.einsum("bkrs,bkrd->bksd", d_scores, q[:, :, rows]))
        d_value = d_value.at[:, :, :seen].add(jnp.einsum("bkrs,bkrd->bksd", weights.astype(value.dtype), d_o))
    return jnp.concatenate(d_q, axis=2), d_key, d_value, None


_attend.defvjp(_forward, _backward)
