"""A profile of some training steps, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from sqa_jax.files import local_path

WARM_UP = 2  # steps before the trace: the first compiles, the second fills the pipeline


class StepProfiler:
    """`jax.profiler` traces steps after the warm-up of this run into a directory; entered around the loop.

    Args:
      workdir: of the run; the trace goes into its folder `profile`.
      first: the step that this run starts after.
      steps: how many to trace; 0 is none.

    Raises:
      UserError: steps are to be traced and the workdir is in a bucket, where the profiler cannot write.
    """

    def __init__(self, workdir: Path, first: int, steps: int):
        self.folder = workdir / "profile"
        if steps:
            local_path(workdir, "config.train.profile_steps: the workdir of a profiled run")
        self._start = first + WARM_UP + 1 if steps else 0
        self._end = self._start + steps
        self._tracing = False

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace before a step is dispatched; `state` is the step before's, to wait for."""
        if step == self._start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True
        elif step == self._end and self._tracing:
            self._stop(state)

    def _stop(self, state: Any = None) -> None:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._tracing = False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tracing:
            self._stop()
