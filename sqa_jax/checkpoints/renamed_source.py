"""The tensors of a vision-language checkpoint under our names, whichever release of transformers wrote it."""

from __future__ import annotations

import numpy as np

from sqa_jax.checkpoints.sources import WeightSource
from sqa_jax.errors import UserError
from sqa_jax.models.vision.names import TensorNames


class RenamedSource:
    """The tensors of a source under our names; see `WeightSource`.

    Raises:
      UserError: two of its tensors have the same name in our scheme.
    """

    def __init__(self, source: WeightSource, names: TensorNames):
        self.where, self._source, self._names = source.where, source, names
        self._stored_name: dict[str, str] = {}
        for name in source.shapes:
            if (other := self._stored_name.setdefault(names.ours(name), name)) != name:
                raise UserError(f"{source.locate(name)} is there again as {other}; fetch the weights again")
        self.shapes = {ours: source.shapes[stored] for ours, stored in self._stored_name.items()}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        return self._source.read(self._stored_name[name], rows)

    def locate(self, name: str) -> str:
        return self._source.locate(self._stored_name.get(name) or self._names.published(name))
