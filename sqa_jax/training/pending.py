"""Metrics of the step before: reading them one step late keeps the device busy while the host waits for them."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np

from sqa_jax.batches.loader import PackedRows
from sqa_jax.errors import UserError
from sqa_jax.training.reporter import Reporter


class NonFiniteLoss(UserError):
    """The loss or its gradient is NaN or infinite."""


class PendingMetrics:
    """The metrics of the last dispatched step, which `settle` waits for, checks and reports.

    Args:
      rows: the training rows, to name the questions of a loss that is not finite.
      rows_per_step: rows of all micro-batches of a step.
      log_every: steps between two written lines.
      learning_rates: of every step of the run, [steps] float.
    """

    def __init__(
        self,
        root: Path,
        report: Reporter,
        rows: PackedRows,
        rows_per_step: int,
        log_every: int,
        learning_rates: np.ndarray,
    ):
        self._root, self._report = root, report
        self._rows, self._rows_per_step = rows, rows_per_step
        self._log_every, self._learning_rates = max(1, log_every), learning_rates
        self._pending: tuple[int, dict[str, jax.Array], bool | jax.Array] | None = None

    def push(self, step: int, metrics: dict[str, jax.Array], stop_vote: bool | jax.Array) -> None:
        """Keeps a dispatched step's metrics, and its vote on stopping; the step before must be settled."""
        self._pending = step, metrics, stop_vote

    def settle(self) -> bool:
        """Waits for the pending step and reports it; True if any process voted to stop after it.

        Raises:
          NonFiniteLoss: training cannot go on; step and questions are named.
        """
        if self._pending is None:
            return False
        (step, metrics, stop_vote), self._pending = self._pending, None
        row_losses = np.asarray(metrics.pop("row_losses")).reshape(-1)
        values = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteLoss(self._not_finite(step, values, row_losses))
        values["learning_rate"] = float(self._learning_rates[step - 1])
        self._report.step(step, values, step % self._log_every == 0 or step == len(self._learning_rates))
        return bool(stop_vote)

    def _not_finite(self, step: int, values: dict[str, float], row_losses: np.ndarray) -> str:
        bad = np.flatnonzero(~np.isfinite(row_losses))
        bad = bad if bad.size else np.arange(row_losses.size)  # only the gradient is not finite: any row may be why
        pids = [pid for row in bad for pid in self._rows.pids_of((step - 1) * self._rows_per_step + int(row))]
        return (
            f"{self._root}: step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; questions "
            f"{', '.join(pids[:20])}{' …' if len(pids) > 20 else ''}; the last checkpoint is from before: lower "
            "config.optimizer.learning_rate or look at these questions, and use another --workdir"
        )
