"""Input of the vision encoders: an image after preprocessing, and the images of packed rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8


class PreprocessedImage(NamedTuple):
    """An image after preprocessing, in pieces that become equally many features each.

    Pixels are uint8 as in the file, a quarter of the bytes of the encoder's float32 input: the encoder normalizes them.

    Attributes:
      pieces: tiles [n, S, S, 3], or blocks of patches [n, merge², 3, p, p]; see the family's `preprocess_image`.
      rows, columns: of the grid of tiles, or of patches; 0 where the image is one piece.
    """

    pieces: UInt8[np.ndarray, "n ..."]
    rows: int = 0
    columns: int = 0


class ImageTiles(NamedTuple):
    """Input of the SigLIP encoders: square tiles of the images of each row.

    Attributes:
      pixels: n tiles of a row, colours of 0 to 255; black after the row's last.
    """

    pixels: UInt8[Any, "*rows n S S 3"]


class ImagePatches(NamedTuple):
    """Input of the Qwen2-VL encoder: patches of the images of each row, in blocks of merge² = m; N = n · m patches.

    Attributes:
      pixels: n blocks of a row, colours of 0 to 255; zeros after the row's last.
      coordinates: row and column of each patch in its image.
      image_ids: number of each patch's image in the row, from 1; 0 is padding.
    """

    pixels: UInt8[Any, "*rows n m 3 p p"]
    coordinates: Int[Any, "*rows N 2"]
    image_ids: Int[Any, "*rows N"]


class ImageInputs(NamedTuple):
    """The images of packed rows: input of the vision encoder, or features computed beforehand.

    Arrays are NumPy's on the host and JAX's on devices.

    Token V + f of a row, V being the size of the vocabulary, stands for feature f of that row.

    Attributes:
      encoder: what the encoder of the student's family computes features from; None where `features` are there.
      features: F features of each row; None where the encoder is to compute them.
      mrope_offsets: where positions of text depend on images (Qwen2-VL), see
        `sqa_jax.models.layers.kv_cache.ImageFeatures`; None elsewhere.
    """

    encoder: ImageTiles | ImagePatches | None = None
    features: Float[Any, "*rows F D"] | None = None
    mrope_offsets: Int[Any, "*rows F 4"] | None = None
