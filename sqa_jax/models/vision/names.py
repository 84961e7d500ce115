"""A multimodal checkpoint's tensors under one set of names, whichever release of transformers wrote it."""

from __future__ import annotations

from typing import NamedTuple


class TensorNames(NamedTuple):
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
