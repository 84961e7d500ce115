"""The ids of a soft prompt's tokens, and where they stand in a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def with_soft_tokens(tokens: Sequence[int], count: int, place: int = 0) -> list[int]:
    """Ids with `count` tokens of a soft prompt at `place`: they are -1, -2, …, which no vocabulary has."""
    return [*tokens[:place], *range(-1, -count - 1, -1), *tokens[place:]]


class SoftPromptTokens(NamedTuple):
    """A soft prompt's tokens, which every sequence gets.

    Attributes:
      count: how many.
      behind_picture: whether they stand behind the prompt's picture, where it has one, or in front of all.
    """

    count: int = 0
    after_image: bool = False

    def put(self, tokens: Sequence[int], image_end: int = 0) -> list[int]:
        """Ids with the soft prompt's in them; `behind_picture` of them end with the prompt's picture."""
        return with_soft_tokens(tokens, self.count, image_end if self.after_image else 0)


NO_SOFT_PROMPT = SoftPromptTokens()
