"""SIGINT and SIGTERM: the first requests a stop after the work in progress is saved, the second ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class StopSignal:
    """While entered, records that a signal was received.

    Attributes:
      asked: a signal was received.
      name: its name, "" before.
      on_stop: called when it is received, in the main thread.
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
        """Sleeps until the time is over or a signal is received."""
        self._event.wait(seconds)
