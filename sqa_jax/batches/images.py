"""Image inputs of packed rows: cached features, or the pieces that the vision encoder takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sqa_jax.batches.batch import stack_rows
from sqa_jax.data.images import ImageStore
from sqa_jax.models.vision.image_input import ImageInputs
from sqa_jax.models.vision.registry import vision_family


@dataclasses.dataclass(frozen=True)
class ImageBatcher:
    """Puts into batches what their rows see.

    Attributes:
      pictures: of all questions.
      features: [features of all pictures, D], where they are known already; None gives the pieces.
    """

    images: ImageStore
    features: np.ndarray | None = None

    def count(self, tokens: Sequence[int]) -> int:
        """Features in a sequence."""
        return int(np.count_nonzero(np.asarray(tokens) >= self.images.vocabulary))

    def room(self, features: int) -> int:
        """So many features, rounded up to whole pieces, few sizes, and at least one piece."""
        own = self.images.vision.features_per_piece
        pieces = max(1, -(-features // own))
        step = max(1, 1 << max(0, math.ceil(math.log2(pieces)) - 3))
        return -(-pieces // step) * step * own

    def add_images(self, tokens: np.ndarray, room: int) -> tuple[np.ndarray, ImageInputs]:
        """The same as `__call__` for the rows [B, T] of a batch."""
        return stack_rows([self(row, room) for row in tokens])

    def position_offset(self, tokens: Sequence[int]) -> int:
        """By how much a prompt's pictures take the text behind them further than its number of tokens does."""
        if not self.images.vision.uses_mrope:
            return 0
        _, numbers = self.images.renumber_by_row(np.asarray(tokens, np.int32))
        return sum(int((self._places(number)[:, 3] - 1).sum()) for number in numbers)

    def _places(self, number: int) -> np.ndarray:
        vision, (_, rows, columns) = self.images.vision, self.images.sizes[number].tolist()
        return vision_family(vision).places(vision, rows, columns)

    def __call__(self, tokens: np.ndarray, room: int) -> tuple[np.ndarray, ImageInputs]:
        """What goes to the devices with a row.

        Args:
          tokens: [T] ids, features by their number among all.
          room: F, as `room` gives it.

        Returns:
          The ids, features by their number in the row, and the images of the row.
        """
        images, vision = self.images, self.images.vision
        tokens, numbers = images.renumber_by_row(np.asarray(tokens, np.int32))
        module, sizes = vision_family(vision), images.sizes[numbers].tolist()
        if self.features is None:
            pieces = [images.pieces_of(number) for number in numbers]
            inputs = ImageInputs(encoder=module.row_arrays(vision, pieces, sizes, room // vision.features_per_piece))
        else:
            found = np.zeros((room, self.features.shape[1]), self.features.dtype)
            spans = [slice(*images.feature_offsets[number : number + 2]) for number in numbers]
            if spans:
                own = np.concatenate([self.features[span] for span in spans])
                found[: len(own)] = own
            inputs = ImageInputs(features=found)
        if vision.uses_mrope:
            places = np.zeros((room, 4), np.int32)
            if numbers:
                own = np.concatenate([self._places(number) for number in numbers])
                places[: len(own)] = own
            inputs = inputs._replace(mrope_offsets=places)
        return tokens, inputs
