"""Image inputs of packed rows: cached features, or the pieces that the vision encoder takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sqa_jax.batches.batch import stack_rows
from sqa_jax.data.images import ImageStore
from sqa_jax.models.vision.image_input import ImageInputs
from sqa_jax.models.vision.registry import vision_family


@dataclasses.dataclass(frozen=True)
class ImageBatcher:
    """Looks up the images of packed rows.

    Attributes:
      images: of all questions.
      features: of all images, where the vision encoder is frozen and they are cached; None gives the pieces.
    """

    images: ImageStore
    features: Float[np.ndarray, "F D"] | None = None

    def count_features(self, tokens: Sequence[int] | np.ndarray) -> int:
        """Image tokens in a sequence."""
        return int(np.count_nonzero(np.asarray(tokens) >= self.images.vocab_size))

    def padded_capacity(self, features: int) -> int:
        """So many features, rounded up to whole pieces, to few distinct sizes, and to at least one piece."""
        per_piece = self.images.vision.features_per_piece
        pieces = max(1, -(-features // per_piece))
        step = max(1, 1 << max(0, math.ceil(math.log2(pieces)) - 3))
        return -(-pieces // step) * step * per_piece

    def add_images(self, tokens: Int[np.ndarray, "B T"], capacity: int) -> tuple[Int[np.ndarray, "B T"], ImageInputs]:
        """The same as `__call__` for the rows of a batch."""
        return stack_rows([self(row, capacity) for row in tokens])

    def position_offset(self, tokens: Sequence[int]) -> int:
        """By how much a prompt's images advance the positions of text after them beyond its number of tokens (M-RoPE)."""
        if not self.images.vision.uses_mrope:
            return 0
        _, numbers = self.images.renumber_by_row(np.asarray(tokens, np.int32))
        return sum(int((self._mrope_offsets(number)[:, 3] - 1).sum()) for number in numbers)

    def __call__(self, tokens: Sequence[int] | np.ndarray, capacity: int) -> tuple[Int[np.ndarray, " T"], ImageInputs]:
        """A row as the devices get it.

        Args:
          tokens: ids [T], image tokens by their number among those of all images.
          capacity: F, as `padded_capacity` gives it.

        Returns:
          The ids, image tokens by their number in the row, and the images of the row.
        """
        store, vision = self.images, self.images.vision
        tokens, numbers = store.renumber_by_row(np.asarray(tokens, np.int32))
        if self.features is None:
            pieces, sizes = [store.pieces_of(number) for number in numbers], store.sizes[numbers].tolist()
            family, count = vision_family(vision), capacity // vision.features_per_piece
            images = ImageInputs(encoder=family.encoder_inputs(vision, pieces, sizes, count))
        else:
            spans = [slice(*store.feature_offsets[number : number + 2]) for number in numbers]
            images = ImageInputs(features=_padded([self.features[span] for span in spans], self.features[:0], capacity))
        if vision.uses_mrope:
            offsets = [self._mrope_offsets(number) for number in numbers]
            images = images._replace(mrope_offsets=_padded(offsets, np.zeros((0, 4), np.int32), capacity))
        return tokens, images

    def _mrope_offsets(self, number: int) -> Int[np.ndarray, "F 4"]:
        vision, (_, rows, columns) = self.images.vision, self.images.sizes[number].tolist()
        return vision_family(vision).mrope_offsets(vision, rows, columns)


def _padded(parts: Sequence[np.ndarray], empty: np.ndarray, length: int) -> np.ndarray:
    """Parts like `empty` one after the other, and zeros up to a length."""
    padded = np.zeros((length, *empty.shape[1:]), empty.dtype)
    joined = np.concatenate([empty, *parts])
    padded[: len(joined)] = joined
    return padded
