"""What adapters add to a model, in the form in which its forward pass uses it."""

from __future__ import annotations

from typing import NamedTuple

import jax

from sqa_jax.models.vision.adapter import VisionAdapter


class Adaptation(NamedTuple):
    """What adapters add to a model; None is nothing.

    Attributes:
      lora: {layer name: {"a": [L, in, r], "b": [L, r, out]}}, with the scale already in `b`.
      prefix: {"key": [L, P, K·d], "value": [L, P, K·d]}, keys after the rotation (prefix tuning).
      prompt: [P, D], embeddings of a soft prompt's tokens, whose ids are -1, -2, … (`sqa_jax.models.soft_tokens`).
      vision: what is added to the vision encoder and its connector.
    """

    lora: dict[str, dict[str, jax.Array]] | None = None
    prefix: dict[str, jax.Array] | None = None
    prompt: jax.Array | None = None
    vision: VisionAdapter | None = None

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix["key"].shape[1]

    @property
    def prompt_length(self) -> int:
        return 0 if self.prompt is None else self.prompt.shape[0]


NO_ADAPTATION = Adaptation()
