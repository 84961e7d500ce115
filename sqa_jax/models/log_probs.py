"""Log-probabilities of target tokens (cross-entropy), with logits at their positions only, a chunk at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sqa_jax.models.api import StudentModel

CHUNK = 1024  # target positions per data shard whose logits exist at one time: the largest array is [CHUNK, V]


def target_log_probs(
    decoder: StudentModel,
    params: Any,
    hidden: Float[Array, "B T D"],
    positions: Int[Array, "B M"],
    targets: Int[Array, "B M"],
    frozen: bool = True,
) -> Float[Array, "B M"]:
    """Log-probabilities of target tokens; logits exist only at their positions, a chunk at a time.

    Args:
      hidden: the model's normed hidden states.
      positions: of the token whose hidden state predicts each target.
      targets: ids.
      frozen: the output layer needs no gradient here.

    Returns:
      float32.
    """
    B, M = targets.shape
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    chunks = -(-B * M // (CHUNK * decoder.data_shards))
    width = -(-M // chunks)
    pad = chunks * width - M

    def in_chunks(a):  # [B, M, …] → [chunks, B, width, …]: the batch dimension and its sharding stay
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, chunks, width, *a.shape[2:]), 1, 0)

    log_probs_of = _frozen_log_probs if frozen else jax.checkpoint(_log_probs, static_argnums=0)
    log_probs = jax.lax.map(
        lambda chunk: log_probs_of(decoder, params, *chunk), (in_chunks(picked), in_chunks(targets))
    )
    return jnp.moveaxis(log_probs, 0, 1).reshape(B, chunks * width)[:, :M]


def _log_probs(
    decoder: StudentModel, params: Any, states: Float[Array, "B width D"], ids: Int[Array, "B width"]
) -> Float[Array, "B width"]:
    logits = decoder.apply({"params": params}, states, method="unembed")
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


# With a frozen output layer, the gradient over the states is computed in the forward pass, while the logits exist, and
# the backward pass only scales it: logits are not recomputed (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
_frozen_log_probs = jax.custom_vjp(_log_probs, nondiff_argnums=(0,))


def _frozen_forward(decoder, params, states, ids):
    log_probs, vjp = jax.vjp(lambda states: _log_probs(decoder, params, states, ids), states)
    (gradient,) = vjp(jnp.ones_like(log_probs))
    return log_probs, gradient


def _frozen_backward(decoder, gradient, d_log_probs):
    return None, (d_log_probs[..., None] * gradient).astype(gradient.dtype), None


_frozen_log_probs.defvjp(_frozen_forward, _frozen_backward)
