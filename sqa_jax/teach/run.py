"""Sending requests concurrently, with rate limiting, retries with exponential backoff, and a budget.

Each attempt is recorded in the ledger, sent, and its reply committed there before it counts. Everything but the
blocking call itself runs on one thread, the event loop's.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import tenacity
from aiolimiter import AsyncLimiter

from sqa_jax.errors import UserError
from sqa_jax.signals import StopSignal
from sqa_jax.teach.budget import Budget, Prices
from sqa_jax.teach.ledger import Ledger, Outcome
from sqa_jax.teach.teacher import LocalTeacher, RefusedError, RemoteTeacher, Reply, Request, TransientError

_MAX_BACKOFF = 60.0  # seconds between two attempts, unless the service asks for more


@dataclasses.dataclass
class RunResult:
    """The outcome of a run.

    Attributes:
      ended: why it stopped early: "budget"; "signal"; "refused" (every request would be); "failing" (too many
        consecutive questions got no reply); "" if it completed.
      last_error: the service's message.
      failed: {pid: why it has no reply}.
    """

    ended: str = ""
    last_error: str = ""
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


class Progress:
    """A progress bar with replies, money spent and remaining time."""

    def __init__(self, total: int, done: int, budget: Budget):
        from tqdm import tqdm

        self._budget = budget
        self._bar = tqdm(total=total, initial=done, unit="reply", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def advance(self, replies: int = 1) -> None:
        self._bar.update(replies)
        self.refresh()

    def refresh(self, note: str = "") -> None:
        paid = f"${self._budget.spent:.4f} of ${self._budget.limit:g}" if self._budget.limit != float("inf") else ""
        self._bar.set_postfix_str(", ".join(filter(None, (paid, note))))


class _Stopped(Exception):
    """The run is stopping; this request was not sent."""


def backoff(settings: Any) -> Callable[[tenacity.RetryCallState], float]:
    """Exponential backoff with full jitter, on top of what the service asked to wait."""
    exponential = tenacity.wait_random_exponential(multiplier=settings.backoff, max=_MAX_BACKOFF)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return exponential(state) + (error.retry_after if isinstance(error, TransientError) else 0.0)

    return wait


class RemoteRunner:
    """Sends requests to a service, `config.teach.concurrency` at a time.

    Args:
      settings: `config.teach`.
      known_good: this teacher has replied before, so a refusal concerns one request, not all.
    """

    def __init__(
        self, teacher: RemoteTeacher, ledger: Ledger, budget: Budget, prices: Prices, settings: Any, stop: StopSignal,
        progress: Progress, known_good: bool,
    ):  # fmt: skip
        self.teacher, self.ledger, self.budget, self.prices, self.settings = teacher, ledger, budget, prices, settings
        self.signal, self.progress, self.good = stop, progress, known_good
        self.result = RunResult()
        self.consecutive_failures = 0  # questions without a reply since the last reply
        self.resume_at = 0.0  # monotonic time before which the service asked not to be called

    def __call__(self, requests: Sequence[Request]) -> RunResult:
        asyncio.run(self._run(collections.deque(requests)))
        return self.result

    async def _run(self, queue: collections.deque[Request]) -> None:
        settings, loop = self.settings, asyncio.get_running_loop()
        self.halted, self.released = asyncio.Event(), asyncio.Event()
        rate = settings.requests_per_minute
        # One request every 60/rate seconds: a burst of a whole minute's allowance is answered with 429.
        self.limiter = AsyncLimiter(1, 60 / rate) if rate > 0 else None
        self.pool = concurrent.futures.ThreadPoolExecutor(settings.concurrency, "teacher")
        self.signal.on_stop = lambda: loop.call_soon_threadsafe(self._halt, "signal")
        if self.signal.asked:  # before `on_stop` was set
            self._halt("signal")
        try:
            # Every worker runs to its end, even if another fails: replies in flight are paid for.
            ends = await asyncio.gather(
                *(self._worker(queue) for _ in range(settings.concurrency)), return_exceptions=True
            )
        finally:
            self.signal.on_stop = lambda: None
            self.pool.shutdown()
        if error := next((end for end in ends if end is not None), None):
            raise error

    def _halt(self, reason: str, message: str = "") -> None:
        """Sends nothing more; the first reason is kept."""
        if not self.halted.is_set():
            self.result.ended, self.result.last_error = reason, message
            self.halted.set()

    async def _unless_halted(self, awaitable: Awaitable) -> None:
        """Awaits something. Raises `_Stopped` if the run halts first."""
        tasks = [asyncio.ensure_future(awaitable), asyncio.ensure_future(self.halted.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self.halted.is_set():
            raise _Stopped

    async def _sleep(self, seconds: float) -> None:
        await self._unless_halted(asyncio.sleep(seconds))

    async def _worker(self, queue: collections.deque[Request]) -> None:
        settings = self.settings
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(settings.retries + 1), wait=backoff(settings), sleep=self._sleep,
            retry=tenacity.retry_if_exception_type(TransientError), reraise=True,
        )  # fmt: skip
        while queue and not self.halted.is_set():
            request = queue.popleft()
            try:
                await retrying(self._attempt, request)
            except _Stopped:
                return
            except TransientError as error:
                self.result.failed[request.pid] = self.result.last_error = str(error)
                self.consecutive_failures += 1
                if self.consecutive_failures > settings.concurrency:
                    self._halt("failing", str(error))
            except RefusedError as error:
                if error.every_request or not self.good:
                    self._halt("refused", f"question {request.pid}: {error}" if not error.every_request else str(error))
                else:
                    self.result.failed[request.pid] = self.result.last_error = str(error)
            except BaseException:
                self._halt("error")
                raise

    async def _attempt(self, request: Request) -> None:
        # The upper bound is computed anew for each attempt: `Prices.of` may have scaled it.
        while not self.budget.reserve(bound := self.prices.upper_bound(request)):
            if self.budget.idle:
                self._halt("budget")
                raise _Stopped
            self.released.clear()
            await self._unless_halted(self.released.wait())
        paid = 0.0
        try:
            await self._wait_for_turn()
            if self.halted.is_set():
                raise _Stopped
            (attempt,) = self.ledger.record_attempts([request], [bound])
            paid = bound  # until it is known to be less
            reply = await self._send(request)
            if isinstance(reply, Reply):
                paid = self.prices.of(reply, bound)
                self.ledger.record_outcomes([Outcome(attempt, reply, paid)])
            else:
                error, maybe_paid = reply
                paid = bound if maybe_paid else 0.0
                self.ledger.record_outcomes([Outcome(attempt, error=str(error), maybe_paid=maybe_paid)])
                raise error
        finally:
            self.budget.settle(bound, paid)
            self.released.set()
        self.good, self.consecutive_failures = True, 0
        self.progress.advance()

    async def _wait_for_turn(self) -> None:
        """Waits until the rate limiter and the service's Retry-After allow another request."""
        while True:
            while (wait := self.resume_at - time.monotonic()) > 0:
                await self._sleep(wait)
            if self.limiter:
                await self._unless_halted(self.limiter.acquire())
            # Meanwhile another request may have received a Retry-After.
            if self.resume_at <= time.monotonic():
                return

    async def _send(self, request: Request) -> Reply | tuple[Exception, bool]:
        """The reply; or the error, and whether the request may have been charged."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, self.teacher.ask, request)
        except TransientError as error:
            if error.retry_after:
                self.resume_at = max(self.resume_at, time.monotonic() + error.retry_after)
                self.progress.refresh(f"the service asks to wait {error.retry_after:.0f} s")
            return error, error.maybe_paid
        except (RefusedError, UserError) as error:  # UserError: the image file has disappeared; nothing was sent
            return error, False


def run_local(
    teacher: LocalTeacher, requests: Sequence[Request], ledger: Ledger, stop: StopSignal, progress: Progress
) -> RunResult:
    """Runs a teacher in this process, and records its replies chunk by chunk."""
    with contextlib.closing(teacher.ask_all(requests)) as chunks:
        for chunk in chunks:
            ledger.record_replies(chunk, teacher.price)
            progress.advance(len(chunk))
            if stop.asked:
                return RunResult("signal")
    return RunResult()
