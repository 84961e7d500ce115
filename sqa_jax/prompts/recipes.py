"""Distillation recipes: training examples (prompt and target) from a question and a teacher's replies to it.

An arm is a row of `ARMS`: whose answer and explanation is the target, and whether the prompt has the lecture. An arm
with several sources makes several examples of a question. Comments name the hypotheses of the study's design.

`config.recipe` filters a teacher's replies: only right answers (`teacher_right_only`: rejection sampling, Yuan et al.
2023, arXiv:2308.01825); several sampled replies per question (`samples`); with `vote` only those that agree with
their majority (self-consistency, Wang et al. 2023, arXiv:2203.11171); only questions with usable replies of certain
kinds (`require`), so that arms that learn from different replies learn from the same questions.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import KINDS, TeacherRecord
from sqa_jax.errors import UserError
from sqa_jax.prompts.formats import Format, answer_text, render_target

# source of an example → the kind of teacher record that it needs, None for none
SOURCES: dict[str, str | None] = {
    "gold": None,  # the data's own answer and solution
    "solution": "solution",  # a teacher's answer and solution
    "reasoning": "reasoning",  # a teacher's chain of thought: free text that argues towards its answer
    "correction": "solution",  # a teacher's answer and solution, its verdict, and the data's own solution
    "lecture": None,  # the lecture as plain text, without a question
}


class Example(NamedTuple):
    """One training example.

    Attributes:
      problem: the question.
      format: of prompt and target; None where there is no prompt and the target is plain text.
      target: the text to learn, without the end token.
      source: key of `SOURCES`.
      reply: the teacher's reply that the target is from, None for none.
    """

    problem: Problem
    format: Format | None
    target: str
    source: str
    reply: TeacherRecord | None = None


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm of the study: whose supervision, in which format.

    Attributes:
      sources: keys of `SOURCES`; each makes one example of a question (with several samples, one each).
      lecture: whether L is added to the prompt.
      targets: overrides the target format; "" keeps `config.recipe.format`'s.
    """

    sources: tuple[str, ...]
    lecture: bool = False
    targets: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of teacher records that it needs."""
        return tuple(dict.fromkeys(kind for source in self.sources if (kind := SOURCES[source])))


ARMS: dict[str, Arm] = {
    "golden": Arm(("gold",)),
    "golden_lecture": Arm(("gold",), lecture=True),
    "golden_answer_only": Arm(("gold",), targets="A"),
    "teacher_answer": Arm(("solution",)),  # H3.1
    "teacher_and_golden": Arm(("gold", "solution")),  # H3.2
    "teacher_cot": Arm(("reasoning",), targets="EA"),  # H3.3
    "teacher_lecture": Arm(("solution",), lecture=True),  # H3.4
    "mistakes": Arm(("correction",), lecture=True, targets="EA"),  # H3.5
    "domain_text": Arm(("lecture",), targets="A"),  # H3.6
}


def arm_of(recipe) -> Arm:
    """The row of `ARMS` that `config.recipe.arm` names.

    Raises:
      UserError: there is none.
    """
    if recipe.arm not in ARMS:
        raise UserError(f"config.recipe.arm is {recipe.arm!r}; choose one of {', '.join(ARMS)}")
    return ARMS[recipe.arm]


def arm_format(recipe) -> Format:
    """The format of an arm's prompts and targets; evaluation uses the same.

    Raises:
      UserError: the arm or the format is not known.
    """
    arm, fmt = arm_of(recipe), Format.parse(recipe.format)
    inputs = fmt.inputs + "L" if arm.lecture and "L" not in fmt.inputs else fmt.inputs
    return Format(inputs, arm.targets or fmt.targets)


def check_recipe(recipe, has_records: bool) -> None:
    """Checks the recipe before anything is loaded or tokenized.

    Raises:
      UserError: a setting is not known, or the arm needs teacher records and there are none.
    """
    for kind in recipe.require:
        if kind not in KINDS:
            raise UserError(f"config.recipe.require names {kind!r}; choose of {', '.join(KINDS)}")
    if recipe.samples < 0:
        raise UserError(f"config.recipe.samples is {recipe.samples}; it is a number of replies, or 0 for all")
    kinds = dict.fromkeys((*arm_of(recipe).kinds, *recipe.require))
    if kinds and not has_records:
        raise UserError(
            f"config.recipe.arm {recipe.arm!r} needs a teacher's {' and '.join(kinds)}; name files of replies in "
            "config.data.teacher (python -m sqa_jax.teach makes them), or ('sample',)"
        )


class Unusable(NamedTuple):
    """A question of which a source makes no example, and why."""

    pid: str
    reason: str


Records = Mapping[str, Sequence[TeacherRecord]]


def examples(problem: Problem, records: Records, recipe) -> list[Example | Unusable]:
    """The examples of one question in an arm.

    Args:
      records: {kind of record: this question's records}, in the order they were recorded.
      recipe: `config.recipe`.
    """
    arm, fmt = arm_of(recipe), arm_format(recipe)
    for kind in recipe.require:
        if isinstance(_usable(problem, records, kind, arm, recipe), Unusable):
            return [Unusable(problem.pid, f"config.recipe.require: no usable {kind}")]
    return [example for source in arm.sources for example in _examples(problem, fmt, source, records, arm, recipe)]


def _examples(
    problem: Problem, fmt: Format, source: str, records: Records, arm: Arm, recipe
) -> Sequence[Example | Unusable]:
    """The examples of one question from one source."""

    def example(answer: int, solution: str, reply: TeacherRecord | None = None) -> Example:
        target = render_target(fmt, problem.choices, answer, problem.lecture, solution, recipe.answer)
        return Example(problem, fmt, target, source, reply)

    if source == "gold":
        return [example(problem.answer, problem.solution)]
    if source == "lecture":
        text = problem.lecture.strip()
        return [Example(problem, None, text, source)] if text else [Unusable(problem.pid, "no lecture")]
    kind = SOURCES[source]
    assert kind is not None
    usable = _usable(problem, records, kind, arm, recipe)
    if isinstance(usable, Unusable):
        return [usable]
    if source == "correction":
        return [example(problem.answer, _correction(problem, reply, recipe.answer), reply) for reply in usable]
    return [example(_answer(reply), getattr(reply, source), reply) for reply in usable]


def _answer(reply: TeacherRecord) -> int:
    """The answer of a reply whose status is "ok"."""
    assert reply.answer is not None
    return reply.answer


def _correction(problem: Problem, reply: TeacherRecord, style: str) -> str:
    """An attempt, its verdict, and the right solution: the text before the right answer."""
    verdict = "right" if reply.answer == problem.answer else "wrong"
    attempt = answer_text(problem.choices, _answer(reply), style)
    # Not "The answer is …": that sentence comes once, at the end, where the answer is parsed.
    return f"First attempt: {attempt}. {reply.solution}\nThis is {verdict}.\n{problem.solution}"


def _usable(problem: Problem, records: Records, kind: str, arm: Arm, recipe) -> list[TeacherRecord] | Unusable:
    """The usable replies of a kind, at most `recipe.samples`; replies to prompts with the arm's lecture setting first."""
    replies = records.get(kind, ())
    usable = [record for record in replies if record.status == "ok" and kind in record.kinds]
    if not usable:
        status = replies[0].status if replies else "no record"
        return Unusable(problem.pid, f"teacher's {kind}: {'only an answer' if status == 'ok' else status}")
    # Which replies remain is the same in every arm, so that `recipe.require` keeps the same questions in all.
    if recipe.vote:
        votes = collections.Counter(record.answer for record in usable)
        winner = votes.most_common(1)[0][0]  # ties go to the answer that was recorded first
        usable = [record for record in usable if record.answer == winner]
    if recipe.teacher_right_only:
        usable = [record for record in usable if record.answer == problem.answer]
        if not usable:
            return Unusable(problem.pid, f"teacher's {kind}: answer is wrong (config.recipe.teacher_right_only)")
    usable.sort(key=lambda record: ("L" in record.setting) != arm.lecture)
    return usable[: recipe.samples or None]
