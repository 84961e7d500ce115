"""Dialogues with tools, tokenized: question, calls, results and answer, for training and for inference.

Each turn is tokenized separately, so a dialogue that goes on never changes the ids of what is in the KV cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqa_jax.data.problem import Problem
from sqa_jax.prompts.encode import Encoded, Encoder
from sqa_jax.prompts.formats import ANSWER_IS, Format, option_targets
from sqa_jax.prompts.tool_calls import Call, ParsedReply, ToolSpec, parse_tool_reply
from sqa_jax.prompts.tool_forms import dialogue_form

FORMAT = Format("QCM", "A")  # of the question; it has neither caption nor lecture
NOTHING = "nothing"  # shown for an empty result


class Dialogue:
    """Tokenizes the turns of dialogues, and parses what the student generates.

    Args:
      recipe: `config.recipe`: style of answers, maximum length of a prompt, use of the chat template.
      tools: in the order in which they are listed.

    Attributes:
      form: name of the form, see `sqa_jax.prompts.tool_forms`.
      stop_tokens: ids that end a generated turn.
    """

    def __init__(self, tokenizer: Any, recipe, tools: Sequence[ToolSpec]):
        self.tools = {tool.name: tool for tool in tools}
        self._style = recipe.answer
        form = dialogue_form(tokenizer, recipe.chat, tools)
        self.form, self._escape = form.name, form.escape
        around = form.before, form.between
        self._encoder = Encoder(tokenizer, recipe.max_prompt, chat=False, caption=False, around=around)
        self._calls = {name: self._encoder.control(around) for name, around in form.calls.items()}
        self._result = self._encoder.control(form.result)
        self._answer, answer_is = self._encoder.control([form.answer, ANSWER_IS])
        self._answer_prefix = self._answer + answer_is
        eos = tokenizer.eos_token_id
        self.stop_tokens = (
            (eos, *_tokens_with_newline(tokenizer)) if self.form == "plain" else (eos, self._result[0][0])
        )

    def encode_questions(self, problems: Sequence[Problem]) -> list[Encoded]:
        """Each question, up to the student's turn; a long hint is truncated as in prompts without tools."""
        return self._encoder.encode(problems, [FORMAT] * len(problems))

    def action_prefixes(self, tools: Sequence[str]) -> list[list[int]]:
        """The first tokens of a call of each tool, and last those of an answer: what a decision scores."""
        return [*(self._calls[name][0] for name in tools), self._answer_prefix]

    def encode_call(self, call: Call) -> list[int]:
        """A call as the student writes it."""
        before, after = self._calls[call.tool]
        argument = json.dumps(call.argument)[1:-1] if self._escape else call.argument
        return before + (self._encoder.plain([argument])[0] if self.tools[call.tool].argument else []) + after

    def encode_result(self, text: str, max_tokens: int) -> tuple[list[int], int]:
        """The turn of a tool, up to the student's turn, and how many tokens were truncated to fit `max_tokens`."""
        before, after = self._result
        (ids,) = self._encoder.plain([text or NOTHING])
        kept = max(0, max_tokens - len(before) - len(after))
        return before + ids[:kept] + after, max(0, len(ids) - kept)

    @property
    def result_overhead(self) -> int:
        """Tokens of a tool's turn besides its result."""
        return sum(map(len, self._result))

    def encode_answers(self, problem: Problem) -> list[list[int]]:
        """The answer of each option."""
        return [self._answer + ids for ids in self._encoder.plain(option_targets(problem, "", self._style))]

    def scoring_tokens(self, answers: Sequence[Sequence[int]]) -> int:
        """Cache slots that scoring all actions and the answers of a question takes."""
        return sum(map(len, [*self.action_prefixes(list(self.tools)), *answers]))

    def call_end_token(self) -> int:
        """The token with which a student ends a call."""
        return self._result[0][0]

    def parse(self, text: str, problem: Problem) -> ParsedReply:
        """Parses a generated text: its first call, or the answer if it makes no call before that."""
        return parse_tool_reply(text, problem, self.tools)

    def describe_error(self, reason: str) -> str:
        """The message to a student whose text is neither a call nor an answer."""
        calls = " or ".join(f"{tool.name}({tool.argument or ''})" for tool in self.tools.values())
        return f"Error: {reason}. Write {calls} or the answer."


def _tokens_with_newline(tokenizer: Any) -> list[int]:
    """The tokens whose text has a line break."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if "\n" in text]
