"""Batches of packed rows, as a pure function of (seed, step), read ahead by grain."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import grain
import jax
import numpy as np

from sqa_jax.batches.batch import Batch
from sqa_jax.batches.dataset import DistillationDataset
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.packing import Limits, capacity_for, choose_limits, pack_row, plan_rows
from sqa_jax.errors import UserError
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT, SoftPromptTokens


class PackedRows:
    """The endless stream of packed rows, one epoch after the other, with random access.

    Row i is a pure function of (sequences, seed, i): the epochs' packing plans are drawn from (seed, epoch).
    This is grain's `RandomAccessDataSource`.

    Args:
      tokens: of each sequence, its ids.
      prompt_lengths: of each sequence, how many of them are prompt.
      pids: of each sequence, the question it was made of.
      limits: shape of a row; see `choose_limits`.
      pictures: what puts into a row what it sees, where students see.
    """

    def __init__(
        self,
        tokens: Sequence[np.ndarray],
        prompt_lengths: np.ndarray,
        pids: Sequence[str],
        limits: Limits,
        pad_id: int,
        seed: int,
        images: ImageBatcher | None = None,
    ):
        self.tokens, self.prompt_lengths, self.pids = tokens, prompt_lengths, pids
        self.limits, self.pad_id, self.seed, self.images = limits, pad_id, seed, images
        lengths = np.array([len(t) for t in tokens])
        seen = np.zeros_like(lengths) if images is None else np.array([images.count(t) for t in tokens])
        self._counts = np.stack([lengths, lengths - prompt_lengths, seen], axis=1)
        self._lock = threading.Lock()
        self._starts = [0]  # first row of each epoch planned so far
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        return plan_rows(self._counts, self.limits[:3], rng)

    def rows_of_epoch(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def real_tokens(self, epoch: int = 0) -> float:
        """Share of an epoch's tokens that are not padding."""
        return float(self._counts[:, 0].sum() / (self.rows_of_epoch(epoch) * self.limits.tokens))

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

    def __getitem__(self, row: int) -> Batch:
        members = self.members(int(row))
        packed = pack_row(
            [self.tokens[k] for k in members], [self.prompt_lengths[k] for k in members], self.limits, self.pad_id
        )
        if self.images is not None:
            tokens, images = self.images(packed.tokens, self.limits.features)
            packed = packed._replace(tokens=tokens, images=images)
        return packed


def packed_rows(
    dataset: DistillationDataset,
    config,
    pad_id: int,
    virtual: SoftPromptTokens = NO_SOFT_PROMPT,
    both_ways: bool = False,
    images: ImageBatcher | None = None,
) -> PackedRows:
    """Packed rows of a distillation dataset, in the shape that `config.train` asks for.

    Args:
      virtual: tokens of a soft prompt.
      both_ways: whether the student reads prompts both ways.
      pictures: what puts into rows what they see, where the student sees.

    Raises:
      UserError: the dataset is empty or a sequence is longer than a row.
    """
    columns = dataset.columns()
    if not columns.tokens:
        raise UserError(f"{dataset.path}: no training sequence; see its manifest.json for what was dropped and why")
    return pack(
        [virtual.put(*row) for row in zip(columns.tokens, columns.image_ends.tolist(), strict=True)],
        columns.prompt_lengths + virtual.count,
        columns.pids,
        config.train.row_length,
        pad_id,
        config.seed,
        both_ways,
        images,
    )


def pack(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: np.ndarray,
    pids: Sequence[str],
    row_length: int,
    pad_id: int,
    seed: int,
    both_ways: bool = False,
    images: ImageBatcher | None = None,
) -> PackedRows:
    """Packed rows of sequences. Arguments and errors are those of `PackedRows` and `packed_rows`."""
    tokens = [np.asarray(own, np.int32) for own in sequences]
    lengths = np.array([len(own) for own in tokens])
    limits = choose_limits(lengths, lengths - prompt_lengths, row_length, pids)
    limits = limits._replace(both_ways=both_ways)
    if images is not None:
        seen = np.array([images.count(own) for own in tokens])
        limits = limits._replace(features=images.room(capacity_for(lengths, seen, row_length)))
    return PackedRows(tokens, prompt_lengths, pids, limits, pad_id, seed, images)


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
    """A checkpointable iterator over steps: each item is a `Batch` of arrays [accumulate, own rows, …].

    Its `get_state()`/`set_state()` go into the checkpoint; state k continues with step k, on any number of
    processes.

    Args:
      batch_rows: rows of one micro-batch over all processes.
      accumulate: micro-batches of a step.
      own: which rows of a micro-batch this process reads (`sqa_jax.parallel.mesh.local_rows`); None is all.
    """
    own = np.arange(batch_rows) if own is None else own
    count = accumulate * len(own)

    def split(batch: Batch) -> Batch:
        return jax.tree.map(lambda array: array.reshape(accumulate, len(own), *array.shape[1:]), batch)

    source = _OwnRows(rows, batch_rows, accumulate, own)
    dataset = grain.MapDataset.source(source).batch(count, drop_remainder=True).map(split)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
