"""Image preprocessing of Qwen2-VL on the host: patches, tokens in a prompt, and M-RoPE positions.

Patches are in transformers' order: the merge × merge patches of a feature together, row by row, and an image's features
row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from sqa_jax.errors import UnusableImage
from sqa_jax.models.vision.image_input import ImagePatches, PreprocessedImage
from sqa_jax.models.vision.image_tokens import check_token
from sqa_jax.models.vision.qwen2_vl.config import SPECIAL_TOKENS, Qwen2VLVision

_MAX_ASPECT_RATIO = 200  # as in transformers


def preprocess_image(vision: Qwen2VLVision, image: Image.Image) -> PreprocessedImage:
    """An RGB image, resized to about its size and aspect ratio: pieces [n, merge², 3, patch_size, patch_size].

    Raises:
      UnusableImage: its aspect ratio is too extreme.
    """
    p, m = vision.patch_size, vision.merge
    rows, columns = _grid(vision, image.width, image.height)
    resized = np.asarray(vision.pixels.resize(image, columns * p, rows * p))
    squares = resized.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return PreprocessedImage(squares.reshape(-1, m * m, 3, p, p), rows, columns)


def _grid(vision: Qwen2VLVision, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of patches, as `smart_resize` of Qwen2-VL's code: whole features, within the bounds on pixels.

    An image so elongated that one row of features exceeds `max_pixels` is refused, where that code exceeds them: it
    would not fit rows of a batch.
    """

    def unusable(reason: str) -> UnusableImage:
        return UnusableImage(f"an image of {width} × {height} pixels", reason, "crop it")

    if not 0 < max(width, height) <= _MAX_ASPECT_RATIO * min(width, height):
        raise unusable(f"one side of the image is more than {_MAX_ASPECT_RATIO} times as long as the other")
    side = vision.patch_size * vision.merge
    down, across = round(height / side), round(width / side)
    if down * across * side**2 > vision.max_pixels:
        shrunk = math.sqrt(height * width / vision.max_pixels)
        down, across = (max(1, math.floor(length / shrunk / side)) for length in (height, width))
    elif down * across * side**2 < vision.min_pixels:
        grown = math.sqrt(vision.min_pixels / (height * width))
        down, across = (math.ceil(length * grown / side) for length in (height, width))
    if down * across * side**2 > vision.max_pixels:
        raise unusable(f"the image is too elongated for {vision.max_pixels} pixels")
    return down * vision.merge, across * vision.merge


def coordinates(vision: Qwen2VLVision, rows: int, columns: int) -> Int[np.ndarray, "N 2"]:
    """Row and column of each patch of an image."""
    m = vision.merge
    grid = np.indices((rows, columns), np.int32).reshape(2, rows // m, m, columns // m, m)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def prompt_ids(vision: Qwen2VLVision, rows: int, columns: int, tokenizer: Any) -> list[int]:
    """An image's tokens in a prompt: one for each feature, between a start and an end.

    Raises:
      UserError: the tokenizer is not the model's.
    """
    for token, expected_id in zip(
        SPECIAL_TOKENS, (vision.image_token, vision.vision_start, vision.vision_end), strict=True
    ):
        check_token(tokenizer, token, expected_id)
    count = rows * columns // vision.merge**2
    return [vision.vision_start, *[vision.image_token] * count, vision.vision_end]


def mrope_offsets(vision: Qwen2VLVision, rows: int, columns: int) -> Int[np.ndarray, "F 4"]:
    """M-RoPE positions of an image's features, F = rows · columns / merge²: see `sqa_jax.models.layers.kv_cache.ImageFeatures`.

    All of them have the temporal position at which the image begins, and count rows and columns from there; text goes
    on after the largest of these positions (section 2.1 of the paper).
    """
    down, across = rows // vision.merge, columns // vision.merge
    grid = np.zeros((down * across, 4), np.int32)
    grid[:, 1:3] = np.indices((down, across)).reshape(2, -1).T
    grid[-1, 3] = max(down, across)
    return grid


def encoder_inputs(
    vision: Qwen2VLVision, pieces: Sequence[np.ndarray], grids: Sequence[Sequence[int]], capacity: int
) -> ImagePatches:
    """The encoder's input for a packed row, zeros after the row's last patch.

    Args:
      pieces: the blocks of patches of each of the row's images.
      grids: blocks, rows and columns of each.
      capacity: blocks of the row.
    """
    block, p = vision.merge**2, vision.patch_size
    inputs = ImagePatches(
        pixels=np.zeros((capacity, block, 3, p, p), np.uint8),
        coordinates=np.zeros((capacity * block, 2), np.int32),
        image_ids=np.zeros(capacity * block, np.int32),
    )
    start = 0
    for number, (blocks, (count, rows, columns)) in enumerate(zip(pieces, grids, strict=True), start=1):
        inputs.pixels[start : start + count] = blocks
        patches = slice(start * block, (start + count) * block)
        inputs.coordinates[patches] = coordinates(vision, rows, columns)
        inputs.image_ids[patches] = number
        start += count
    return inputs
