"""The tensors of a multimodal checkpoint under our names, whichever release of transformers wrote it."""

from __future__ import annotations

import numpy as np

from sqa_jax.checkpoints.sources import WeightSource
from sqa_jax.errors import UserError
from sqa_jax.models.vision.names import Names


class RenamedSource:
    """The tensors of a source under our names; see `WeightSource`.

    Raises:
      UserError: two of its tensors are one under our names.
    """

    def __init__(self, source: WeightSource, names: Names):
        self.where, self._source, self._names = source.where, source, names
        self._theirs: dict[str, str] = {}
        for name in source.shapes:
            if (other := self._theirs.setdefault(names.ours(name), name)) != name:
                raise UserError(f"{source.locate(name)} is there again as {other}; fetch the weights again")
        self.shapes = {ours: source.shapes[theirs] for ours, theirs in self._theirs.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        return self._source.read(self._theirs[name], rows)

    def locate(self, name: str) -> str:
        return self._source.locate(self._theirs.get(name) or self._names.published(name))
