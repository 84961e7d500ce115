"""Examples of like length in one batch, as the Trainer's `group_by_length` forms them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_by_length(batches: Sequence[Sequence[dict]]) -> list[list[dict]]:
    """The examples of all batches in as many batches of like length, in random order.

    The Trainer, too, sorts what fifty batches hold.
    """
    pool = sorted((example for batch in batches for example in batch), key=lambda example: len(example["tokens"]))
    parts = np.array_split(np.arange(len(pool)), len(batches))
    return [[pool[k] for k in parts[index]] for index in np.random.default_rng(0).permutation(len(parts))]
