"""Checkpoints of a run: the last train state, to resume from, and the best adapter, to evaluate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sqa_jax.bucket import bucket_errors, in_bucket
from sqa_jax.errors import UserError
from sqa_jax.files import as_path, disk_errors
from sqa_jax.training.step import TrainState


class Checkpoints:
    """Asynchronous, atomic checkpoints (orbax) in a directory, on a disk or in a bucket.

    `last/` holds train states with the loader's position; `best/` holds the adapter with the lowest validation loss.
    """

    def __init__(self, directory: str | Path):
        root = as_path(directory)
        self._root = root if in_bucket(root) else root.absolute()
        # orbax logs the failure of each of its threads; the exception reports it once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._last, self._best = self._manager("last", max_to_keep=2), self._manager("best", max_to_keep=1)

    def _manager(self, name: str, max_to_keep: int) -> ocp.CheckpointManager:
        # Both managers save at the same time: with one prefix, their barriers between processes would mix.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, multiprocessing_options=barriers)
        with disk_errors(self._root):
            return ocp.CheckpointManager(self._root / name, options=options)

    def save(self, step: int, state: TrainState, loader_state: dict[str, Any], best_loss: float | None) -> None:
        """Starts an asynchronous save; the arrays are copied before this returns, so training may go on."""
        if self._last.latest_step() == step:
            return
        extra = {"loader": loader_state, "best_loss": best_loss}
        with disk_errors(self._root):
            self._last.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
            )

    def save_best(self, step: int, adapter: Any) -> None:
        """Starts an asynchronous save of the adapter of a step.

        A run that was killed between this save and that of its train state reaches the same step again. The adapter is
        the same then, and is kept. Adapters of later steps are from before such a kill, and are removed.
        """
        if step in (saved := self._best.all_steps()):
            return
        with disk_errors(self._root):
            for later in (s for s in saved if s > step):
                self._best.delete(later)
            self._best.save(step, args=ocp.args.Composite(adapter=ocp.args.StandardSave(adapter)), force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The last train state, sharded like `like` (shapes with shardings), and the extra values saved with it."""
        step = self._last.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore())
        restored = self._restore(self._last, step, args)
        return restored["state"], restored["extra"]

    def restore_adapter(self, which: str, like: TrainState | Any) -> tuple[int, Any] | None:
        """(step, adapter) of the "best" or the "last" checkpoint.

        Args:
          like: shapes with shardings, of the adapter for "best", of the train state for "last".
        """
        manager = {"best": self._best, "last": self._last}[which]
        if (step := manager.latest_step()) is None:
            return None
        item = "adapter" if which == "best" else "state"
        restored = self._restore(manager, step, ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))
        return step, restored[item].adapter if which == "last" else restored[item]

    def _restore(self, manager: ocp.CheckpointManager, step: int, args: Any) -> Any:
        try:
            # A bucket that cannot be reached does not make the checkpoint damaged.
            with bucket_errors(self._root):
                return manager.restore(step, args=args)
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{manager.directory}/{step}: the checkpoint is damaged or of another adapter ({reason}); remove this folder"
            ) from None

    def finish(self) -> None:
        """Waits until everything is on disk."""
        with disk_errors(self._root):
            self._last.wait_until_finished()
            self._best.wait_until_finished()

    def close(self) -> None:
        self.finish()
        self._last.close()
        self._best.close()


class BestCheckpoint:
    """Keeps the adapter with the lowest validation loss.

    Args:
      loss: the lowest so far; None before the first validation.

    Attributes:
      loss: as the argument, kept up to date.
    """

    def __init__(self, checkpoints: Checkpoints, loss: float | None):
        self._checkpoints, self.loss = checkpoints, loss

    def update(self, step: int, loss: float, adapter: Any) -> bool:
        """Starts to save the adapter if its validation loss is the lowest so far, and says whether it is."""
        if self.loss is not None and loss >= self.loss:
            return False
        self.loss = loss
        self._checkpoints.save_best(step, adapter)
        return True


def abstract(tree: Any, placed: Any) -> Any:
    """Shapes and dtypes of a tree with the shardings of another: the template for `restore`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, placed
    )
