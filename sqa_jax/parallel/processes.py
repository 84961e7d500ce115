"""Several processes of one run: they start together, hear of each other's errors, and end together.

Each host of a TPU pod or of a cluster runs the same command; JAX makes one mesh of all their devices. An error in
one would leave the others waiting in a collective, so the one that fails leaves word with the coordinator, and a
thread of each process looks there every second. `sqa_jax.parallel.supervisor` explains ends that no Python sees.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqa_jax.errors import UserError

_FAILED = "sqa_jax/failed"  # the coordinator's key under which the first process to fail says why
_LOOK_EVERY = 1.0  # seconds
_STAY = 6.0  # seconds that the process with the coordinator goes on, so that all others can look first


class Group(NamedTuple):
    """Which processes make the run, from the flags.

    Attributes:
      coordinator: "host:port" of process 0, or "auto": what TPU pods, Slurm, Kubernetes or Open MPI tell.
      processes, process: their number, and which this is; -1 where `coordinator` is "auto".
      start_timeout: seconds until all must be there.
      heartbeat_timeout: seconds of silence after which a process counts as lost.
    """

    coordinator: str
    processes: int = -1
    process: int = -1
    start_timeout: int = 300
    heartbeat_timeout: int = 60


def check(group: Group) -> None:
    """Raises `UserError` where the flags contradict each other."""
    if group.coordinator == "auto":
        return
    host, _, port = group.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {group.coordinator}: give HOST:PORT of process 0, or auto")
    if group.processes < 1 or not 0 <= group.process < group.processes:
        raise UserError(
            f"--processes {group.processes} --process {group.process}: give the number of processes, and of each its "
            "own number from 0 on"
        )


def start(group: Group) -> None:
    """Joins the other processes; to be called before JAX looks at its devices.

    Raises:
      UserError: the environment says nothing of a group, or process 0 cannot be reached in time.
    """
    import jax

    timeouts = {
        "initialization_timeout": group.start_timeout,
        "heartbeat_timeout_seconds": group.heartbeat_timeout,
    }
    if group.coordinator == "auto":
        try:
            jax.distributed.initialize(**timeouts)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--coordinator auto: neither a TPU pod nor Slurm, Kubernetes or Open MPI was found ({error}); give "
                "--coordinator HOST:PORT --processes N --process I, or leave it out on a single host"
            ) from None
    else:
        if group.process:
            _wait_for(group)
        jax.distributed.initialize(group.coordinator, group.processes, group.process, **timeouts)
    ending = threading.Event()
    listener = threading.Thread(target=_listen, args=(ending,), daemon=True)
    listener.start()
    # A thread inside the runtime at the interpreter's end would abort it.
    atexit.register(lambda: (ending.set(), listener.join()))


def _wait_for(group: Group) -> None:
    """Waits until process 0 listens: JAX's own client ends the process without a word that helps."""
    host, _, port = group.coordinator.rpartition(":")
    end = time.monotonic() + group.start_timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"process {group.process} of {group.processes}: no coordinator at {group.coordinator} within "
                    f"{group.start_timeout} s ({error}); start process 0 there, and let the port through"
                ) from None
            time.sleep(0.5)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _listen(ending: threading.Event) -> None:
    """Ends this process where another has failed."""
    import jax

    client, own = _client(), jax.process_index()
    while not ending.wait(_LOOK_EVERY):
        try:
            process, _, message = client.key_value_try_get(_FAILED).partition(" ")
        except Exception:  # nobody has failed; or the coordinator is gone, which the supervisor explains
            continue
        if int(process) == own:
            return
        time.sleep(_STAY if own == 0 else 0)
        leave(f"error: process {process} of {jax.process_count()} failed: {message}", 1)


def fail(message: str, code: int) -> None:
    """Lets the other processes know why this one fails, and ends it without waiting for them. Does nothing alone."""
    import jax

    if _client() is None:
        return
    with contextlib.suppress(Exception):  # another was first, or the coordinator is gone
        _client().key_value_set(_FAILED, f"{jax.process_index()} {message}")
    time.sleep(_STAY if jax.process_index() == 0 else _STAY / 2)
    leave("", code)


def leave(message: str, code: int) -> None:
    """Ends the process at once: the usual end would wait for the others."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_main() -> bool:
    """Whether this is the process that writes the run's files."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 goes through the block alone; then the others do, and find what it made."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Waits until every process is here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("sqa_jax")


class Votes:
    """Whether any process says yes, without waiting: a vote is counted on the devices, behind the step before it.

    Attributes:
      alone: there is no other process to agree with.
    """

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self.alone = jax.process_count() == 1
        if not self.alone:
            mesh = jax.make_mesh((jax.device_count(),), ("all",))
            self._split = NamedSharding(mesh, PartitionSpec("all"))
            self._count = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, yes: bool) -> Any:
        """This process' vote; every process must vote. `bool()` of what is returned waits for the result."""
        import jax
        import numpy as np

        if self.alone:
            return yes
        size = jax.device_count()
        local = np.full(size, yes)
        return self._count(jax.make_array_from_callback((size,), self._split, lambda index: local[index]))
