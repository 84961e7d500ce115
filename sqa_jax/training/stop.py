"""The vote on stopping: a signal to one process stops all of them after the same step."""

from __future__ import annotations

import jax

from sqa_jax.parallel.processes import Votes
from sqa_jax.signals import StopSignal


class StopVote:
    """Whether all processes stop. Each votes once a step; the votes are counted on the devices and read a step later.

    Attributes:
      decided: training stops after the step that was dispatched last.
    """

    def __init__(self, signal: StopSignal):
        self._signal, self._votes, self.decided = signal, Votes(), False

    def vote(self) -> bool | jax.Array:
        """Votes for stopping if a signal came; the result, which may still be on its way, goes to `decide`."""
        return self._votes.any_process(self._signal.asked)

    def decide(self, result: bool) -> None:
        """Takes a step's result into account. A process that is alone need not wait for its own vote."""
        self.decided |= result or (self._votes.alone and self._signal.asked)

    @property
    def asked(self) -> bool:
        """A signal came, to this process or by decision."""
        return self.decided or self._signal.asked

    @property
    def reason(self) -> str:
        """Why training stopped before its last step."""
        if not self.decided:
            return "config.train.stop_after"
        return self._signal.name or "a signal to another process"
