"""Multi-process runs: distributed initialization, barrier, failure propagation, and an all-reduce vote.

Each host of a TPU pod or of a cluster runs the same command; JAX builds one mesh over all their devices. An exception
in one process would leave the others blocked in a collective, so the failing process writes the reason to the
coordinator's key-value store, which a watcher thread in each process polls every second. Exits that no Python code
handles (SIGKILL, an abort in the runtime) are explained by `sqa_jax.parallel.supervisor`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from sqa_jax.errors import UserError

if TYPE_CHECKING:
    import jax

_FAILED = "sqa_jax/failed"  # key of the coordinator's store under which the first process to fail writes the reason
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 6.0  # process 0, which hosts the coordinator, exits this much later, so that all others can poll first


class Group(NamedTuple):
    """The process group of a run, from the flags.

    Attributes:
      coordinator: "host:port" of process 0, or "auto": detected on TPU pods, Slurm, Kubernetes and Open MPI.
      processes, process: number of processes and index of this one; -1 where `coordinator` is "auto".
      start_timeout: seconds within which all processes must have joined.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.
    """

    coordinator: str
    processes: int = -1
    process: int = -1
    start_timeout: int = 300
    heartbeat_timeout: int = 60


def check(group: Group) -> None:
    """Raises `UserError` if the flags contradict each other."""
    if group.coordinator == "auto":
        return
    host, _, port = group.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {group.coordinator}: give HOST:PORT of process 0, or auto")
    if group.processes < 1 or not 0 <= group.process < group.processes:
        raise UserError(
            f"--processes {group.processes} --process {group.process}: give the number of processes, and for "
            "each its index, counted from 0"
        )


def start(group: Group) -> None:
    """Initializes JAX's distributed runtime; must run before JAX initializes its devices.

    Raises:
      UserError: no process group was detected in the environment, or process 0 cannot be reached in time.
    """
    import jax

    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=group.start_timeout,
        heartbeat_timeout_seconds=group.heartbeat_timeout,
    )
    if group.coordinator == "auto":
        try:
            initialize()
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--coordinator auto: neither a TPU pod nor Slurm, Kubernetes or Open MPI was found ({error}); give "
                "--coordinator HOST:PORT --processes N --process I, or leave it out on a single host"
            ) from None
    else:
        if group.process:
            _wait_for_coordinator(group)
        initialize(group.coordinator, group.processes, group.process)
    stopping = threading.Event()
    watcher = threading.Thread(target=_watch_for_failure, args=(stopping,), daemon=True)
    watcher.start()
    # A thread inside the runtime at interpreter shutdown would abort it.
    atexit.register(lambda: (stopping.set(), watcher.join()))


def _wait_for_coordinator(group: Group) -> None:
    """Waits until process 0 accepts connections: JAX's client would abort the process without a useful message."""
    host, _, port = group.coordinator.rpartition(":")
    deadline = time.monotonic() + group.start_timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {group.process} of {group.processes}: no coordinator at {group.coordinator} within "
                    f"{group.start_timeout} s ({error}); start process 0 there, and open the port"
                ) from None
            time.sleep(0.5)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _watch_for_failure(stopping: threading.Event) -> None:
    """Exits this process once another has failed."""
    import jax

    client, index = _client(), jax.process_index()
    while not stopping.wait(_POLL_SECONDS):
        try:
            process, _, message = client.key_value_try_get(_FAILED).partition(" ")
        except Exception:  # no process has failed; or the coordinator is gone, which the supervisor explains
            continue
        if int(process) == index:
            return
        time.sleep(_GRACE_SECONDS if index == 0 else 0)
        _exit_now(f"error: process {process} of {jax.process_count()} failed: {message}", 1)


def fail(message: str, code: int) -> None:
    """Tells the other processes why this one fails, and exits without waiting for them. No-op with one process."""
    import jax

    if _client() is None:
        return
    with contextlib.suppress(Exception):  # another process failed first, or the coordinator is gone
        _client().key_value_set(_FAILED, f"{jax.process_index()} {message}")
    time.sleep(_GRACE_SECONDS if jax.process_index() == 0 else _GRACE_SECONDS / 2)
    _exit_now("", code)


def _exit_now(message: str, code: int) -> None:
    """Exits at once: the usual shutdown would wait for the other processes."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_main() -> bool:
    """Whether this is process 0, which writes the run's files."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the block first; then the others do, and find its results on disk."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Blocks until every process has reached this point."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("sqa_jax")


class Votes:
    """An all-reduce (logical or) of one boolean per process, dispatched asynchronously after the step before it.

    Attributes:
      alone: there is only one process, so its vote is the result.
    """

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self.alone = jax.process_count() == 1
        if not self.alone:
            mesh = jax.make_mesh((jax.device_count(),), ("all",))
            self._sharding = NamedSharding(mesh, PartitionSpec("all"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def any_process(self, yes: bool) -> bool | jax.Array:
        """Whether any process votes yes. Every process must call it; `bool()` of the returned array blocks."""
        import jax
        import numpy as np

        if self.alone:
            return yes
        size = jax.device_count()
        votes = np.full(size, yes)
        return self._any(jax.make_array_from_callback((size,), self._sharding, lambda index: votes[index]))
