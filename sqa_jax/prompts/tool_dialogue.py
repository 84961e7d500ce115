"""DecodeSlots with tools as ids: the question, calls, their results, and the answer, for training and inference.

Three forms, of which a student gets the first that its tokenizer has (the last where `config.recipe.chat` is off):

    native   what the chat template makes of its `tools`, of tool calls, and of tool turns
    chat     the chat template's turns; a call is written as describe_image() or retrieve(words), and its result is
             the turn of a role "tool"
    plain    lines, as in ReAct (Yao et al. 2023, arXiv:2210.03629):
                 Question: …
                 Action: retrieve(words)
                 Result: …
                 Answer: The answer is …

Every piece is tokenized by itself, so a conversation that goes on never changes the ids of what was read before.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqa_jax.data.answers import parse_answer
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.prompts.encode import Encoded, Encoder
from sqa_jax.prompts.formats import ANSWER_IS, Format, Template, option_targets

_MARKS = "\N{OBJECT REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"
FORMAT = Format("QCM", "A")  # of the question; neither caption nor lecture is in it
NOTHING = "nothing"  # what an empty result is shown as


@dataclasses.dataclass(frozen=True)
class ToolSpec:
    """What a student is told of a tool.

    Attributes:
      parameters: JSON schema of its arguments; at most one of them, a string, is what the student writes.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "object", "properties": {}})

    @property
    def argument(self) -> str | None:
        """The argument that a student writes, or None."""
        return next(iter(self.parameters.get("properties", {})), None)

    def schema(self) -> dict[str, Any]:
        """As chat templates want it."""
        own = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": own}


class Call(NamedTuple):
    """A tool that is to be called, and with what."""

    tool: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.tool}({self.argument})"


class Said(NamedTuple):
    """What a student's text says.

    Attributes:
      call: of a tool that there is.
      answer: index of the option that it chooses.
      text: the part of the text that says so; what follows it counts for nothing.
      error: what is wrong with it, where it says neither.
    """

    call: Call | None
    answer: int | None
    text: str
    error: str = ""


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """The text around what varies."""

    before: str  # the question
    between: str  # the question and the student's turn
    calls: Mapping[str, tuple[str, str]]  # of each tool, around its argument
    result: tuple[str, str]  # around a result
    answer: str  # before the answer sentence
    escape: bool  # an argument is written as in JSON


class Dialogue:
    """Writes and reads conversations with a student.

    Args:
      recipe: `config.recipe`: how answers are written, how long a prompt may be, whether the chat template is used.
      tools: in the order in which they are named.
    """

    def __init__(self, tokenizer: Any, recipe, tools: Sequence[ToolSpec]):
        self.tools = {tool.name: tool for tool in tools}
        self._style = recipe.answer
        self.form, self._pieces = _form(tokenizer, recipe.chat, tools)
        around = self._pieces.before, self._pieces.between
        self._encoder = Encoder(tokenizer, recipe.max_prompt, chat=False, caption=False, around=around)
        self._calls = {name: self._encoder.control(around) for name, around in self._pieces.calls.items()}
        self._result = self._encoder.control(self._pieces.result)
        self._answer, answer_is = self._encoder.control([self._pieces.answer, ANSWER_IS])
        self._heads = {name: before for name, (before, _) in self._calls.items()}
        self._answer_head = self._answer + answer_is
        eos = tokenizer.eos_token_id
        self.ends = (eos, *_with_newline(tokenizer)) if self.form == "plain" else (eos, self._result[0][0])

    def openings(self, problems: Sequence[Problem]) -> list[Encoded]:
        """The question, up to the student's turn; a long hint is shortened as it is in prompts without tools."""
        return self._encoder.encode(problems, [FORMAT] * len(problems))

    def heads(self, tools: Sequence[str]) -> list[list[int]]:
        """How each call begins, and at last how the answer does: what a decision compares."""
        return [*(self._heads[name] for name in tools), self._answer_head]

    def call(self, call: Call) -> list[int]:
        """A call as the student writes it."""
        before, after = self._calls[call.tool]
        argument = json.dumps(call.argument)[1:-1] if self._pieces.escape else call.argument
        return before + (self._encoder.plain([argument])[0] if self.tools[call.tool].argument else []) + after

    def result(self, text: str, room: int) -> tuple[list[int], int]:
        """The turn of a tool, up to the student's; and how many tokens of it were left out to fit into `room`."""
        before, after = self._result
        (ids,) = self._encoder.plain([text or NOTHING])
        kept = max(0, room - len(before) - len(after))
        return before + ids[:kept] + after, max(0, len(ids) - kept)

    @property
    def around_result(self) -> int:
        """Tokens of a tool's turn without a result."""
        return sum(map(len, self._result))

    def answers(self, problem: Problem) -> list[list[int]]:
        """Each option's answer."""
        return [self._answer + ids for ids in self._encoder.plain(option_targets(problem, "", self._style))]

    def reserve(self, answers: Sequence[Sequence[int]]) -> int:
        """Places that weighing all actions and a question's answers takes."""
        return sum(map(len, [*self.heads(list(self.tools)), *answers]))

    def end_of_call(self) -> int:
        """The token that a student ends a call with."""
        return self._result[0][0]

    def read(self, text: str, problem: Problem) -> Said:
        """What a student's text says: its first call, or the answer where it makes none before."""
        found = [match for pattern in _CALLS if (match := pattern.search(text))]
        answered = text.find(ANSWER_IS)
        if found:
            match = min(found, key=lambda match: match.start())
            if answered < 0 or match.start() < answered:
                name, argument = match["name"], (match["argument"] or "").strip().strip("\"'")
                said = text[: match.end()]
                if name in self.tools:
                    return Said(Call(name, _unescaped(argument) if self.tools[name].argument else ""), None, said)
                return Said(None, None, said, f"there is no tool {name}")
        answer = parse_answer(text, problem.choices) if text.strip() else None
        return Said(None, answer, text, "" if answer is not None else "this is neither a call nor an answer")

    def describe_error(self, reason: str) -> str:
        """What a student is told after a text that says nothing usable."""
        return f"Error: {reason}. Write {' or '.join(f'{t.name}({t.argument or str()})' for t in self.tools.values())} or the answer."


