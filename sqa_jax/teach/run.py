"""Asking: many requests at once, evenly spaced, tried again after errors that pass, within the budget.

An attempt is written into the ledger, sent, and its reply committed there before it counts. Everything but the
sending itself happens in one thread, the event loop's.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Sequence

import tenacity
from aiolimiter import AsyncLimiter

from sqa_jax.errors import UserError
from sqa_jax.signals import StopSignal
from sqa_jax.teach.budget import Budget, Prices
from sqa_jax.teach.ledger import Ledger, Outcome
from sqa_jax.teach.teacher import LocalTeacher, Refused, RemoteTeacher, Reply, Request, Transient

_LONGEST = 60.0  # seconds between two tries, unless the service asks for more


@dataclasses.dataclass
class Run:
    """How a run went.

    Attributes:
      ended: why it stopped early: "budget"; "signal"; "refused" (every question would be); "failing" (too many
        questions in a row got no reply); "" where it came to its end.
      said: the last error, in the service's words.
      failed: {pid: why it has no reply}.
    """

    ended: str = ""
    said: str = ""
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


class Progress:
    """A bar with the replies, the money and the time that is left."""

    def __init__(self, total: int, done: int, budget: Budget):
        from tqdm import tqdm

        self._budget = budget
        self._bar = tqdm(total=total, initial=done, unit="reply", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, replies: int = 1) -> None:
        self._bar.update(replies)
        self.money()

    def money(self, note: str = "") -> None:
        paid = f"${self._budget.spent:.4f} of ${self._budget.limit:g}" if self._budget.limit != float("inf") else ""
        self._bar.set_postfix_str(", ".join(filter(None, (paid, note))))


class _Stopped(Exception):
    """The run ends; this request was not sent."""


def backoff(settings) -> tenacity.wait.wait_base:
    """Doubling waits with full jitter; never shorter than the service asked for."""
    doubling = tenacity.wait_random_exponential(multiplier=settings.backoff, max=_LONGEST)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return doubling(state) + (error.retry_after if isinstance(error, Transient) else 0.0)

    return wait


class RemoteRun:
    """Asks a service.

    Args:
      settings: `config.teach`.
      known_good: this teacher has answered before, so a refusal is about one question, not about all.
    """

    def __init__(
        self, teacher: RemoteTeacher, ledger: Ledger, budget: Budget, prices: Prices, settings, stop: StopSignal,
        progress: Progress, known_good: bool,
    ):  # fmt: skip
        self.teacher, self.ledger, self.budget, self.prices, self.settings = teacher, ledger, budget, prices, settings
        self.signal, self.progress, self.good = stop, progress, known_good
        self.result = Run()
        self.in_a_row = 0  # questions without a reply since the last that got one
        self.resume = 0.0  # when the service wants to hear from us again

    def __call__(self, requests: Sequence[Request]) -> Run:
        asyncio.run(self._run(collections.deque(requests)))
        return self.result

    async def _run(self, queue: collections.deque[Request]) -> None:
        settings, loop = self.settings, asyncio.get_running_loop()
        self.halted, self.released = asyncio.Event(), asyncio.Event()
        rate = settings.requests_per_minute
        # One at a time every 60/rate seconds: a burst of a minute's worth is what services answer with 429.
        self.limiter = AsyncLimiter(1, 60 / rate) if rate > 0 else None
        self.pool = concurrent.futures.ThreadPoolExecutor(settings.concurrency, "teacher")
        self.signal.on_stop = lambda: loop.call_soon_threadsafe(self._halt, "signal")
        if self.signal.asked:  # before anybody listened
            self._halt("signal")
        try:
            # All of them come to their end, whatever happens to one: replies under way are paid for.
            ends = await asyncio.gather(
                *(self._work(queue) for _ in range(settings.concurrency)), return_exceptions=True
            )
        finally:
            self.signal.on_stop = lambda: None
            self.pool.shutdown()
        if error := next((end for end in ends if end is not None), None):
            raise error

    def _halt(self, why: str, said: str = "") -> None:
        """Nothing more is sent; the first reason is kept."""
        if not self.halted.is_set():
            self.result.ended, self.result.said = why, said
            self.halted.set()

    async def _unless_halted(self, awaitable: Awaitable) -> None:
        """Waits for something. Raises `_Stopped` where the run ends first."""
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

    async def _work(self, queue: collections.deque[Request]) -> None:
        settings = self.settings
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(settings.retries + 1), wait=backoff(settings), sleep=self._sleep,
            retry=tenacity.retry_if_exception_type(Transient), reraise=True,
        )  # fmt: skip
        while queue and not self.halted.is_set():
            request = queue.popleft()
            try:
                await retrying(self._attempt, request)
            except _Stopped:
                return
            except Transient as error:
                self.result.failed[request.pid] = self.result.said = str(error)
                self.in_a_row += 1
                if self.in_a_row > settings.concurrency:
                    self._halt("failing", str(error))
            except Refused as error:
                if error.every or not self.good:
                    self._halt("refused", f"question {request.pid}: {error}" if not error.every else str(error))
                else:
                    self.result.failed[request.pid] = self.result.said = str(error)
            except BaseException:
                self._halt("error")
                raise

    async def _attempt(self, request: Request) -> None:
        # Priced anew each time: a reply that was dearer than it could be makes the following ones dearer.
        while not self.budget.reserve(most := self.prices.most(request)):
            if self.budget.idle:
                self._halt("budget")
                raise _Stopped
            self.released.clear()
            await self._unless_halted(self.released.wait())
        paid = 0.0
        try:
            await self._turn()
            if self.halted.is_set():
                raise _Stopped
            (attempt,) = self.ledger.begin([request], [most])
            paid = most  # until it is known to be less
            reply = await self._send(attempt, request)
            if isinstance(reply, Reply):
                paid = self.prices.of(reply, most)
                self.ledger.end([Outcome(attempt, reply, paid)])
            else:
                paid = most if reply[1] else 0.0
                self.ledger.end([Outcome(attempt, error=str(reply[0]), maybe_paid=reply[1])])
                raise reply[0]
        finally:
            self.budget.settle(most, paid)
            self.released.set()
        self.good, self.in_a_row = True, 0
        self.progress.advance()

    async def _turn(self) -> None:
        """Waits until the rate limit and the service allow another request."""
        while True:
            while (wait := self.resume - time.monotonic()) > 0:
                await self._sleep(wait)
            if self.limiter:
                await self._unless_halted(self.limiter.acquire())
            # While this one stood in line, another may have been told to wait.
            if self.resume <= time.monotonic():
                return

    async def _send(self, attempt: int, request: Request) -> Reply | tuple[Exception, bool]:
        """The reply; or what went wrong, and whether it may have been charged."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, self.teacher.ask, request)
        except Transient as error:
            if error.retry_after:
                self.resume = max(self.resume, time.monotonic() + error.retry_after)
                self.progress.money(f"the service asks to wait {error.retry_after:.0f} s")
            return error, error.maybe_paid
        except (Refused, UserError) as error:  # the second: an image that has gone meanwhile; nothing was sent
            return error, False


def run_local(
    teacher: LocalTeacher, requests: Sequence[Request], ledger: Ledger, stop: StopSignal, progress: Progress
) -> Run:
    """Asks a teacher in this process."""
    with contextlib.closing(teacher.ask_all(requests)) as chunks:
        for chunk in chunks:
            ledger.keep(chunk, teacher.price)
            progress.advance(len(chunk))
            if stop.asked:
                return Run("signal")
    return Run()
