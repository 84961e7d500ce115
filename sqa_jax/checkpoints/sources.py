"""The interface of weight files, whatever their format: tensor names, shapes, and rows on demand."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sqa_jax.checkpoints.gguf.source import GGUFSource
from sqa_jax.checkpoints.safetensors_source import SafetensorsSource

__all__ = ["GGUFSource", "SafetensorsSource", "WeightSource"]


class WeightSource(Protocol):
    """Tensors under Hugging Face's names. Opening a source checks that its files are complete.

    Attributes:
      where: the file or directory, for messages.
      shapes: {tensor: shape}, as in PyTorch (a linear layer is (out, in)).
    """

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a tensor, in the dtype in which it is stored or decoded; only these are read from disk.

        Args:
          rows: has bounds within the tensor, or none, and no step.
        """
        ...

    def locate(self, name: str) -> str:
        """File and tensor under their names on disk, for messages; also for a tensor that is missing."""
        ...
