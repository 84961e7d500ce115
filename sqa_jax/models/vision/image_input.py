"""A picture as a vision tower reads it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Picture(NamedTuple):
    """A picture in pieces, of which each becomes equally many features.

    Colours are the file's own numbers, 0 to 255: a quarter of what they take as the tower reads them.

    Attributes:
      pieces: [n, …] uint8: tiles [S, S, 3], or squares of patches; see the family's `picture`.
      rows, columns: in which its pieces or patches lie; 0 where it is one piece.
    """

    pieces: np.ndarray
    rows: int = 0
    columns: int = 0
