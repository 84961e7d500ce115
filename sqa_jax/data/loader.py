"""Batches of packed rows, as a pure function of (seed, step), read ahead by grain."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import grain
import numpy as np

from sqa_jax.data.packing import Limits, choose_limits, pack_row, plan_rows
from sqa_jax.errors import UserError


class PackedRows:
    """The endless stream of packed rows, one epoch after the other, with random access.

    Row i is a pure function of (sequences, seed, i): the epochs' packing plans are drawn from (seed, epoch).
    This is grain's `RandomAccessDataSource`.

    Args:
      tokens: of each sequence, its ids.
      prompt_lengths: of each sequence, how many of them are prompt.
      pids: of each sequence, the question it was made of.
      limits: shape of a row; see `choose_limits`.
    """

    def __init__(
        self,
        tokens: Sequence[np.ndarray],
        prompt_lengths: np.ndarray,
        pids: Sequence[str],
        limits: Limits,
        pad_id: int,
        seed: int,
    ):
        self.tokens, self.prompt_lengths, self.pids = tokens, prompt_lengths, pids
        self.limits, self.pad_id, self.seed = limits, pad_id, seed
        lengths = np.array([len(t) for t in tokens])
        self._sizes, self._targets = lengths + limits.virtual, lengths - prompt_lengths
        self._lock = threading.Lock()
        self._starts = [0]  # first row of each epoch planned so far
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        return plan_rows(self._sizes, self._targets, self.limits, rng)

    def rows_of_epoch(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def real_tokens(self, epoch: int = 0) -> float:
        """Share of an epoch's tokens that are not padding."""
        return float(self._sizes.sum() / (self.rows_of_epoch(epoch) * self.limits.tokens))

    def members(self, row: int) -> list[int]:
        """Indices of the sequences in a row."""
        with self._lock:  # grain's reading threads ask at the same time
            while self._starts[-1] <= row:
                self._starts.append(self._starts[-1] + self.rows_of_epoch(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._plan(epoch)[row - self._starts[epoch]]

    def pids_of(self, row: int) -> list[str]:
        return [self.pids[k] for k in self.members(row)]

    def __len__(self) -> int:
        return 2**40  # endless: the trainer decides when to stop

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        members = self.members(int(row))
        return pack_row(
            [self.tokens[k] for k in members], [self.prompt_lengths[k] for k in members], self.limits, self.pad_id
        )


def packed_rows(dataset, config, virtual: int, pad_id: int) -> PackedRows:
    """Packed rows of a distillation dataset (`sqa_jax.data.dataset`), in the shape that `config.train` asks for.

    Raises:
      UserError: the dataset is empty or a sequence is longer than a row.
    """
    tokens, prompt_lengths, pids = dataset.columns()
    if not len(tokens):
        raise UserError(f"{dataset.path}: no training sequence; see its manifest.json for what was dropped and why")
    lengths = np.array([len(t) for t in tokens])
    limits = choose_limits(lengths, lengths - prompt_lengths, config.train.row_length, virtual, pids)
    return PackedRows(tokens, prompt_lengths, pids, limits, pad_id, config.seed)


def steps_of(config, rows: PackedRows) -> int:
    """Optimizer steps of a run: `config.train.steps`, or its epochs over these rows, at least one."""
    per_step = config.train.batch_rows * config.train.accumulate
    return config.train.steps or max(1, round(config.train.epochs * rows.rows_of_epoch(0) / per_step))


class _OwnRows:
    """The rows of one process: of each micro-batch, those that its devices hold."""

    def __init__(self, rows: PackedRows, batch_rows: int, accumulate: int, own: np.ndarray):
        self.rows, self.batch_rows, self.accumulate, self.own = rows, batch_rows, accumulate, own

    def __len__(self) -> int:
        return len(self.rows) // (self.batch_rows * self.accumulate) * self.accumulate * len(self.own)

    def __getitem__(self, index: int):
        micro_batch, place = divmod(int(index), len(self.own))
        return self.rows[micro_batch * self.batch_rows + int(self.own[place])]


def make_loader(rows: PackedRows, batch_rows: int, accumulate: int, own: np.ndarray | None = None):
    """A checkpointable iterator over steps: each item is a dict of arrays [accumulate, own rows, …].

    Its `get_state()`/`set_state()` go into the checkpoint; state k continues with step k, on any number of
    processes.

    Args:
      batch_rows: rows of one micro-batch over all processes.
      accumulate: micro-batches of a step.
      own: which rows of a micro-batch this process reads (`sqa_jax.parallel.mesh.own_rows`); None is all.
    """
    own = np.arange(batch_rows) if own is None else own
    count = accumulate * len(own)

    def split(batch):
        return {name: a.reshape(accumulate, len(own), *a.shape[1:]) for name, a in batch.items()}

    source = _OwnRows(rows, batch_rows, accumulate, own)
    dataset = grain.MapDataset.source(source).batch(count, drop_remainder=True).map(split)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
