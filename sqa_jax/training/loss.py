"""The loss: cross-entropy of the target tokens, summed, so that it adds up over micro-batches and devices."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from sqa_jax import adapters
from sqa_jax.batches.batch import Batch
from sqa_jax.models.api import StudentModel, extra_model_inputs
from sqa_jax.models.log_probs import target_log_probs


def row_losses(
    settings, decoder: StudentModel, adapter: Any, base: Any, batch: Batch, dropout: jax.Array | None
) -> Float[Array, " B"]:
    """Summed negative log-likelihood of each packed row's targets: [B] float32.

    Args:
      settings: `config.adapter`.
      batch: packed rows [B, …].
      dropout: PRNG key, or None without dropout.
    """
    params = adapters.model_params(adapter, base)
    decoder = decoder.with_max_decoder_tokens(batch.targets.shape[1])
    adaptation = adapters.adapter_inputs(settings, adapter, decoder.config)
    hidden, _ = decoder.apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segments,
        adaptation,
        **extra_model_inputs(decoder, params, adaptation, batch.branches, batch.images, dropout),
        rngs=None if dropout is None else {"dropout": dropout},
    )
    log_probs = target_log_probs(
        decoder, params, hidden, batch.target_positions, batch.targets, frozen="full" not in adapter
    )
    return -(log_probs * batch.target_mask).sum(axis=1)
