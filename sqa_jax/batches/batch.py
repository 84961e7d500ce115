"""Named arrays of packed rows: what the data pipeline hands to training, validation and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from sqa_jax.models.vision.image_input import ImageInputs


class Batch(NamedTuple):
    """Packed rows; a pytree, whose absent parts are None. See `sqa_jax.batches.packing` for a row with its values.

    Arrays are NumPy's on the host and JAX's on devices. The leading dimensions `rows` are: none for a single row
    (`pack_row`), [B] for a micro-batch (`row_losses`), [A, B] for the A micro-batches of an optimizer step
    (`make_loader`). T is tokens of a row, M targets of a row.

    Attributes:
      tokens: ids; those from the size of the vocabulary on stand for features of the row's images, negative ones for
        soft prompt tokens.
      segments: number of the sequence that each token belongs to, from 1; 0 is padding.
      positions: of each token in its sequence.
      target_positions: position in the row of the token whose hidden state predicts each target.
      targets: ids of the target tokens.
      target_mask: 1 for a target, 0 for padding.
      branches: where a sequence forks or its prompt is attended to bidirectionally (prefix LM); see
        `sqa_jax.models.layers.masks.attention_mask`.
      images: of the rows, for vision-language models.
    """

    tokens: Int[Any, "*rows T"]
    segments: Int[Any, "*rows T"]
    positions: Int[Any, "*rows T"]
    target_positions: Int[Any, "*rows M"]
    targets: Int[Any, "*rows M"]
    target_mask: Float[Any, "*rows M"]
    branches: Int[Any, "*rows T"] | None = None
    images: ImageInputs | None = None


Rows = TypeVar("Rows")


def stack_rows(rows: Sequence[Rows]) -> Rows:
    """Stacks pytrees of NumPy arrays of one structure along a new leading dimension."""
    import jax

    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def empty_like(row: Rows) -> Rows:
    """A row of the same shape that is all padding and has no target."""
    import jax

    return jax.tree.map(np.zeros_like, row)
