"""Batch jobs: handed in once, found again after a crash, collected when they are ready.

A job is in the ledger under a name of ours before it is handed in. If the process dies before the service's own
name is known, the job is looked for by ours; only where there is none was it never handed in.
"""

from __future__ import annotations

import collections
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tenacity

from sqa_jax.signals import StopSignal
from sqa_jax.teach.budget import Budget, Prices
from sqa_jax.teach.genai import BATCH_BYTES, GenAI
from sqa_jax.teach.ledger import Ledger, Outcome
from sqa_jax.teach.run import Progress, Run, backoff
from sqa_jax.teach.teacher import Refused, Reply, Request, Transient

T = TypeVar("T")


class BatchRun:
    """Asks through batch jobs.

    Args:
      settings: `config.teach`.
      budget: has the attempts of jobs under way among what is spent.
    """

    def __init__(
        self, teacher: GenAI, ledger: Ledger, budget: Budget, prices: Prices, settings, stop: StopSignal, progress: Progress
    ):  # fmt: skip
        self.teacher, self.ledger, self.budget, self.prices, self.settings = teacher, ledger, budget, prices, settings
        self.stop, self.progress = stop, progress
        self.run = Run()

    def __call__(self, requests: Sequence[Request]) -> Run:
        run = self.run
        try:
            for name, job in self.ledger.open_batches():
                if job is None:
                    self._find_again(name)
            under_way = {
                row["hash"] for name, _ in self.ledger.open_batches() for row in self.ledger.batch_attempts(name)
            }
            queue = collections.deque(request for request in requests if request.hash not in under_way)
            while not self.stop.asked:
                while queue and (chunk := self._take(queue)) and not self.stop.asked:
                    self._submit(chunk)
                if not self.ledger.open_batches():
                    run.ended = "budget" if queue else ""
                    return run
                self._wait()
            run.ended = "signal"
        except Refused as error:
            run.ended, run.said = "refused", str(error)
        except Transient as error:
            run.ended, run.said = ("signal" if self.stop.asked else "failing"), str(error)
        return run

    def _persist(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls the service, again after errors that pass."""
        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.settings.retries + 1) | (lambda _: self.stop.asked),
            wait=backoff(self.settings), sleep=self.stop.sleep,
            retry=tenacity.retry_if_exception_type(Transient), reraise=True,
        )(function, *arguments)  # fmt: skip

    def _find_again(self, name: str) -> None:
        """Finds a job that was being handed in when the process ended."""
        job = self._persist(self.teacher.find, name)
        if job is not None:
            self.ledger.accept_batch(name, job)
            return
        attempts = self.ledger.batch_attempts(name)
        self.ledger.end([Outcome(row["id"], error="the batch job was never handed in") for row in attempts], name)
        self.budget.spent -= sum(row["reserved"] for row in attempts)

    def _take(self, queue: collections.deque[Request]) -> list[Request]:
        """As many of the next requests as one job and the budget hold; none where not even one fits."""
        chunk: list[Request] = []
        size = 0
        while queue and len(chunk) < self.settings.batch_requests:
            size += self.teacher.request_bytes(queue[0])
            most = self.prices.most(queue[0])
            if (chunk and size > BATCH_BYTES) or not self.budget.reserve(most):
                break
            # From here on it counts as spent: unlike a request, a job outlives the process.
            self.budget.settle(most, most)
            chunk.append(queue.popleft())
        return chunk

    def _submit(self, chunk: Sequence[Request]) -> None:
        # Of this job alone: another workdir, or one that was removed, may have handed in the same questions.
        name = f"sqa-jax-{secrets.token_hex(12)}"
        self.ledger.begin(chunk, [self.prices.most(request) for request in chunk], name)
        handed_in = False

        def hand_in() -> str:
            nonlocal handed_in
            # An earlier try may have arrived although its answer did not.
            job = self.teacher.find(name) if handed_in else None
            handed_in = True
            return job or self.teacher.submit(name, chunk)

        try:
            self.ledger.accept_batch(name, self._persist(hand_in))
        except Refused as error:
            rows = self.ledger.batch_attempts(name)
            self.ledger.end([Outcome(row["id"], error=str(error)) for row in rows], name)
            self.budget.spent -= sum(row["reserved"] for row in rows)
            raise
        self.progress.money(f"{len(self.ledger.open_batches())} batch jobs under way")

    def _wait(self) -> None:
        """Collects the jobs that have ended; sleeps where none has."""
        ended = False
        for name, job in self.ledger.open_batches():
            rows = self.ledger.batch_attempts(name)
            end = self._persist(self.teacher.collect, job, [row["hash"] for row in rows])
            if end is None:
                continue
            ended, outcomes = True, []
            for row in rows:
                reply = end.replies.get(row["hash"], end.said)
                if isinstance(reply, Reply):
                    price = self.prices.of(reply, row["reserved"])
                    self.budget.spent += price - row["reserved"]
                    outcomes.append(Outcome(row["id"], reply, price))
                else:
                    self.budget.spent -= 0.0 if end.maybe_paid else row["reserved"]
                    outcomes.append(Outcome(row["id"], error=reply, maybe_paid=end.maybe_paid))
                    self.run.failed[row["pid"]] = self.run.said = reply
            self.ledger.end(outcomes, name)
            self.progress.advance(sum(outcome.reply is not None for outcome in outcomes))
        if not ended:
            self.progress.money(f"{len(self.ledger.open_batches())} batch jobs under way")
            self.stop.sleep(self.settings.poll_seconds)
