"""Rotary position embeddings: sines and cosines, their application, and multimodal positions (M-RoPE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sqa_jax.models.rope_frequencies import Rope


def rope_sin_cos(
    positions: Int[Array, "B T"] | Int[Array, "B T 3"], head_dim: int, rope: Rope | None, sections: tuple[int, ...] = ()
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Sines and cosines of rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 15).

    Args:
      positions: [B, T]; with `sections` [B, T, 3], in time, row and column.
      rope: frequencies; None is no rotation (NoPE).
      sections: how many of a head's pairs rotate by time, row and column (Wang et al. 2024, arXiv:2409.12191, M-RoPE).

    Returns:
      Two float32 arrays [B, T, head_dim / 2].
    """
    frequencies = np.zeros(head_dim // 2, np.float32) if rope is None else rope.frequencies(head_dim)
    positions = positions[..., np.repeat(np.arange(3), sections)] if sections else positions[..., None]
    angles = positions.astype(jnp.float32) * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def apply_rope(
    x: Float[Array, "B T heads d"], sin: Float[Array, "B T half"], cos: Float[Array, "B T half"]
) -> Float[Array, "B T heads d"]:
    """Rotates the pairs (x_i, x_{i + d/2}) of each head by the angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = sin[:, :, None, :], cos[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def mrope_positions(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    first_feature: int,
    mrope_offsets: Int[Array, "B F 4"],
) -> Int[Array, "B T 3"]:
    """Multimodal positions in time, row and column (Wang et al. 2024, arXiv:2409.12191, section 2.1, M-RoPE).

    The features of an image are at the position where it begins, plus their row and column; the text after it continues
    after the larger of its sides, however many features it has.

    Args:
      tokens, positions, segments: as in `Decoder.__call__`. Images are in the trunk of a segment.
      first_feature: V; tokens from this one on are image features.
      mrope_offsets: as `sqa_jax.models.layers.kv_cache.ImageFeatures.mrope_offsets`.
    """
    is_feature = (tokens >= first_feature)[..., None]
    index = jnp.clip(tokens - first_feature, 0, mrope_offsets.shape[1] - 1)[..., None]
    offsets = jnp.where(is_feature, jnp.take_along_axis(mrope_offsets, index, axis=1), 0)
    # How far images have shifted the text's positions beyond one per token, before each token of the row, and of its
    # segment.
    shift = jnp.where(is_feature[..., 0], offsets[..., 3] - 1, 0)
    before = jnp.cumsum(shift, axis=1) - shift
    opens = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    column = jnp.arange(tokens.shape[1])
    opening = jax.lax.cummax(jnp.where(opens, column, 0), axis=1)
    before -= jnp.take_along_axis(before, opening, axis=1)
    return (positions + before)[..., None] + offsets[..., :3]
