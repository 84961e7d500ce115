"""Tool-use traces to learn from: which calls, with which results, before the gold answer.

`config.agent.evidence` names the evidence that a call is useful:

    student   the student's likelihoods: a call that makes the right option more probable (by `config.agent.gain`)
    records   the data and a teacher's replies: describe_image where the question has an image with a caption;
              retrieve where the teacher was wrong without the lecture and right with it (settings QTCH and QTCHL),
              or, without such a pair of replies, wherever the question has a lecture
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqa_jax.agent.tools import Tool, call_tools
from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import TeacherRecord

KINDS = ("student", "records")
_BATCH = 256  # questions whose calls are executed together


def calls_by_records(problem: Problem, records: Iterable[TeacherRecord]) -> list[str]:
    """Tools that would have changed the answer, by the data and a teacher's replies."""
    right: dict[str, set[bool]] = {"QTCH": set(), "QTCHL": set()}
    for record in records:
        if record.setting in right and record.answer is not None:
            right[record.setting].add(record.answer == problem.answer)
    without, with_lecture = right["QTCH"], right["QTCHL"]
    if without and with_lecture:
        retrieve = False in without and True in with_lecture
    else:
        retrieve = bool(problem.lecture.strip())
    return ["describe_image"] * bool(problem.image and problem.caption) + ["retrieve"] * retrieve


def traces(
    problems: Sequence[Problem],
    plans: Mapping[str, Sequence[str]],
    tools: Mapping[str, Tool],
    timeout: float,
) -> Iterator[dict[str, Any]]:
    """A trace for each question: {"pid", "tools", "turns": [{"tool", "argument", "result"}]}.

    Args:
      plans: by pid, the tools to call in order.
    """
    specs = [dataclasses.asdict(tool.spec) for tool in tools.values()]
    for start in range(0, len(problems), _BATCH):
        batch = problems[start : start + _BATCH]
        calls = [(p, tools[name].call_for(p)) for p in batch for name in plans[p.pid] if name in tools]
        turns: dict[str, list[dict[str, str]]] = {p.pid: [] for p in batch}
        for (problem, call), result in zip(calls, call_tools(dict(tools), calls, timeout), strict=True):
            if result.status in ("ok", "empty"):
                turns[problem.pid].append({"tool": call.tool, "argument": call.argument, "result": result.text})
        for problem in batch:
            yield {"pid": problem.pid, "tools": specs, "turns": turns[problem.pid]}
