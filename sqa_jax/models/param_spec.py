"""One parameter of a model: its path in our tree, its shape, and its names in Hugging Face's files."""

from __future__ import annotations

from typing import Any, NamedTuple

ParamTree = dict[str, Any]  # nested dictionaries of arrays, as Flax has them


class ParamSpec(NamedTuple):
    """One parameter.

    Attributes:
      path: keys in our tree.
      shape: in our tree; a stacked parameter has a leading dimension of layers.
      names: the file's tensors that it consists of, one per layer, or just one.
      stacked: whether `names` are layers.
      transposed: whether the file has the last two dimensions swapped, as PyTorch's (out, in).
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of each of `names` in the file."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape
