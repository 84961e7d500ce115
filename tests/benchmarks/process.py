"""One measurement in a separate process: no warm caches, and its own peak memory."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.files import read_json, write_json

WARM = 2  # warm-up steps before the rate is measured
PRODUCTS = 4  # matrix products timed together, to hide the dispatch latency of an accelerator


def measure(module: str, task: str, large_pages: bool, root: Path, name: str) -> dict[str, Any]:
    """Runs `task` of `module`'s `serve` in a new process, and returns its result.

    Args:
      large_pages: False removes the C library's allocator settings from its environment.
      root: the benchmark's directory. The result is written to ROOT/runs/NAME.json, the output to NAME.log.

    Raises:
      UserError: the process raised one, or failed otherwise; its last line is quoted.
    """
    log, result = root / "runs" / f"{name}.log", root / "runs" / f"{name}.json"
    log.parent.mkdir(exist_ok=True)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "TOKENIZERS_PARALLELISM": "false"}
    if not large_pages:
        environment.pop("GLIBC_TUNABLES", None)
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", module, task, str(root), str(result), str(time.time())]
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["nothing was printed"])[-1]
        if code == 2:
            raise UserError(last.removeprefix("error: "))
        raise UserError(f"{name} ended with exit code {code} ({last}); all of it is in {log}")
    return read_json(result, "the result of this process")


def serve(tasks: Mapping[str, Callable[[Path, float], dict[str, Any]]]) -> None:
    """The child's side of `measure`: runs a task, which gets the directory and the process's start (Unix time)."""
    task, root, result, started = sys.argv[1:]
    try:
        write_json(result, tasks[task](Path(root), float(started)))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_peak() -> int:
    """Peak resident memory of this process, bytes."""
    # Includes the parent's up to the start of this program: the parent must be small, and is.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds_of(call: Callable[[], Any]) -> float:
    """Median time of `call`, which blocks until its work is done; the first call is not counted."""
    taken = []
    for _ in range(6):
        clock = time.perf_counter()
        call()
        taken.append(time.perf_counter() - clock)
    return statistics.median(taken[1:])
