"""Exploration: a student's answer after every sequence of calls, from which thresholds, oracle and traces follow.

Each order of all the tools is one episode, scored at every turn; its scores before the first call, after one call and
after two are the student's answers had it stopped there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sqa_jax.agent.policies import decide
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError

MAX_ORDERS = 6
_GRID = 25  # candidate thresholds of each tool


class State(NamedTuple):
    """The student's scores after a sequence of calls.

    Attributes:
      answers: log-likelihood of each option.
      margins: as `Turn.margins`.
    """

    answers: tuple[float, ...]
    margins: Mapping[str, float]

    @property
    def answer(self) -> int:
        return int(np.argmax(self.answers))

    def probability(self, option: int) -> float:
        """Probability of an option, among all of them."""
        weights = np.exp(np.asarray(self.answers) - max(self.answers))
        return float(weights[option] / weights.sum())


States = dict[tuple[str, ...], State]  # of one question, by the calls made before


def orders(tools: Sequence[str], max_calls: int) -> list[tuple[str, ...]]:
    """The orders of calls whose episodes visit every state.

    Raises:
      UserError: there are too many.
    """
    permutations = list(itertools.permutations(tools, min(max_calls, len(tools))))
    if len(permutations) > MAX_ORDERS:
        raise UserError(
            f"{len(tools)} tools can be called in {len(permutations)} orders, too many to try all; use fewer tools, or leave out "
            "oracle and calibration (--config.agent.calibrate=0)"
        )
    return permutations


def states_of(rows: Iterable[Mapping[str, Any]]) -> States:
    """The states that the episodes of one question visited.

    Args:
      rows: one of each order.
    """
    states: States = {}
    for row in rows:
        calls: tuple[str, ...] = ()
        for turn in row["turns"]:
            if "answers" in turn:
                states[calls] = State(tuple(turn["answers"]), turn.get("margins", {}))
            else:
                calls = (*calls, turn["tool"])
    return states


def follow(states: States, thresholds: Mapping[str, float]) -> tuple[str, ...]:
    """The calls that a student with these thresholds makes."""
    calls: tuple[str, ...] = ()
    while (tool := decide(states[calls].margins, thresholds)) is not None and (*calls, tool) in states:
        calls = (*calls, tool)
    return calls


def helpful(problem: Problem, states: States) -> tuple[str, ...]:
    """The oracle: the fewest calls after which the answer is right, none where it never is."""
    right = [calls for calls, state in states.items() if state.answer == problem.answer]
    return min(right, key=len, default=())


def most_helpful(problem: Problem, states: States, gain: float) -> tuple[str, ...]:
    """The calls after which the right answer is most probable; each further call has to add `gain` to it.

    As in Toolformer (Schick et al. 2023, arXiv:2302.04761, section 2), where a call is kept that makes what follows
    more probable.
    """
    best: tuple[str, ...] = ()
    for calls in sorted(states, key=len):
        ahead = states[calls].probability(problem.answer) - states[best].probability(problem.answer)
        if ahead > 0 and ahead >= gain * (len(calls) - len(best)):
            best = calls
    return best


class Calibration(NamedTuple):
    """Thresholds, with their results on the questions that they were chosen on."""

    thresholds: dict[str, float]
    accuracy: float
    never: float
    calls: float
    n: int


def calibrate(problems: Sequence[Problem], states: Mapping[str, States], tools: Sequence[str]) -> Calibration:
    """The thresholds of the highest accuracy; of equally accurate ones those with the fewest calls.

    Coordinate ascent over a grid for each tool (quantiles of its margins, never and always), started from "never" and
    from "always".

    Args:
      states: by pid.
    """
    margins = {
        name: [s.margins[name] for p in problems for s in states[p.pid].values() if name in s.margins] for name in tools
    }
    grids = {
        name: [float("inf"), *np.quantile(values, np.linspace(1, 0, _GRID)).tolist()] if values else [float("inf")]
        for name, values in margins.items()
    }

    def value(thresholds: Mapping[str, float]) -> tuple[float, float]:
        followed = [(p, follow(states[p.pid], thresholds)) for p in problems]
        right = sum(states[p.pid][calls].answer == p.answer for p, calls in followed)
        return right / len(problems), -sum(len(calls) for _, calls in followed) / len(problems)

    best, best_value = {}, (-1.0, 0.0)
    for first in (0, -1):
        chosen, reached = {name: grid[first] for name, grid in grids.items()}, (-1.0, 0.0)
        while (current := value(chosen)) > reached:
            reached = current
            for name in tools:
                chosen[name] = max(grids[name], key=lambda t, name=name: value({**chosen, name: t}))
        if reached > best_value:
            best, best_value = dict(chosen), reached
    never = sum(states[p.pid][()].answer == p.answer for p in problems) / len(problems)
    return Calibration(best, best_value[0], never, -best_value[1], len(problems))
