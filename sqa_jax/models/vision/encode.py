"""From what a batch's rows hold of pictures to features, by the tower of the student's family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from sqa_jax.models.vision import siglip_encoder
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision, encoder
from sqa_jax.models.vision.registry import Vision

_PIECES = {"tiles", "patches"}  # what `row_arrays` of the families calls the pieces


def has_image_inputs(batch: Mapping[str, jax.Array]) -> bool:
    """Whether a batch holds what a tower reads."""
    return not _PIECES.isdisjoint(batch)


def encode_images(
    vision: Vision,
    params: Any,
    batch: Mapping[str, jax.Array],
    how: ComputeConfig,
    adaptation: VisionAdapter = NO_VISION_ADAPTER,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """The features of a batch's rows.

    Args:
      params: of tower and connector.
      batch: what `row_arrays` made of each row, with the rows in front.
      how: it computes.
      adaptation: what adapters add.
      dropout: a key, or None where nothing is dropped.

    Returns:
      [B, F, D]; those of no picture are something that nobody reads.
    """
    own = encoder if isinstance(vision, Qwen2VLVision) else siglip_encoder
    return own.encode_images(vision, params, batch, how, adaptation, dropout)
