"""A picture as a vision tower reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

if TYPE_CHECKING:  # the module itself needs no JAX
    import jax

    AnyArray = np.ndarray | jax.Array


class PreprocessedImage(NamedTuple):
    """A picture in pieces, of which each becomes equally many features.

    Colours are the file's own numbers, 0 to 255: a quarter of what they take as the tower reads them.

    Attributes:
      pieces: [n, …] uint8: tiles [S, S, 3], or squares of patches; see the family's `picture`.
      rows, columns: in which its pieces or patches lie; 0 where it is one piece.
    """

    pieces: np.ndarray
    rows: int = 0
    columns: int = 0


class ImageTiles(NamedTuple):
    """Input of the SigLIP encoders: square tiles of the images of each row.

    Attributes:
      pixels: n tiles of a row, colours of 0 to 255; black after the row's last.
    """

    pixels: UInt8[AnyArray, "*rows n S S 3"]


class ImagePatches(NamedTuple):
    """Input of the Qwen2-VL encoder: patches of the images of each row, in blocks of merge² = m; N = n · m patches.

    Attributes:
      pixels: n blocks of a row, colours of 0 to 255; zeros after the row's last.
      coordinates: row and column of each patch in its image.
      image_ids: number of each patch's image in the row, from 1; 0 is padding.
    """

    pixels: UInt8[AnyArray, "*rows n m 3 p p"]
    coordinates: Int[AnyArray, "*rows N 2"]
    image_ids: Int[AnyArray, "*rows N"]


class ImageInputs(NamedTuple):
    """The images of packed rows: input of the vision encoder, or features computed beforehand.

    Token V + f of a row, V being the size of the vocabulary, stands for feature f of that row.

    Attributes:
      encoder: what the encoder of the student's family computes features from; None where `features` are there.
      features: F features of each row; None where the encoder is to compute them.
      mrope_offsets: where positions of text depend on images (Qwen2-VL), see
        `sqa_jax.models.layers.kv_cache.ImageFeatures`; None elsewhere.
    """

    encoder: ImageTiles | ImagePatches | None = None
    features: Float[AnyArray, "*rows F D"] | None = None
    mrope_offsets: Int[AnyArray, "*rows F 4"] | None = None
