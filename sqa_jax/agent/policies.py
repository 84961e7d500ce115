"""Who decides whether a tool is called: the student, by likelihood or in words, or a plan that is made beforehand."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sqa_jax.data.problem import Problem


class Turn(NamedTuple):
    """What a decision may depend on.

    Attributes:
      called: tools that were called, in order.
      legal: tools that still may be.
      margins: of each legal tool log p(its call begins) − log p(the answer begins); {} where nothing was weighed.
    """

    problem: Problem
    called: tuple[str, ...]
    legal: tuple[str, ...]
    margins: Mapping[str, float]


class Plan:
    """Calls what a plan says, in its order, then answers. The student decides nothing.

    Args:
      tools_of: the plan of a question.
      weigh: let the student weigh actions and answers at every turn all the same, for the record.
    """

    writes = False

    def __init__(self, tools_of: Callable[[Problem], Sequence[str]], weigh: bool = False):
        self._tools_of, self.weighs = tools_of, weigh

    def next(self, turn: Turn) -> str | None:
        """The tool to call, or None to answer."""
        return next((name for name in self._tools_of(turn.problem) if name in turn.legal), None)


class Constrained:
    """Calls the tool whose margin exceeds its threshold by most; only whole legal actions are ever chosen.

    Args:
      thresholds: of each tool, in nats.
    """

    weighs, writes = True, False

    def __init__(self, thresholds: Mapping[str, float]):
        self.thresholds = dict(thresholds)

    def next(self, turn: Turn) -> str | None:
        return decide(turn.margins, self.thresholds)


def decide(margins: Mapping[str, float], thresholds: Mapping[str, float]) -> str | None:
    """The tool whose margin exceeds its threshold by most, or None where none does; of equal ones the first."""
    excess = {name: margin - thresholds[name] for name, margin in margins.items()}
    best = max(excess, key=excess.get, default=None)
    return best if best is not None and excess[best] >= 0 else None


class Free:
    """The student writes what it likes, and its text is read."""

    weighs, writes = False, True

    def next(self, turn: Turn) -> str | None:
        return None  # asked only when its turns are used up: then it has to answer


def at_random(rates: Mapping[str, float], seed: int) -> Callable[[Problem], list[str]]:
    """A plan that calls each tool with a probability of its own, as a function of the seed and the question alone."""

    def tools_of(problem: Problem) -> list[str]:
        draw = random.Random(f"{seed}/{problem.pid}")
        return [name for name, rate in rates.items() if draw.random() < rate]

    return tools_of
