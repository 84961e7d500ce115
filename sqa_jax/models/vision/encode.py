"""From what a batch's rows hold of pictures to features, by the tower of the student's family."""

from __future__ import annotations

from typing import Any

import jax

from sqa_jax.models.vision import siglip_encoder
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.image_input import ImagePatches, ImageTiles
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision, encoder
from sqa_jax.models.vision.registry import VisionConfig


def encode_images(
    vision: VisionConfig,
    params: Any,
    inputs: ImageTiles | ImagePatches,
    how: ComputeConfig,
    adaptation: VisionAdapter = NO_VISION_ADAPTER,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """The features of a batch's rows.

    Args:
      params: of tower and connector.
      inputs: what `row_arrays` of the family gives of each row, with a leading B.
      how: it computes.
      adaptation: what adapters add.
      dropout: a key, or None where nothing is dropped.

    Returns:
      [B, F, D]; those of no picture are something that nobody reads.
    """
    own = encoder if isinstance(vision, Qwen2VLVision) else siglip_encoder
    return own.encode_images(vision, params, inputs, how, adaptation, dropout)
