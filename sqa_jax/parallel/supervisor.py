"""Says in one line why a process of a group ended, also where JAX's runtime aborts it or the system kills it.

The run goes on in a child; the parent passes on its output and its signals and, at its end, explains it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import NoReturn

from sqa_jax.parallel.processes import Group

# The runtime's last words: the lines from here on are for its own developers.
_DYING = re.compile(r"^[WEF]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)")

# Slurm signals every process of a job itself, and a second signal would end the child before it has saved.
_SIGNALLED = "SLURM_JOB_ID" in os.environ


def supervise(group: Group) -> None:
    """Returns in a child process, which does the work. The parent stays here and exits as the child did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _watch(child, reading, group)
    if not _SIGNALLED:
        os.setpgid(0, 0)  # a Ctrl-C reaches the parent, which passes it on once
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)


def _watch(child: int, reading: int, group: Group) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: _SIGNALLED or os.kill(child, number))
    held: list[str] = []
    with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:  # also split where a progress bar returns
        for line in lines:
            if held or _DYING.match(line):
                held.append(line)
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.stderr.writelines(held)
        sys.exit(os.WEXITSTATUS(status))
    print(f"error: {explain(''.join(held), os.WTERMSIG(status), group)}", file=sys.stderr)
    sys.exit(1)


def explain(last_words: str, number: int, group: Group) -> str:
    """Why a process was ended by a signal.

    Args:
      last_words: what JAX's runtime wrote.
      number: of the signal.
    """
    again = "; the last checkpoint is intact: start all processes again to continue"
    who = f"process {group.process} of {group.processes}" if group.process >= 0 else "this process"
    if match := re.search(r"stopped sending heartbeats\):(.*?)The tasks have crashed", last_words, re.DOTALL):
        lost = ", ".join(dict.fromkeys(re.findall(r"\d+", match[1]))) or "of another host"
        return f"{who}: process {lost} has ended or cannot be reached any more; look at its log{again}"
    if "RegisterTask" in last_words:
        return (
            f"{who}: not all processes came within {group.start_timeout} s; start all of them, with the same "
            "--coordinator and --processes, or raise --start_timeout"
        )
    if "coordination service" in last_words:
        return f"{who}: process 0, which coordinates the run, has ended or cannot be reached; look at its log{again}"
    name = signal.Signals(number).name
    hint = " (out of memory, perhaps)" if number == signal.SIGKILL else ""
    return f"{who}: ended by {name}{hint}{again}"
