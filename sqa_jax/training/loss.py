"""The one loss: cross-entropy of the target tokens, as sums that add up over micro-batches and devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.adapters import adapter as adapters
from sqa_jax.students.modules import Module, bounded, seen

CHUNK = 1024  # target positions of a data shard whose logits exist at one time: the loss' largest array is [CHUNK, V]


def target_log_probs(
    decoder: Module, weights: Any, hidden: jax.Array, positions: jax.Array, targets: jax.Array, frozen: bool = True
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


def _log_probs(decoder: Module, weights: Any, states: jax.Array, ids: jax.Array) -> jax.Array:
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


def row_losses(
    settings, decoder: Module, adapter: Any, base: Any, batch: dict[str, jax.Array], dropout: jax.Array | None
) -> jax.Array:
    """Summed negative log-likelihood of each packed row's targets: [B] float32.

    Args:
      settings: `config.adapter`.
      batch: arrays of `sqa_jax.data.packing.pack_row`, each with a leading B.
      dropout: a key, or None where nothing is dropped.
    """
    weights = adapters.weights(adapter, base)
    decoder = bounded(decoder, batch["targets"].shape[1])
    adaptation = adapters.activate(settings, adapter, decoder.config)
    hidden, _ = decoder.apply(
        {"params": weights},
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        adaptation,
        **seen(decoder, weights, batch, adaptation, dropout),
        rngs=None if dropout is None else {"dropout": dropout},
    )
    log_probs = target_log_probs(
        decoder, weights, hidden, batch["target_positions"], batch["targets"], frozen="full" not in adapter
    )
    return -(log_probs * batch["target_mask"]).sum(axis=1)
