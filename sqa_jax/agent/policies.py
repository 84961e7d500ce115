"""Policies: who decides whether a tool is called. The student by likelihood or in text, or a plan made beforehand."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from sqa_jax.data.problem import Problem


class Turn(NamedTuple):
    """What a decision may depend on.

    Attributes:
      called: tools that were called, in order.
      legal: tools that may still be called.
      margins: of each legal tool log p(start of its call) − log p(start of the answer); {} where nothing was scored.
    """

    problem: Problem
    called: tuple[str, ...]
    legal: tuple[str, ...]
    margins: Mapping[str, float]


@runtime_checkable
class Policy(Protocol):
    """Decides at each turn of an episode.

    Attributes:
      scores: the student scores all legal actions and answers at every turn.
      generates: the student generates text, which is parsed into a call or an answer.
    """

    @property
    def scores(self) -> bool: ...

    @property
    def generates(self) -> bool: ...

    def next(self, turn: Turn) -> str | None:
        """The tool to call, or None to answer."""
        ...


class Plan:
    """Calls the tools of a plan in its order, then answers. The student decides nothing.

    Args:
      tools_of: the plan of a question.
      score: let the student score actions and answers at every turn all the same, for the record.
    """

    generates = False

    def __init__(self, tools_of: Callable[[Problem], Sequence[str]], score: bool = False):
        self._tools_of, self.scores = tools_of, score

    def next(self, turn: Turn) -> str | None:
        return next((name for name in self._tools_of(turn.problem) if name in turn.legal), None)


class Constrained:
    """Calls the tool whose margin exceeds its threshold by most; only whole legal actions are ever chosen.

    Args:
      thresholds: of each tool, in nats.
    """

    scores, generates = True, False

    def __init__(self, thresholds: Mapping[str, float]):
        self.thresholds = dict(thresholds)

    def next(self, turn: Turn) -> str | None:
        return decide(turn.margins, self.thresholds)


def decide(margins: Mapping[str, float], thresholds: Mapping[str, float]) -> str | None:
    """The tool whose margin exceeds its threshold by most, or None where none does; of equal ones the first."""
    excess = {name: margin - thresholds[name] for name, margin in margins.items()}
    best = max(excess, key=lambda name: excess[name], default=None)
    return best if best is not None and excess[best] >= 0 else None


class Free:
    """The student generates free text, which is parsed into a call or an answer."""

    scores, generates = False, True

    def next(self, turn: Turn) -> str | None:
        return None  # asked only when its turns are used up: then it has to answer


def random_plan(rates: Mapping[str, float], seed: int) -> Callable[[Problem], list[str]]:
    """A plan that calls each tool with its given probability, a function of the seed and the question alone."""

    def tools_of(problem: Problem) -> list[str]:
        draw = random.Random(f"{seed}/{problem.pid}")
        return [name for name, rate in rates.items() if draw.random() < rate]

    return tools_of
