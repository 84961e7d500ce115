"""A supervisor process: one line on why a process of a group ended, even if JAX's runtime or the kernel killed it.

The run continues in a forked child; the parent forwards its stderr and its signals and, when it exits, explains why.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import NoReturn

from sqa_jax.parallel.processes import Group

# The runtime's log of a fatal error: the lines from here on are for its developers.
_FATAL_LOG = re.compile(r"^[WEF]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)")

# Slurm signals every process of a job itself, and a second signal would end the child before it has saved.
_CHILD_IS_SIGNALLED = "SLURM_JOB_ID" in os.environ


def supervise(group: Group) -> None:
    """Forks: returns in the child, which does the work; the parent never returns and exits as the child did."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        _watch(child, read_end, group)
    if not _CHILD_IS_SIGNALLED:
        os.setpgid(0, 0)  # Ctrl-C reaches the parent only, which forwards it once
    os.close(read_end)
    os.dup2(write_end, 2)
    os.close(write_end)


def _watch(child: int, read_end: int, group: Group) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: _CHILD_IS_SIGNALLED or os.kill(child, number))
    withheld: list[str] = []
    with os.fdopen(read_end, encoding="utf-8", errors="replace") as lines:  # also split at a progress bar's returns
        for line in lines:
            if withheld or _FATAL_LOG.match(line):
                withheld.append(line)
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.stderr.writelines(withheld)
        sys.exit(os.WEXITSTATUS(status))
    print(f"error: {explain(''.join(withheld), os.WTERMSIG(status), group)}", file=sys.stderr)
    sys.exit(1)


def explain(log: str, number: int, group: Group) -> str:
    """Why a process was terminated by a signal.

    Args:
      log: what JAX's runtime wrote last.
      number: of the signal.
    """
    again = "; the last checkpoint is intact: start all processes again to continue"
    who = f"process {group.process} of {group.processes}" if group.process >= 0 else "this process"
    if match := re.search(r"stopped sending heartbeats\):(.*?)The tasks have crashed", log, re.DOTALL):
        lost = ", ".join(dict.fromkeys(re.findall(r"\d+", match[1]))) or "of another host"
        return f"{who}: process {lost} has ended or cannot be reached any more; look at its log{again}"
    if "RegisterTask" in log:
        return (
            f"{who}: not all processes came within {group.start_timeout} s; start all of them, with the same "
            "--coordinator and --processes, or raise --start_timeout"
        )
    if "coordination service" in log:
        return f"{who}: process 0, which coordinates the run, has ended or cannot be reached; look at its log{again}"
    name = signal.Signals(number).name
    hint = " (out of memory, perhaps)" if number == signal.SIGKILL else ""
    return f"{who}: ended by {name}{hint}{again}"
