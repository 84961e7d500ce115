"""Recipes: from one question, and what the teacher said of it, to what a student reads and writes.

An arm is a row of `ARMS`: whose answer and explanation is the target (the data's own, "gold", or a kind of
teacher record), and whether the lecture is shown. An arm with several sources makes several examples of a
question. The hypothesis that each arm belongs to is named as in the study's design.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqa_jax.data.problem import Problem
from sqa_jax.data.prompts import Format, render_target
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.errors import UserError


class Example(NamedTuple):
    """One training example.

    Attributes:
      problem: the question as the prompt shows it.
      format: its prompt and target format.
      target: the text to learn, without the end token.
      source: "gold", "solution" or "reasoning": where the target is from.
    """

    problem: Problem
    format: Format
    target: str
    source: str


@dataclasses.dataclass(frozen=True)
class Arm:
    """Whose supervision, in which form.

    Attributes:
      sources: of "gold", "solution" (a teacher's answer and solution, from a JSON reply) and "reasoning"
        (a teacher's free text, a chain of thought): one example of a question each.
      lecture: True adds L to the prompt's parts.
      targets: overrides the target format; "" keeps `config.recipe.format`'s.
    """

    sources: tuple[str, ...]
    lecture: bool = False
    targets: str = ""


ARMS: dict[str, Arm] = {
    "golden": Arm(("gold",)),
    "golden_answer_only": Arm(("gold",), targets="A"),
    "teacher_answer": Arm(("solution",)),  # H3.1
    "teacher_and_golden": Arm(("gold", "solution")),  # H3.2
    "teacher_cot": Arm(("reasoning",), targets="EA"),  # H3.3
    "teacher_lecture": Arm(("solution",), lecture=True),  # H3.4
}


def arm_format(recipe) -> Format:
    """The format of an arm's prompts and targets; evaluation uses the same.

    Raises:
      UserError: the arm or the format is not known.
    """
    if recipe.arm not in ARMS:
        raise UserError(f"config.recipe.arm is {recipe.arm!r}; choose one of {', '.join(ARMS)}")
    arm, fmt = ARMS[recipe.arm], Format.parse(recipe.format)
    inputs = fmt.inputs + "L" if arm.lecture and "L" not in fmt.inputs else fmt.inputs
    return Format(inputs, arm.targets or fmt.targets)


class Unusable(NamedTuple):
    """A source that makes no example of a question, and why."""

    pid: str
    reason: str


def examples(problem: Problem, records: Mapping[str, Sequence[TeacherRecord]], recipe) -> list[Example | Unusable]:
    """What an arm makes of one question.

    Args:
      records: {kind of record: this question's records}, in the order they were recorded; the first usable
        one of each kind counts.
      recipe: `config.recipe`.
    """
    fmt = arm_format(recipe)
    return [_example(problem, fmt, source, records, recipe) for source in ARMS[recipe.arm].sources]


def _example(problem: Problem, fmt: Format, source: str, records, recipe) -> Example | Unusable:
    answer, solution = problem.answer, problem.solution
    if source != "gold":
        own = records.get(source, ())
        usable = [record for record in own if record.status == "ok"]
        if not usable:
            return Unusable(problem.pid, f"teacher's {source}: {own[0].status if own else 'no record'}")
        answer = usable[0].answer
        solution = usable[0].solution if source == "solution" else usable[0].reasoning
    target = render_target(fmt, problem.choices, answer, problem.lecture, solution, recipe.answer)
    return Example(problem, fmt, target, source)
