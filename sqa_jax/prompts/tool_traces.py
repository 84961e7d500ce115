"""Traces of tool dialogues as training rows: each decision is a target, the dialogue before it its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import read_jsonl
from sqa_jax.prompts.encode import Encoded
from sqa_jax.prompts.tool_calls import Call, ToolSpec
from sqa_jax.prompts.tool_dialogue import Dialogue


def read_traces(paths: Sequence[str], problems: Mapping[str, Problem]) -> dict[str, dict[str, Any]]:
    """Traces {"pid", "tools", "turns"} by pid, of the given questions.

    Raises:
      UserError: a file or a field is missing, or all traces are for other questions.
    """
    traces: dict[str, dict[str, Any]] = {}
    for path in paths:
        for number, row in enumerate(read_jsonl(path, "traces of dialogues"), start=1):
            if not {"pid", "tools", "turns"} <= row.keys():
                raise UserError(f"{path}: trace {number} lacks pid, tools or turns; python -m sqa_jax.agent --traces makes them")  # fmt: skip
            if row["pid"] in problems:
                traces[row["pid"]] = row
    if not traces:
        raise UserError(f"config.data.traces: {', '.join(paths)} hold no trace of a training question; see config.data")
    return traces


def trace_rows(
    tokenizer: Any, recipe, context: int, problems: Sequence[Problem], traces: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[Problem, str, Encoded]]:
    """(question, "call" or "answer", row) of each decision of each trace.

    Args:
      context: maximum tokens of a dialogue; results are truncated to it, as in inference.
    """
    known = [problem for problem in problems if problem.pid in traces]
    specs = [ToolSpec(**spec) for spec in traces[known[0].pid]["tools"]] if known else []
    dialogue = Dialogue(tokenizer, recipe, specs)
    for problem, opening in zip(known, dialogue.encode_questions(known), strict=True):
        tokens, truncated = list(opening.tokens), dict(opening.truncated)
        answers = dialogue.encode_answers(problem)

        def row(target: list[int], tokens=tokens, truncated=truncated, opening=opening) -> Encoded:
            return Encoded(tokens + target, len(tokens), 0, dict(truncated), opening.fits)

        for turn in traces[problem.pid]["turns"]:
            call = dialogue.encode_call(Call(turn["tool"], turn["argument"]))
            yield problem, "call", row([*call, dialogue.call_end_token()])
            tokens += call
            shown, left_out = dialogue.encode_result(
                turn["result"], context - len(tokens) - dialogue.scoring_tokens(answers)
            )
            tokens += shown
            if left_out:
                truncated[turn["tool"]] = left_out
        yield problem, "answer", row([*answers[problem.answer], tokenizer.eos_token_id])
