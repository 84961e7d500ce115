"""Pictures as patches, and the tokens that hold their places in a prompt: all that is done on the host.

Patches lie as in transformers: the merge × merge patches of a feature together, row by row, and a picture's features row
by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sqa_jax.errors import UnusableImage
from sqa_jax.models.vision.image_input import ImagePatches, PreprocessedImage
from sqa_jax.models.vision.image_tokens import check_token
from sqa_jax.models.vision.qwen2_vl.config import WORDS, Qwen2VLVision

_MOST_ELONGATED = 200  # longer side of a picture by its shorter one, as transformers has it


def picture(vision: Qwen2VLVision, image: Image.Image) -> PreprocessedImage:
    """The picture, in RGB, in about its own size and proportions: pieces [n, merge², 3, patch_size, patch_size].

    Raises:
      UnusableImage: its sides are too unlike.
    """
    p, m = vision.patch_size, vision.merge
    rows, columns = _grid(vision, image.width, image.height)
    resized = np.asarray(vision.pixels.resized(image, columns * p, rows * p))
    squares = resized.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return PreprocessedImage(squares.reshape(-1, m * m, 3, p, p), rows, columns)


def _grid(vision: Qwen2VLVision, width: int, height: int) -> tuple[int, int]:
    """Patches down and across, as `smart_resize` of Qwen2-VL's code: whole features, within the bounds on pixels.

    A picture so elongated that one row of features is more than `max_pixels` allow is refused, where that code exceeds
    them: rows of a batch have no room for it.
    """

    def unusable(reason: str) -> UnusableImage:
        return UnusableImage(f"a picture of {width} × {height} pixels", reason, "crop it")

    if not 0 < max(width, height) <= _MOST_ELONGATED * min(width, height):
        raise unusable(f"one side of the image is more than {_MOST_ELONGATED} times as long as the other")
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


def coordinates(vision: Qwen2VLVision, rows: int, columns: int) -> np.ndarray:
    """Row and column of each patch of a picture, [rows · columns, 2] int32."""
    m = vision.merge
    grid = np.indices((rows, columns), np.int32).reshape(2, rows // m, m, columns // m, m)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def prompt_ids(vision: Qwen2VLVision, rows: int, columns: int, tokenizer: Any) -> list[int]:
    """What stands for the picture in a prompt: a token for each feature, between a start and an end.

    Raises:
      UserError: the tokenizer is not the model's.
    """
    for word, token in zip(WORDS, (vision.image_token, vision.vision_start, vision.vision_end), strict=True):
        check_token(tokenizer, word, token)
    count = rows * columns // vision.merge**2
    return [vision.vision_start, *[vision.image_token] * count, vision.vision_end]


def places(vision: Qwen2VLVision, rows: int, columns: int) -> np.ndarray:
    """Where a picture's features stand, [rows · columns / merge², 4] int32: see `sqa_jax.models.layers.kv_cache.ImageFeatures`.

    All of them have the time at which the picture begins, and count on from there down and across; the text goes on
    behind the largest of these numbers (section 2.1 of the paper).
    """
    down, across = rows // vision.merge, columns // vision.merge
    grid = np.zeros((down * across, 4), np.int32)
    grid[:, 1:3] = np.indices((down, across)).reshape(2, -1).T
    grid[-1, 3] = max(down, across)
    return grid


def row_arrays(
    vision: Qwen2VLVision, pieces: Sequence[np.ndarray], sizes: Sequence[Sequence[int]], room: int
) -> ImagePatches:
    """What the tower reads of a row of a batch, see `tower.see`; zeros behind the row's own.

    Args:
      pieces: the squares of patches of each of its pictures.
      sizes: pieces, rows and columns of each.
      room: squares of the row.
    """
    squares, p = vision.merge**2, vision.patch_size
    arrays = ImagePatches(
        np.zeros((room, squares, 3, p, p), np.uint8),
        np.zeros((room * squares, 2), np.int32),
        np.zeros(room * squares, np.int32),
    )
    start = 0
    for number, (own, (count, rows, columns)) in enumerate(zip(pieces, sizes, strict=True), start=1):
        arrays.pixels[start : start + count] = own
        patches = slice(start * squares, (start + count) * squares)
        arrays.coordinates[patches] = coordinates(vision, rows, columns)
        arrays.image_ids[patches] = number
        start += count
    return arrays
