"""Image features of a batch's rows, by the vision encoder of the model's family."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from sqa_jax.models.vision import siglip_encoder
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.image_input import ImagePatches, ImageTiles
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision, encoder
from sqa_jax.models.vision.registry import VisionConfig


def encode_images(
    vision: VisionConfig,
    params: Any,
    inputs: ImageTiles | ImagePatches,
    compute: ComputeConfig,
    adapter: VisionAdapter = NO_VISION_ADAPTER,
    dropout: jax.Array | None = None,
) -> Float[Array, "B F D"]:
    """The features of a batch's rows.

    Args:
      params: of vision encoder and connector.
      inputs: what the family's `encoder_inputs` gives of each row, with a leading B.
      compute: dtype, rematerialisation and sharding.
      adapter: what adapters add.
      dropout: a key, or None where nothing is dropped.

    Returns:
      Features; those of padding are arbitrary, and no token refers to them.
    """
    if isinstance(vision, Qwen2VLVision):
        assert isinstance(inputs, ImagePatches)
        return encoder.encode_images(vision, params, inputs, compute, adapter, dropout)
    assert isinstance(inputs, ImageTiles)
    return siglip_encoder.encode_images(vision, params, inputs, compute, adapter, dropout)
