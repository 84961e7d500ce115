"""Several real processes that run together, with their output in files.

They are forked from one process that has imported everything already, so that each starts in no time; apart from that
they are what `python ARGUMENTS` starts: their environment, signals and ends are their own.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

_GRACE = 45.0  # seconds that processes have to notice that another has failed: its heartbeats, and their own ends


class Started(NamedTuple):
    """A process, and the files of its stdout and stderr."""

    process: multiprocessing.process.BaseProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(arguments: Callable[[int], Sequence[object]], processes: int, devices: int = 4) -> list[Started]:
    """Starts `python ARGUMENTS(index)` for each index, with the devices divided among the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.runs"])
    flags = (
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices // processes}"  # the last counts
    )
    environment = {**os.environ, "XLA_FLAGS": flags}
    folder, started = Path(tempfile.mkdtemp()), []
    for index in range(processes):
        out, err = folder / f"{index}.out", folder / f"{index}.err"
        argv = [*map(str, arguments(index))]
        # Daemonic: a test that fails before it waits leaves nothing running.
        process = context.Process(target=_python, args=(argv, environment, str(out), str(err)), daemon=True)
        process.start()
        started.append(Started(process, out, err))
    return started


def wait_for_all(started: Sequence[Started], seconds: float = 240.0) -> list[Ended]:
    """How each process ended. Once one has failed, the others must end soon; none outlives the call."""
    deadline, running = time.monotonic() + seconds, {each.process.sentinel: each.process for each in started}
    try:
        while running:
            ready = multiprocessing.connection.wait(list(running), max(0.0, deadline - time.monotonic()))
            assert ready, f"{len(running)} of {len(started)} processes did not end: {[_ended(s) for s in started]}"
            for sentinel in ready:
                process = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    deadline = min(deadline, time.monotonic() + _GRACE)
    finally:
        for each in started:
            each.process.kill()
            each.process.join()
    ended = [_ended(each) for each in started]
    for folder in {each.out.parent for each in started}:
        shutil.rmtree(folder)
    return ended


def _ended(started: Started) -> Ended:
    code = started.process.exitcode
    texts = (file.read_text(errors="replace") if file.exists() else "" for file in (started.out, started.err))
    return Ended(-999 if code is None else code, *texts)


def _python(arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """Does what `python ARGUMENTS` does, in this process."""
    os.environ.clear()
    os.environ.update(environment)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8", closefd=False) for number in (1, 2))
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends; multiprocessing's children would leave these out.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
