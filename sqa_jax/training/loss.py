"""The one loss: cross-entropy of the target tokens, as sums that add up over micro-batches and devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.adapters import adapter as adapters
from sqa_jax.students.decoder import Decoder

CHUNK = 1024  # target positions of a data shard whose logits exist at one time: the loss' largest array is [CHUNK, V]


def target_log_probs(
    decoder: Decoder, weights: Any, hidden: jax.Array, positions: jax.Array, targets: jax.Array
) -> jax.Array:
    """Log-probabilities of given tokens at given positions; logits exist only there, a chunk at a time.

    Args:
      hidden: [B, T, D] from the decoder.
      positions: [B, M] position whose hidden state predicts each target.
      targets: [B, M] ids.

    Returns:
      [B, M] float32.
    """
    B, M = targets.shape
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    width = max(1, min(M, CHUNK * decoder.data_shards // B))
    chunks = -(-M // width)
    pad = chunks * width - M

    def in_chunks(a):  # [B, M, …] → [chunks, B, width, …]; rows stay rows, so a sharded batch stays sharded
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, chunks, width, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(chunk):
        states, ids = chunk
        logits = decoder.apply({"params": weights}, states, method="unembed")
        return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)

    log_probs = jax.lax.map(of_chunk, (in_chunks(picked), in_chunks(targets)))
    return jnp.moveaxis(log_probs, 0, 1).reshape(B, chunks * width)[:, :M]


def row_losses(
    settings, decoder: Decoder, adapter: Any, base: Any, batch: dict[str, jax.Array], dropout: jax.Array | None
) -> jax.Array:
    """Summed negative log-likelihood of each packed row's targets: [B] float32.

    Args:
      settings: `config.adapter`.
      batch: arrays of `sqa_jax.data.packing.pack_row`, each with a leading B.
      dropout: a key, or None where nothing is dropped.
    """
    weights = adapters.weights(adapter, base)
    hidden, _ = decoder.apply(
        {"params": weights},
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        adapters.activate(settings, adapter, decoder.config),
        rngs=None if dropout is None else {"dropout": dropout},
    )
    log_probs = target_log_probs(decoder, weights, hidden, batch["target_positions"], batch["targets"])
    return -(log_probs * batch["target_mask"]).sum(axis=1)
