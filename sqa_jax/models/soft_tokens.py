"""Soft prompt tokens: their ids, and their place in a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def with_soft_tokens(tokens: Sequence[int], count: int, index: int = 0) -> list[int]:
    """Ids with `count` soft prompt tokens inserted at `index`: -1, -2, …, which no vocabulary has."""
    return [*tokens[:index], *range(-1, -count - 1, -1), *tokens[index:]]


class SoftPromptTokens(NamedTuple):
    """The soft prompt tokens that every sequence gets.

    Attributes:
      count: how many.
      after_image: whether they follow the prompt's image, where it has one, or precede the whole prompt.
    """

    count: int = 0
    after_image: bool = False

    def put(self, tokens: Sequence[int], image_end: int = 0) -> list[int]:
        """Ids with the soft prompt's inserted; the first `image_end` of them end with the prompt's image."""
        return with_soft_tokens(tokens, self.count, image_end if self.after_image else 0)


NO_SOFT_PROMPT = SoftPromptTokens()
