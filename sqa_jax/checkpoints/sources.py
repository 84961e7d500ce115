"""Weights in files, whatever their format: names, shapes, and rows on demand."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sqa_jax.checkpoints.gguf.source import GGUFSource
from sqa_jax.checkpoints.safetensors_source import SafetensorsSource

__all__ = ["GGUFSource", "SafetensorsSource", "WeightSource"]


class WeightSource(Protocol):
    """Tensors under Hugging Face's names. Opening one checks that its files are whole; reading changes nothing.

    Attributes:
      where: the file or directory, for messages.
      shapes: of each tensor, as PyTorch has it (a linear layer is (out, in)).
    """

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a tensor, in the type it is stored or decoded in; only these are read from disk.

        `rows` has bounds within the tensor, or none, and no step.
        """
        ...

    def locate(self, name: str) -> str:
        """File and tensor, as they are called on disk, for messages; also for a tensor that is not there."""
        ...