# A call as JSON (as most templates have it), or as a function's; JSON comes first, for its text may hold brackets.
_CALLS = (
    re.compile(
        r'\{\s*"name"\s*:\s*"(?P<name>\w+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{\s*(?:"\w+"\s*:\s*"(?P<argument>(?:[^"\\]|\\.)*)")?\s*\}\s*\}(?:\s*</tool_call>)?'
    ),
    re.compile(r"(?<![\w.])(?P<name>[a-z_]+)\((?:\w+\s*=\s*(?=[\x22']))?(?P<argument>[^()\n]*)\)"),
)


def _unescaped(text: str) -> str:
    try:
        return json.loads(f'"{text}"')
    except json.JSONDecodeError:
        return text


def _with_newline(tokenizer: Any) -> list[int]:
    """The tokens whose text has a line end."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if "\n" in text]


def instructions(tools: Sequence[ToolSpec], form: str) -> str:
    """What a student is told in front of the question, where its chat template does not do so."""
    lines = [f"{tool.name}({tool.argument or ''}): {tool.description}" for tool in tools]
    how = "Action: tool, then Answer" if form == "plain" else "a tool, then the answer"
    return "Answer the question. These tools may be used before, each once:\n" + "\n".join(lines) + f"\nWrite {how}."


def _form(tokenizer: Any, chat: bool, tools: Sequence[ToolSpec]) -> tuple[str, _Pieces]:
    if hasattr(tokenizer, "decoder_start_token"):
        raise UserError(
            "an encoder–decoder student cannot hold a conversation with tools, as its encoder reads once; "
            "choose a decoder-only one as config.student.path"
        )
    if chat and tokenizer.chat_template:
        if (native := _native(tokenizer, tools)) is not None:
            return "native", native
        return "chat", _chat(tokenizer, tools)
    bos = Template(tokenizer, chat=False).before
    pieces = _Pieces(
        before=f"{bos}{instructions(tools, 'plain')}\n\n",
        between="\n",
        calls={tool.name: (f"Action: {tool.name}(", ")") for tool in tools},
        result=("\nResult: ", "\n"),
        answer="Answer: ",
        escape=False,
    )
    return "plain", pieces


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], ask: bool, **more: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, **more)


def _chat(tokenizer: Any, tools: Sequence[ToolSpec]) -> _Pieces:
    question, mark = _MARKS
    told = [{"role": "system", "content": instructions(tools, "chat")}, {"role": "user", "content": question}]
    turns = [*told, {"role": "assistant", "content": "x"}, {"role": "tool", "content": mark}]
    opening, whole = _rendered(tokenizer, told, True), _rendered(tokenizer, turns, True)
    before, between = opening.split(question)
    into, after = whole.removeprefix(opening + "x").split(mark)
    return _Pieces(before, between, {tool.name: (f"{tool.name}(", ")") for tool in tools}, (into, after), "", False)


def _native(tokenizer: Any, tools: Sequence[ToolSpec]) -> _Pieces | None:
    """The template's own form of tools, or None where it has none or where later turns change earlier ones."""
    question, mark = _MARKS
    schemas = [tool.schema() for tool in tools]
    told = [{"role": "user", "content": question}]
    try:
        opening = _rendered(tokenizer, told, True, tools=schemas)
        if not all(tool.name in opening for tool in tools):
            return None
        before, between = opening.split(question)
        calls, results = {}, set()
        for tool in tools:
            arguments = {tool.argument: mark} if tool.argument else {}
            made = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
            call = {"role": "assistant", "content": "", "tool_calls": [made]}
            answered = {"role": "tool", "name": tool.name, "content": question}
            whole = _rendered(tokenizer, [*told, call, answered], True, tools=schemas)
            alone = _rendered(tokenizer, [*told, call], False, tools=schemas)
            if not whole.startswith(opening) or not alone.startswith(opening):
                return None
            if not whole.startswith(alone):
                return None
            into, after = whole.removeprefix(alone).split(question)
            # The end token of the call's turn is what the student stops at: it belongs to what follows.
            written, end_token, tail = alone.removeprefix(opening).rpartition(tokenizer.eos_token)
            if not end_token:
                return None
            into = end_token + tail + into
            start, end = written.split(mark) if tool.argument else (written, "")
            calls[tool.name] = (start, end)
            results.add((into, after))
    except Exception:  # a template raises what it likes where it knows no tools
        return None
    return _Pieces(before, between, calls, results.pop(), "", True) if len(results) == 1 else None
