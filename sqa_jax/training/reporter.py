"""Reports of a run: a progress bar, metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from sqa_jax.bucket import GrowingObject, in_bucket
from sqa_jax.files import atomic_write, disk_errors, open_log
from sqa_jax.parallel.processes import is_main


class Reporter:
    """Writes a run's metrics. On resume, lines of later steps are removed first, so that no step is there twice.

    Only the main process writes and prints.

    Args:
      workdir: of the run.
      first, last: the last step before this start, and the last step of the run.

    Raises:
      UserError, from every method that writes: the disk is full, or the disk or the bucket cannot be written.
    """

    def __init__(self, workdir: Path, first: int, last: int):
        self._is_main = is_main()
        self._path = workdir / "metrics.jsonl"
        if self._is_main:
            self._open(workdir, first)
        # Into a log file, a line now and then instead of a bar.
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            initial=first,
            total=last,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if self._live else 15.0,
            file=sys.stderr,
            disable=not self._is_main,
        )
        self._clock, self._seconds, self._tokens, self._rate = time.perf_counter(), 0.0, 0, 0.0

    def _open(self, workdir: Path, first: int) -> None:
        with disk_errors(self._path):
            if self._path.exists():
                kept = [line for line in self._path.read_bytes().decode().split("\n") if _step_of(line) <= first]
                with atomic_write(self._path) as file:
                    file.writelines(line + "\n" for line in kept)
            self._log = open_log(self._path)
            self._events = _Events(workdir / "tensorboard", first)

    def step(self, step: int, metrics: dict[str, float], write: bool) -> None:
        """Reports an optimizer step on the progress bar, and with `write` in the files."""
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now
        self._tokens += int(metrics["tokens"])
        if write:
            # Tokens and seconds since the last written line: their sums over the lines are the run's.
            since = {"tokens": self._tokens, "seconds": max(self._seconds, 1e-9)}
            self._rate = since["tokens"] / since["seconds"]
            self._seconds, self._tokens = 0.0, 0
            self.write(step, {**metrics, **since, "tokens_per_second": self._rate})
        line = f"loss {metrics['loss']:.4f}, |adapter| {metrics['adapter_norm']:.2f}, {self._rate:.0f} tokens/s"
        self._bar.set_postfix_str(line, refresh=False)
        self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes scalars of a step to the files."""
        if self._is_main:
            with disk_errors(self._path):
                row = {"step": step, **{name: _rounded(name, float(value)) for name, value in metrics.items()}}
                self._log.write(json.dumps(row) + "\n")
                self._events.write(step, metrics)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar. The time since the last step does not count as training."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)
        self._clock = time.perf_counter()

    def flush(self) -> None:
        """Returns when every line is stored: called before a checkpoint, since its steps are not reported again."""
        if self._is_main:
            with disk_errors(self._path):
                self._log.flush()
                self._events.flush()

    def close(self) -> None:
        self._bar.close()
        if self._is_main:
            with disk_errors(self._path):
                self._log.close()
                self._events.close()


class _Events:
    """TensorBoard events, in a folder on a disk or in a bucket.

    TensorBoard's writer can write to a bucket, but hangs once an upload has failed. So it writes to the local disk, and
    the file is uploaded as it grows.
    """

    def __init__(self, folder: Path, first: int):
        self._temporary = tempfile.TemporaryDirectory() if in_bucket(folder) else None
        here = Path(self._temporary.name if self._temporary else folder)
        self._writer = SummaryWriter(str(here), purge_step=first + 1)
        if self._temporary:
            self._file = next(here.iterdir())
            self._object = GrowingObject(folder / self._file.name, self._file.read_bytes)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)
        if self._temporary:
            self._writer.flush()
            self._object.update()

    def flush(self) -> None:
        self._writer.flush()
        if self._temporary:
            self._object.flush()

    def close(self) -> None:
        self._writer.close()
        if self._temporary:
            self._object.flush()
            self._temporary.cleanup()


def _rounded(name: str, value: float) -> float:
    """Six decimals; of a learning rate, which may be tiny, six digits."""
    return float(f"{value:.6g}") if name == "learning_rate" else round(value, 6)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut off when the run was killed
