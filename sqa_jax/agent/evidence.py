"""Traces to learn from: which calls, with which results, before the data's own answer.

`config.agent.evidence` says what tells that a call is worth it:

    student   the student's own answers: a call that makes the right one more probable (by `config.agent.gain`)
    records   the data and a teacher's replies: the image is looked at where there is one; the lecture is looked up
              where the teacher was wrong without it and right with it (settings QTCH and QTCHL), and where there is
              no pair of replies, wherever the question has one
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqa_jax.agent.tools import Tool, call_tools
from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import TeacherRecord

KINDS = ("student", "records")
_AT_ONCE = 256  # questions whose calls are made together


def calls_by_records(problem: Problem, records: Iterable[TeacherRecord]) -> list[str]:
    """Which tools would have changed the answer, as the data and a teacher's replies tell."""
    right: dict[str, set[bool]] = {"QTCH": set(), "QTCHL": set()}
    for record in records:
        if record.setting in right and record.answer is not None:
            right[record.setting].add(record.answer == problem.answer)
    without, having = right["QTCH"], right["QTCHL"]
    lecture = (False in without and True in having) if without and having else bool(problem.lecture.strip())
    return ["describe_image"] * bool(problem.image and problem.caption) + ["retrieve"] * lecture


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
    for start in range(0, len(problems), _AT_ONCE):
        batch = problems[start : start + _AT_ONCE]
        asked = [(p, tools[name].call_for(p)) for p in batch for name in plans[p.pid] if name in tools]
        turns: dict[str, list[dict[str, str]]] = {p.pid: [] for p in batch}
        for (problem, call), result in zip(asked, call_tools(dict(tools), asked, timeout), strict=True):
            if result.status in ("ok", "empty"):
                turns[problem.pid].append({"tool": call.tool, "argument": call.argument, "result": result.text})
        for problem in batch:
            yield {"pid": problem.pid, "tools": specs, "turns": turns[problem.pid]}
