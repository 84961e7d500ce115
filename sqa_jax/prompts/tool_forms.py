"""Forms of dialogues with tools: the text around questions, calls and results, in the way a tokenizer's template has it.

A student gets the first form that its tokenizer supports (the last where `config.recipe.chat` is off):

    native   as the chat template renders its `tools`, tool calls and tool turns
    chat     the chat template's turns; a call is written as describe_image() or retrieve(words), and its result is
             the turn of a role "tool"
    plain    lines, as in ReAct (Yao et al. 2023, arXiv:2210.03629):
                 Question: …
                 Action: retrieve(words)
                 Result: …
                 Answer: The answer is …
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.prompts.formats import Template
from sqa_jax.prompts.tool_calls import ToolSpec

_MARKS = "\N{OBJECT REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"  # stand for the text that varies


@dataclasses.dataclass(frozen=True)
class DialogueForm:
    """The fixed text of a dialogue, around what varies.

    Attributes:
      name: "native", "chat" or "plain".
      before: text before the question.
      between: text between the question and the student's turn.
      calls: {tool: text before and after its argument}.
      result: text before and after a result.
      answer: text before the answer sentence.
      escape: whether an argument is escaped as in JSON.
    """

    name: str
    before: str
    between: str
    calls: Mapping[str, tuple[str, str]]
    result: tuple[str, str]
    answer: str
    escape: bool


def dialogue_form(tokenizer: Any, chat: bool, tools: Sequence[ToolSpec]) -> DialogueForm:
    """The first form that a tokenizer supports.

    Args:
      chat: whether its chat template may be used.

    Raises:
      UserError: the student is an encoder–decoder.
    """
    if hasattr(tokenizer, "decoder_start_token"):
        raise UserError(
            "an encoder–decoder student cannot hold a dialogue with tools, as its encoder processes the prompt once; "
            "choose a decoder-only one as config.student.path"
        )
    if chat and tokenizer.chat_template:
        return _native(tokenizer, tools) or _chat(tokenizer, tools)
    bos = Template(tokenizer, chat=False).before
    return DialogueForm(
        "plain",
        before=f"{bos}{_instructions(tools, 'plain')}\n\n",
        between="\n",
        calls={tool.name: (f"Action: {tool.name}(", ")") for tool in tools},
        result=("\nResult: ", "\n"),
        answer="Answer: ",
        escape=False,
    )


def _instructions(tools: Sequence[ToolSpec], form: str) -> str:
    """The description of the tools before the question, where the chat template has none."""
    lines = [f"{tool.name}({tool.argument or ''}): {tool.description}" for tool in tools]
    order = "Action: tool, then Answer" if form == "plain" else "a tool, then the answer"
    return "Answer the question. These tools may be used before, each once:\n" + "\n".join(lines) + f"\nWrite {order}."


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], prompt: bool, **kwargs: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **kwargs)


def _chat(tokenizer: Any, tools: Sequence[ToolSpec]) -> DialogueForm:
    question, mark = _MARKS
    messages = [{"role": "system", "content": _instructions(tools, "chat")}, {"role": "user", "content": question}]
    turns = [*messages, {"role": "assistant", "content": "x"}, {"role": "tool", "content": mark}]
    opening, whole = _rendered(tokenizer, messages, True), _rendered(tokenizer, turns, True)
    before, between = opening.split(question)
    before_result, after_result = whole.removeprefix(opening + "x").split(mark)
    calls = {tool.name: (f"{tool.name}(", ")") for tool in tools}
    return DialogueForm("chat", before, between, calls, (before_result, after_result), "", False)


def _native(tokenizer: Any, tools: Sequence[ToolSpec]) -> DialogueForm | None:
    """The template's form of tools, or None where it has none or where later turns change earlier ones."""
    question, _ = _MARKS
    schemas = [tool.schema() for tool in tools]
    messages = [{"role": "user", "content": question}]
    try:
        opening = _rendered(tokenizer, messages, True, tools=schemas)
        if not all(tool.name in opening for tool in tools):
            return None
        before, between = opening.split(question)
        calls, results = {}, set()
        for tool in tools:
            if (turn := _native_call(tokenizer, tool, schemas, messages, opening)) is None:
                return None
            calls[tool.name], result = turn
            results.add(result)
    except Exception:  # a template without tools raises anything
        return None
    if len(results) != 1:
        return None
    return DialogueForm("native", before, between, calls, results.pop(), "", True)


def _native_call(
    tokenizer: Any,
    tool: ToolSpec,
    schemas: Sequence[Mapping[str, Any]],
    messages: Sequence[Mapping[str, Any]],
    opening: str,
) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """The text around a call's argument and around its result, or None where turns do not follow each other."""
    result_mark, argument_mark = _MARKS
    arguments = {tool.argument: argument_mark} if tool.argument else {}
    function = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    call = {"role": "assistant", "content": "", "tool_calls": [function]}
    result = {"role": "tool", "name": tool.name, "content": result_mark}
    with_result = _rendered(tokenizer, [*messages, call, result], True, tools=schemas)
    with_call = _rendered(tokenizer, [*messages, call], False, tools=schemas)
    if not with_call.startswith(opening) or not with_result.startswith(with_call):
        return None
    before_result, after_result = with_result.removeprefix(with_call).split(result_mark)
    # The student stops at the EOS token of the call's turn, so that token belongs to what follows the call.
    written, eos, tail = with_call.removeprefix(opening).rpartition(tokenizer.eos_token)
    if not eos:
        return None
    start, end = written.split(argument_mark) if tool.argument else (written, "")
    return (start, end), (eos + tail + before_result, after_result)
