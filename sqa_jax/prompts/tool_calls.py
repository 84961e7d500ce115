"""Tools as a student knows them, and calls of tools parsed from its text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqa_jax.data.answers import parse_answer
from sqa_jax.data.problem import Problem
from sqa_jax.prompts.formats import ANSWER_IS


@dataclasses.dataclass(frozen=True)
class ToolSpec:
    """The description of a tool in a student's prompt.

    Attributes:
      parameters: JSON schema of its arguments; at most one of them, a string, is written by the student.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "object", "properties": {}})

    @property
    def argument(self) -> str | None:
        """Name of the argument that the student writes, or None."""
        return next(iter(self.parameters.get("properties", {})), None)

    def schema(self) -> dict[str, Any]:
        """The JSON schema that chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class Call(NamedTuple):
    """A call of a tool."""

    tool: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.tool}({self.argument})"


class ParsedReply(NamedTuple):
    """What a generated text asks for: a call, an answer, or neither.

    Attributes:
      call: of a tool that exists.
      answer: index of the option that it chooses.
      text: the text up to the end of the call or answer; what follows is ignored.
      error: what is wrong, where it is neither.
    """

    call: Call | None
    answer: int | None
    text: str
    error: str = ""


# A call as JSON, which most templates have, or as a function's. JSON comes first, since its text may hold brackets.
_CALLS = (
    re.compile(
        r'\{\s*"name"\s*:\s*"(?P<name>\w+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{\s*(?:"\w+"\s*:\s*"(?P<argument>(?:[^"\\]|\\.)*)")?\s*\}\s*\}(?:\s*</tool_call>)?'
    ),
    re.compile(r"(?<![\w.])(?P<name>[a-z_]+)\((?:\w+\s*=\s*(?=[\x22']))?(?P<argument>[^()\n]*)\)"),
)


def parse_tool_reply(text: str, problem: Problem, tools: Mapping[str, ToolSpec]) -> ParsedReply:
    """Parses a generated text: its first call, or the answer if it makes no call before that."""
    matches = [match for pattern in _CALLS if (match := pattern.search(text))]
    answer_start = text.find(ANSWER_IS)
    if matches:
        match = min(matches, key=lambda match: match.start())
        if answer_start < 0 or match.start() < answer_start:
            name, argument = match["name"], (match["argument"] or "").strip().strip("\"'")
            used = text[: match.end()]
            if name in tools:
                return ParsedReply(Call(name, _unescaped(argument) if tools[name].argument else ""), None, used)
            return ParsedReply(None, None, used, f"there is no tool {name}")
    answer = parse_answer(text, problem.choices) if text.strip() else None
    return ParsedReply(None, answer, text, "" if answer is not None else "this is neither a call nor an answer")


def _unescaped(text: str) -> str:
    try:
        return json.loads(f'"{text}"')
    except json.JSONDecodeError:
        return text
