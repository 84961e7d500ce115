"""Batch jobs: submitted exactly once, recovered after a crash, collected when they are done.

A job is recorded in the ledger under a random display name before it is submitted. If the process dies before the
service's name is known, the job is searched by display name; only if there is none was it never submitted.
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
from sqa_jax.teach.run import Progress, RunResult, backoff
from sqa_jax.teach.teacher import RefusedError, Reply, Request, TransientError

T = TypeVar("T")


class BatchRunner:
    """Sends requests in batch jobs.

    Args:
      settings: `config.teach`.
      budget: the attempts of running jobs already count as spent.
    """

    def __init__(
        self, teacher: GenAI, ledger: Ledger, budget: Budget, prices: Prices, settings: Any, stop: StopSignal,
        progress: Progress,
    ):  # fmt: skip
        self.teacher, self.ledger, self.budget, self.prices, self.settings = teacher, ledger, budget, prices, settings
        self.stop, self.progress = stop, progress
        self.result = RunResult()

    def __call__(self, requests: Sequence[Request]) -> RunResult:
        result = self.result
        try:
            for name, job in self.ledger.open_batch_jobs():
                if job is None:
                    self._recover(name)
            in_flight = {
                row["hash"] for name, _ in self.ledger.open_batch_jobs() for row in self.ledger.pending_attempts(name)
            }
            queue = collections.deque(request for request in requests if request.hash not in in_flight)
            while not self.stop.asked:
                while queue and (chunk := self._take_chunk(queue)) and not self.stop.asked:
                    self._submit(chunk)
                if not self.ledger.open_batch_jobs():
                    result.ended = "budget" if queue else ""
                    return result
                self._collect_or_wait()
            result.ended = "signal"
        except RefusedError as error:
            result.ended, result.last_error = "refused", str(error)
        except TransientError as error:
            result.ended, result.last_error = ("signal" if self.stop.asked else "failing"), str(error)
        return result

    def _retry(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls the service, with retries after transient errors."""
        exhausted = tenacity.stop_after_attempt(self.settings.retries + 1)
        return tenacity.Retrying(
            stop=lambda state: exhausted(state) or self.stop.asked,
            wait=backoff(self.settings), sleep=self.stop.sleep,
            retry=tenacity.retry_if_exception_type(TransientError), reraise=True,
        )(function, *arguments)  # fmt: skip

    def _recover(self, name: str) -> None:
        """Finds a job that was being submitted when the process ended."""
        job = self._retry(self.teacher.find, name)
        if job is not None:
            self.ledger.confirm_batch_job(name, job)
            return
        attempts = self.ledger.pending_attempts(name)
        self.ledger.record_outcomes(
            [Outcome(row["id"], error="the batch job was never submitted") for row in attempts], name
        )
        self.budget.spent -= sum(row["reserved"] for row in attempts)

    def _take_chunk(self, queue: collections.deque[Request]) -> list[Request]:
        """As many of the next requests as one job and the budget hold; empty if not even one fits the budget."""
        chunk: list[Request] = []
        size = 0
        while queue and len(chunk) < self.settings.batch_requests:
            size += self.teacher.request_bytes(queue[0])
            bound = self.prices.upper_bound(queue[0])
            if (chunk and size > BATCH_BYTES) or not self.budget.reserve(bound):
                break
            # From here on it counts as spent: unlike a single request, a job outlives the process.
            self.budget.settle(bound, bound)
            chunk.append(queue.popleft())
        return chunk

    def _submit(self, chunk: Sequence[Request]) -> None:
        # Random: another workdir, or one that was deleted, may have submitted the same questions.
        name = f"sqa-jax-{secrets.token_hex(12)}"
        self.ledger.record_attempts(chunk, [self.prices.upper_bound(request) for request in chunk], name)
        submitted = False

        def submit() -> str:
            nonlocal submitted
            # An earlier attempt may have arrived although its response did not.
            job = self.teacher.find(name) if submitted else None
            submitted = True
            return job or self.teacher.submit(name, chunk)

        try:
            self.ledger.confirm_batch_job(name, self._retry(submit))
        except RefusedError as error:
            rows = self.ledger.pending_attempts(name)
            self.ledger.record_outcomes([Outcome(row["id"], error=str(error)) for row in rows], name)
            self.budget.spent -= sum(row["reserved"] for row in rows)
            raise
        self.progress.refresh(f"{len(self.ledger.open_batch_jobs())} batch jobs running")

    def _collect_or_wait(self) -> None:
        """Collects the jobs that have ended; sleeps if there is none."""
        any_ended = False
        for name, job in self.ledger.open_batch_jobs():
            rows = self.ledger.pending_attempts(name)
            result = self._retry(self.teacher.collect, job, [row["hash"] for row in rows])
            if result is None:
                continue
            any_ended, outcomes = True, []
            for row in rows:
                reply = result.replies.get(row["hash"], result.message)
                if isinstance(reply, Reply):
                    price = self.prices.of(reply, row["reserved"])
                    self.budget.spent += price - row["reserved"]
                    outcomes.append(Outcome(row["id"], reply, price))
                else:
                    self.budget.spent -= 0.0 if result.maybe_paid else row["reserved"]
                    outcomes.append(Outcome(row["id"], error=reply, maybe_paid=result.maybe_paid))
                    self.result.failed[row["pid"]] = self.result.last_error = reply
            self.ledger.record_outcomes(outcomes, name)
            self.progress.advance(sum(outcome.reply is not None for outcome in outcomes))
        if not any_ended:
            self.progress.refresh(f"{len(self.ledger.open_batch_jobs())} batch jobs running")
            self.stop.sleep(self.settings.poll_seconds)
