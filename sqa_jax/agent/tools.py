"""Tools: what a student may call, and calling them so that a bad one does no harm."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet
from sqa_jax.errors import UserError
from sqa_jax.prompts.tool_dialogue import Call, ToolSpec

MOST_CHARACTERS = 20_000  # of a result; the rest is not even tokenized


class Request(NamedTuple):
    """A call on behalf of a question."""

    problem: Problem
    argument: str


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
      spec: what a student is told of it.
      run: (requests) → a result each, in order; "" where there is nothing to say.
      argument_for: of a question, the argument that a policy gives which chooses among whole actions.
    """

    spec: ToolSpec
    run: Callable[[Sequence[Request]], Sequence[str]]
    argument_for: Callable[[Problem], str] = lambda problem: problem.question

    def call_for(self, problem: Problem) -> Call:
        """The call that a policy makes which chooses among whole actions, on one line."""
        return Call(self.spec.name, " ".join(self.argument_for(problem).split()) if self.spec.argument else "")


class Result(NamedTuple):
    """What came of a call.

    Attributes:
      text: what the student is shown.
      status: "ok", "empty", "failed" or "timed out".
    """

    text: str
    status: str


# name → (config, questions) → Tool; `config.agent.tools` may also name any other such function as "module:function"
BUILT_IN: dict[str, str] = {
    "describe_image": "sqa_jax.agent.caption:tool",
    "retrieve": "sqa_jax.agent.retrieval:tool",
}


def make_tools(config, problems: ProblemSet) -> dict[str, Tool]:
    """The tools of `config.agent.tools`, by the names that they give themselves.

    Raises:
      UserError: one cannot be found or made, or two have one name.
    """
    tools: dict[str, Tool] = {}
    for entry in config.agent.tools:
        module, _, function = BUILT_IN.get(entry, entry).partition(":")
        try:
            make = getattr(importlib.import_module(module), function or "tool")
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"config.agent.tools: {entry!r} is not a tool ({error}); choose of {', '.join(BUILT_IN)}, or name a "
                "function as module:function"
            ) from None
        tool = make(config, problems)
        if len(tool.spec.parameters.get("properties", {})) > 1:
            raise UserError(f"config.agent.tools: {entry!r} takes several arguments; a tool takes one text, or nothing")
        if tools.setdefault(tool.spec.name, tool) is not tool:
            raise UserError(f"config.agent.tools: two tools are named {tool.spec.name!r}; rename one")
    return tools


def call_tools(tools: dict[str, Tool], calls: Sequence[tuple[Problem, Call]], timeout: float) -> list[Result]:
    """Calls each tool once for all its calls; where that fails, once for each, so that one spoils only its own.

    Args:
      timeout: seconds that a tool may take, for all its calls and then for each of them.
    """
    results: list[Result | None] = [None] * len(calls)
    for name in dict.fromkeys(call.tool for _, call in calls):
        places = [k for k, (_, call) in enumerate(calls) if call.tool == name]
        requests = [Request(calls[k][0], calls[k][1].argument) for k in places]
        made = _run(tools[name], requests, timeout)
        if isinstance(made, Result) and len(requests) > 1:
            singles = [_run(tools[name], [request], timeout) for request in requests]
            made = [one if isinstance(one, Result) else one[0] for one in singles]
        elif isinstance(made, Result):
            made = [made]
        for k, result in zip(places, made, strict=True):
            results[k] = result
    return results


def _run(tool: Tool, requests: Sequence[Request], timeout: float) -> list[Result] | Result:
    """The results, or the one result that says what went wrong."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(list(tool.run(requests)))
        except Exception as error:
            future.set_exception(error)

    # Not an executor's thread: one that hangs must not keep the program from ending.
    threading.Thread(target=work, daemon=True, name=tool.spec.name).start()
    try:
        texts = future.result(timeout)
    except concurrent.futures.TimeoutError:
        return Result("Error: the tool did not answer in time", "timed out")
    except Exception as error:
        return Result(f"Error: {' '.join(str(error).split())[:200] or type(error).__name__}", "failed")
    if len(texts) != len(requests) or not all(isinstance(text, str) for text in texts):
        return Result("Error: the tool did not give one text a call", "failed")
    return [Result(text[:MOST_CHARACTERS], "ok" if text.strip() else "empty") for text in texts]
