"""What a run tells: a live line for a person, metrics.jsonl for a program, TensorBoard events for a browser."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from sqa_jax.files import atomic_write, disk_errors


class Reporter:
    """Writes a run's metrics. On resume, what was written of later steps is cut off, so no step is there twice.

    Args:
      workdir: of the run.
      first, last: the step that this run starts behind, and the run's last one.
    """

    def __init__(self, workdir: Path, first: int, last: int):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= first]
            with atomic_write(self._path) as file:
                file.writelines(line + "\n" for line in kept)
        with disk_errors(self._path):
            self._file = open(self._path, "a", encoding="utf-8")
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)
        # Where nobody watches, a line now and then is better than a bar.
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            initial=first,
            total=last,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if self._live else 15.0,
            file=sys.stderr,
        )
        self._clock, self._seconds, self._tokens, self._rate = time.perf_counter(), 0.0, 0, 0.0

    def step(self, step: int, metrics: dict[str, float], write: bool) -> None:
        """Reports an optimizer step; `write` also puts it into the files."""
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now
        self._tokens += int(metrics["tokens"])
        if write:
            # Tokens and seconds since the line before, so that sums over the lines are the run's.
            since = {"tokens": self._tokens, "seconds": max(self._seconds, 1e-9)}
            self._rate = since["tokens"] / since["seconds"]
            self._seconds, self._tokens = 0.0, 0
            self.write(step, {**metrics, **since, "tokens_per_second": self._rate})
        line = f"loss {metrics['loss']:.4f}, |adapter| {metrics['adapter_norm']:.2f}, {self._rate:.0f} tokens/s"
        self._bar.set_postfix_str(line, refresh=False)
        self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Puts scalars of a step into the files."""
        with disk_errors(self._path):
            self._file.write(json.dumps({"step": step, **{k: round(float(v), 6) for k, v in metrics.items()}}) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._events.add_scalar(name, float(value), step)

    def say(self, text: str) -> None:
        """A line above the live one. The time it took to get here does not count as training."""
        tqdm.write(text, file=sys.stderr)
        self._clock = time.perf_counter()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # the half line of a killed run
