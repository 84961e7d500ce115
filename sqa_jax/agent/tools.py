"""Tools: their registry, and calls that isolate failures and time-outs."""

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
from sqa_jax.prompts.tool_calls import Call, ToolSpec

MAX_CHARACTERS = 20_000  # of a result; the rest is not even tokenized


class Request(NamedTuple):
    """A call on behalf of a question."""

    problem: Problem
    argument: str


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
      spec: name, description and parameters, as the student's prompt shows them.
      run: (requests) → a result each, in order; "" for an empty result.
      argument_for: (question) → the argument of a call, where a policy chooses among whole actions.
    """

    spec: ToolSpec
    run: Callable[[Sequence[Request]], Sequence[str]]
    argument_for: Callable[[Problem], str] = lambda problem: problem.question

    def call_for(self, problem: Problem) -> Call:
        """The call where a policy chooses among whole actions; its argument is one line."""
        return Call(self.spec.name, " ".join(self.argument_for(problem).split()) if self.spec.argument else "")


class Result(NamedTuple):
    """Result of a call.

    Attributes:
      text: what is appended to the student's context.
      status: "ok", "empty", "failed" or "timed out".
    """

    text: str
    status: str


# name → (config, questions) → Tool; `config.agent.tools` may also name any other such function as "module:function"
BUILT_IN: dict[str, str] = {
    "describe_image": "sqa_jax.agent.caption:tool",
    "retrieve": "sqa_jax.agent.retrieval:tool",
}


def make_tools(config, problem_set: ProblemSet) -> dict[str, Tool]:
    """The tools of `config.agent.tools`, by the names in their specs.

    Raises:
      UserError: one cannot be found or built, or two have the same name.
    """
    tools: dict[str, Tool] = {}
    for entry in config.agent.tools:
        module, _, function = (BUILT_IN.get(entry) or entry).partition(":")
        try:
            make = getattr(importlib.import_module(module), function or "tool")
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"config.agent.tools: {entry!r} is not a tool ({error}); choose of {', '.join(BUILT_IN)}, or name a "
                "function as module:function"
            ) from None
        tool = make(config, problem_set)
        if len(tool.spec.parameters.get("properties", {})) > 1:
            raise UserError(f"config.agent.tools: {entry!r} takes several arguments; a tool takes one text, or nothing")
        if tools.setdefault(tool.spec.name, tool) is not tool:
            raise UserError(f"config.agent.tools: two tools are named {tool.spec.name!r}; rename one")
    return tools


def call_tools(tools: dict[str, Tool], calls: Sequence[tuple[Problem, Call]], timeout: float) -> list[Result]:
    """Executes calls, each tool once for all of its calls; where that fails, once for each, to isolate the failure.

    Args:
      timeout: seconds that a tool may take, for all its calls and then for each of them.
    """
    results: dict[int, Result] = {}
    for name in dict.fromkeys(call.tool for _, call in calls):
        indices = [k for k, (_, call) in enumerate(calls) if call.tool == name]
        requests = [Request(calls[k][0], calls[k][1].argument) for k in indices]
        outcome = _run(tools[name], requests, timeout)
        if isinstance(outcome, Result) and len(requests) > 1:
            singles = [_run(tools[name], [request], timeout) for request in requests]
            outcome = [single if isinstance(single, Result) else single[0] for single in singles]
        elif isinstance(outcome, Result):
            outcome = [outcome]
        for k, result in zip(indices, outcome, strict=True):
            results[k] = result
    return [results[k] for k in range(len(calls))]


def _run(tool: Tool, requests: Sequence[Request], timeout: float) -> list[Result] | Result:
    """The results, or one result that describes the failure."""
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
    return [Result(text[:MAX_CHARACTERS], "ok" if text.strip() else "empty") for text in texts]
