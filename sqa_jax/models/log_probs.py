"""Log-probabilities of given tokens; logits exist only at their positions, and a chunk at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.models.api import StudentModel

CHUNK = 1024  # target positions of a data shard whose logits exist at one time: the loss' largest array is [CHUNK, V]


def target_log_probs(
    decoder: StudentModel,
    weights: Any,
    hidden: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    frozen: bool = True,
) -> jax.Array:
    """Log-probabilities of given tokens at given positions; logits exist only there, a chunk at a time.

    Args:
      hidden: [B, T, D] from the decoder.
      positions: [B, M] position whose hidden state predicts each target.
      targets: [B, M] ids.
      frozen: no gradient over `weights` is wanted here.

    Returns:
      [B, M] float32.
    """
    B, M = targets.shape
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    chunks = -(-B * M // (CHUNK * decoder.data_shards))
    width = -(-M // chunks)
    pad = chunks * width - M

    def in_chunks(a):  # [B, M, …] → [chunks, B, width, …]; rows stay rows, so a sharded batch stays sharded
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, chunks, width, *a.shape[2:]), 1, 0)

    log_probs_of = _frozen_log_probs if frozen else jax.checkpoint(_log_probs, static_argnums=0)
    log_probs = jax.lax.map(
        lambda chunk: log_probs_of(decoder, weights, *chunk), (in_chunks(picked), in_chunks(targets))
    )
    return jnp.moveaxis(log_probs, 0, 1).reshape(B, chunks * width)[:, :M]


def _log_probs(decoder: StudentModel, weights: Any, states: jax.Array, ids: jax.Array) -> jax.Array:
    logits = decoder.apply({"params": weights}, states, method="unembed")
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


# Where the output layer is frozen, the gradient over the states is computed while the logits are there, and the
# backward pass only weighs it: the logits are not computed twice (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
_frozen_log_probs = jax.custom_vjp(_log_probs, nondiff_argnums=(0,))


def _frozen_forward(decoder, weights, states, ids):
    log_probs, pull = jax.vjp(lambda states: _log_probs(decoder, weights, states, ids), states)
    (slopes,) = pull(jnp.ones_like(log_probs))
    return log_probs, slopes


def _frozen_backward(decoder, slopes, weight):
    return None, (weight[..., None] * slopes).astype(slopes.dtype), None


_frozen_log_probs.defvjp(_frozen_forward, _frozen_backward)
