"""Tensor names of multimodal checkpoints under one set of names, whichever release of transformers wrote them."""

from __future__ import annotations

from typing import NamedTuple


class TensorNames(NamedTuple):
    """Prefixes of a family's tensor names. The longest matching prefix counts; a name that none matches stays.

    Attributes:
      prefixes: of each part of the model our prefix, that of published checkpoints, and any others that releases of
        transformers have saved; the last one is that of today's modules. The language model's tensors have the names
        that they have in a model of text, so that they need no table of their own.
    """

    prefixes: tuple[tuple[str, ...], ...]

    def ours(self, name: str) -> str:
        """Our name of a file's tensor."""
        return _replace_prefix(name, {theirs: ours for ours, *spellings in self.prefixes for theirs in spellings})

    def published(self, name: str) -> str:
        """The published name, which every release of transformers reads, of our `name`."""
        return _replace_prefix(name, {ours: published for ours, published, *_ in self.prefixes})

    def spellings(self, name: str) -> tuple[str, ...]:
        """Every spelling but ours of our `name`; that of transformers' modules today is the last."""
        matching = (spellings for spellings in self.prefixes if name.startswith(spellings[0]))
        ours, *theirs = max(matching, key=lambda spellings: len(spellings[0]))
        return tuple(prefix + name.removeprefix(ours) for prefix in theirs)


def _replace_prefix(name: str, replacements: dict[str, str]) -> str:
    found = max(filter(name.startswith, replacements), key=len, default="")
    return replacements.get(found, "") + name.removeprefix(found)
