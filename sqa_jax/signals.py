"""SIGINT and SIGTERM: the first asks to stop when what is under way has been kept, the second ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class StopSignal:
    """While entered, remembers that a signal came.

    Attributes:
      asked: a signal came.
      name: which, "" before.
      on_stop: called when it comes, in the main thread.
    """

    def __init__(self) -> None:
        self.asked, self.name = False, ""
        self.on_stop: Callable[[], Any] = lambda: None
        self._event = threading.Event()

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, *_: Any) -> None:
        self.asked, self.name = True, signal.Signals(number).name
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        self._event.set()
        self.on_stop()

    def sleep(self, seconds: float) -> None:
        """Sleeps, less long where a signal comes."""
        self._event.wait(seconds)
