"""Predictions on disk: appended question by question, resumable after a stop, bound to the identity of their inputs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sqa_jax.data.problem import Problem
from sqa_jax.files import archive, atomic_write, disk_errors, open_log, read_json, sha256_json, write_json
from sqa_jax.parallel.processes import barrier, is_main, main_first


class Predictions:
    """FOLDER/predictions.jsonl, one row per question in split order, and FOLDER/metrics.json.

    Until all questions are answered, the rows are in partial-<identity>.jsonl. A folder that holds the predictions of
    another identity is archived.

    Args:
      inputs: a JSON value of everything that decides the predictions.

    Attributes:
      identity: hash of `inputs`.
      metrics: those of an earlier, finished run with the same identity; else None.
      known: rows by pid.
    """

    def __init__(self, folder: Path, inputs: Any):
        self.folder, self.identity = folder, sha256_json(inputs)
        self.file, self._metrics = folder / "predictions.jsonl", folder / "metrics.json"
        self._partial = folder / f"partial-{self.identity[:16]}.jsonl"
        self.metrics: dict[str, Any] | None = None
        self.known: dict[str, dict[str, Any]] = {}
        with main_first(), disk_errors(self._partial):
            if self.file.exists():
                saved = {}
                if self._metrics.exists():
                    saved = read_json(self._metrics, "the metrics of these predictions")
                if saved.get("fingerprint") == self.identity:
                    if is_main():
                        print(f"reused {self.file}")
                    self.metrics = saved
                    return
                name = f"{folder.name}.{saved.get('fingerprint', 'unknown')[:8]}-{int(time.time())}"
                archive(folder, folder.with_name(name))
            folder.mkdir(parents=True, exist_ok=True)
            self.known = _read_partial(self._partial)
        barrier()  # rows are appended from here on

    def missing(self, problems: Sequence[Problem]) -> list[Problem]:
        """The questions that have no row yet."""
        return [problem for problem in problems if problem.pid not in self.known]

    def collect(self, rows: Iterable[dict[str, Any]], total: int) -> None:
        """Appends rows, each with its "pid", as they come.

        Args:
          total: number of rows in the end, for the progress bar.
        """
        bar = tqdm(total=total, initial=len(self.known), unit="question", dynamic_ncols=True, disable=not is_main())
        with self._log() as file, bar:
            for row in rows:
                self.known[row["pid"]] = row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.update()

    @contextmanager
    def _log(self) -> Iterator[Any]:
        with disk_errors(self._partial), open_log(self._partial) if is_main() else open(os.devnull, "a") as file:
            yield file

    def write(self, problems: Sequence[Problem]) -> None:
        """Writes predictions.jsonl; every question must be known."""
        with main_first():
            if is_main():
                with atomic_write(self.file) as file:
                    file.writelines(json.dumps(self.known[p.pid], ensure_ascii=False) + "\n" for p in problems)

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Writes metrics.json, which marks the predictions as complete; returns it."""
        metrics = {**metrics, "fingerprint": self.identity}
        if is_main():
            write_json(self._metrics, metrics)
            self._partial.unlink(missing_ok=True)
        return metrics


def _read_partial(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an interrupted run by pid; a half-written last line is dropped."""
    if not path.exists():
        return {}
    rows, complete = {}, []
    for line in path.read_bytes().decode().split("\n"):  # as in `read_jsonl`
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows[row["pid"]] = row
        complete.append(line)
    with atomic_write(path) as file:
        file.writelines(line + "\n" for line in complete)
    return rows
