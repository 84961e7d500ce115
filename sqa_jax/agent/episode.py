"""An episode: one question's tool dialogue while it lasts, with its costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from sqa_jax.data.problem import Problem
from sqa_jax.prompts.tool_calls import Call


@dataclasses.dataclass
class Episode:
    """State of one question's dialogue.

    Attributes:
      index: of the question, among those that were asked.
      pending: tokens to prefill next.
      request: what was last asked of the student: to score a "decision" between calls and answers, to score an
        "answer", or to generate "text", which it is "decoding" once that has started.
      first_token: token from which generation continues.
      calls, turns: calls that were made; what was decided, with the scores for it and what a tool returned.
      mistakes: what was wrong with texts that were neither a legal call nor an answer.
      shortened: tokens that were left out, by part.
      length: tokens in the context.
      prompt_tokens, branch_tokens: prefilled tokens of the context, and of continuations that were scored.
      generated_tokens, scored_tokens: tokens the student generated, and tokens whose likelihood it gave.
      attended_keys: keys that all of these tokens attended to, summed.
    """

    index: int
    problem: Problem
    pending: list[int]
    request: Literal["", "decision", "answer", "text", "decoding"] = ""
    first_token: int = 0
    calls: list[Call] = dataclasses.field(default_factory=list)
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    mistakes: list[str] = dataclasses.field(default_factory=list)
    truncated: dict[str, int] = dataclasses.field(default_factory=dict)
    length: int = 0
    prompt_tokens: int = 0
    branch_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    attended_keys: float = 0.0

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the tools that were called, in order."""
        return tuple(call.tool for call in self.calls)

    def count_prefill(self, tokens: int, options: Sequence[Sequence[int]] = ()) -> None:
        """Counts tokens that are appended to the context, and options scored as branches after them."""
        self.attended_keys += tokens * (self.length + (tokens + 1) / 2)
        self.length += tokens
        self.prompt_tokens += tokens
        for size in map(len, options):
            self.attended_keys += (size - 1) * (self.length + size / 2)
            self.branch_tokens += size - 1
            self.scored_tokens += size

    def count_generated(self, tokens: int) -> None:
        """Counts tokens that were generated from the newest one of the context, whose end token ends them."""
        self.count_prefill(1)
        self.attended_keys += tokens * (self.length + tokens / 2)
        self.generated_tokens += tokens + 1
