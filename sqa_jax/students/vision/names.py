"""A multimodal checkpoint's tensors under one set of names, whichever release of transformers wrote it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sqa_jax.errors import UserError
from sqa_jax.students.sources import WeightSource


class Names(NamedTuple):
    """Prefixes of a family's tensors. Of several that fit a name the longest counts; a name that none fits stays.

    Attributes:
      prefixes: of each part ours, the published checkpoints', and any that releases of transformers have saved besides;
        the last one is that of its modules today.
        The language half has the names that it has alone, so that its table needs no other ones.
    """

    prefixes: tuple[tuple[str, ...], ...]

    def ours(self, name: str) -> str:
        """Our name of a file's tensor."""
        return _replaced(name, {theirs: ours for ours, *spellings in self.prefixes for theirs in spellings})

    def published(self, name: str) -> str:
        """The published name, which every release of transformers reads, of a tensor that is called `name` here."""
        return _replaced(name, {ours: published for ours, published, *_ in self.prefixes})

    def spellings(self, name: str) -> tuple[str, ...]:
        """Every spelling but ours of what is called `name` here, that of transformers' modules today last."""
        ours, *theirs = max((own for own in self.prefixes if name.startswith(own[0])), key=lambda own: len(own[0]))
        return tuple(prefix + name.removeprefix(ours) for prefix in theirs)


def _replaced(name: str, prefixes: dict[str, str]) -> str:
    found = max(filter(name.startswith, prefixes), key=len, default="")
    return prefixes.get(found, "") + name.removeprefix(found)


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
