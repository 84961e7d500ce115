"""Packed rows and batches of them: each a pure function of the seed and its number, prefetched by grain."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import grain
import jax
import numpy as np
from jaxtyping import Int

from sqa_jax.batches.batch import Batch
from sqa_jax.batches.dataset import DistillationDataset
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.packing import Limits, capacity_for, choose_limits, pack_row, plan_rows
from sqa_jax.errors import UserError
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT, SoftPromptTokens


class PackedRows:
    """The endless stream of packed rows, one epoch after the other, with random access.

    Row i is a pure function of (sequences, seed, i): an epoch's packing plan is drawn from (seed, epoch).
    This is grain's `RandomAccessDataSource`.

    Args:
      tokens: ids of each sequence.
      prompt_lengths: how many of them are prompt.
      pids: the question of each sequence.
      limits: shape of a row; see `choose_limits`.
      pad_id: id of padding.
      images: the image inputs of rows, for a vision-language model.
    """

    def __init__(
        self,
        tokens: Sequence[Int[np.ndarray, " _"]],
        prompt_lengths: Int[np.ndarray, " N"],
        pids: Sequence[str],
        limits: Limits,
        pad_id: int,
        seed: int,
        images: ImageBatcher | None = None,
    ):
        self.tokens, self.prompt_lengths, self.pids = tokens, prompt_lengths, pids
        self.limits, self.pad_id, self.seed, self.images = limits, pad_id, seed, images
        lengths = np.array([len(ids) for ids in tokens])
        features = (
            np.zeros_like(lengths) if images is None else np.array([images.count_features(ids) for ids in tokens])
        )
        self._counts = np.stack([lengths, lengths - prompt_lengths, features], axis=1)
        self._lock = threading.Lock()
        self._starts = [0]  # first row of each epoch planned so far
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        return plan_rows(self._counts, self.limits[:3], rng)

    def rows_of_epoch(self, epoch: int) -> int:
        """Number of rows of an epoch."""
        return len(self._plan(epoch))

    def packing_efficiency(self, epoch: int = 0) -> float:
        """Fraction of an epoch's tokens that are not padding."""
        return float(self._counts[:, 0].sum() / (self.rows_of_epoch(epoch) * self.limits.tokens))

    def members(self, row: int) -> list[int]:
        """Indices of the sequences in a row."""
        with self._lock:  # grain's prefetching threads ask concurrently
            while self._starts[-1] <= row:
                self._starts.append(self._starts[-1] + self.rows_of_epoch(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._plan(epoch)[row - self._starts[epoch]]

    def pids_of(self, row: int) -> list[str]:
        """Questions of the sequences in a row."""
        return [self.pids[k] for k in self.members(row)]

    def __len__(self) -> int:
        return 2**40  # endless: the trainer decides when to stop

    def __getitem__(self, index: int) -> Batch:
        members = self.members(int(index))
        tokens, prompt_lengths = [self.tokens[k] for k in members], [int(self.prompt_lengths[k]) for k in members]
        row = pack_row(tokens, prompt_lengths, self.limits, self.pad_id)
        if self.images is None:
            return row
        ids, images = self.images(row.tokens, self.limits.features)
        return row._replace(tokens=ids, images=images)


def pack_dataset(
    dataset: DistillationDataset,
    config,
    pad_id: int,
    soft_prompt: SoftPromptTokens = NO_SOFT_PROMPT,
    prefix_lm: bool = False,
    images: ImageBatcher | None = None,
) -> PackedRows:
    """Packed rows of a distillation dataset, in the shape that `config.train` asks for.

    Args:
      pad_id: id of padding.
      soft_prompt: soft prompt tokens, which every sequence gets.
      prefix_lm: whether the student attends to prompts bidirectionally (prefix LM).
      images: the image inputs of rows, for a vision-language model.

    Raises:
      UserError: the dataset is empty or a sequence is longer than a row.
    """
    columns = dataset.columns()
    if not columns.tokens:
        raise UserError(f"{dataset.path}: no training sequence; see its manifest.json for what was dropped and why")
    return pack_sequences(
        [
            soft_prompt.put(ids.tolist(), int(image_end))
            for ids, image_end in zip(columns.tokens, columns.image_ends, strict=True)
        ],
        columns.prompt_lengths + soft_prompt.count,
        columns.pids,
        config.train.row_length,
        pad_id,
        config.seed,
        prefix_lm,
        images,
    )


def pack_sequences(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Int[np.ndarray, " N"],
    pids: Sequence[str],
    row_length: int,
    pad_id: int,
    seed: int,
    prefix_lm: bool = False,
    images: ImageBatcher | None = None,
) -> PackedRows:
    """Packed rows of sequences. Arguments and errors are those of `PackedRows` and `pack_dataset`."""
    tokens = [np.asarray(ids, np.int32) for ids in sequences]
    lengths = np.array([len(ids) for ids in tokens])
    limits = choose_limits(lengths, lengths - prompt_lengths, row_length, pids)._replace(prefix_lm=prefix_lm)
    if images is not None:
        features = np.array([images.count_features(ids) for ids in tokens])
        limits = limits._replace(features=images.padded_capacity(capacity_for(lengths, features, row_length)))
    return PackedRows(tokens, prompt_lengths, pids, limits, pad_id, seed, images)


def training_steps(config, rows: PackedRows) -> int:
    """Optimizer steps of a run: `config.train.steps`, or its epochs over these rows, at least one."""
    rows_per_step = config.train.batch_rows * config.train.accumulate
    return config.train.steps or max(1, round(config.train.epochs * rows.rows_of_epoch(0) / rows_per_step))


class _ProcessRows:
    """The rows of one process: of each micro-batch, those that its devices hold."""

    def __init__(self, rows: PackedRows, batch_rows: int, accumulate: int, local_rows: Int[np.ndarray, " L"]):
        self.rows, self.batch_rows, self.accumulate, self.local_rows = rows, batch_rows, accumulate, local_rows

    def __len__(self) -> int:
        return len(self.rows) // (self.batch_rows * self.accumulate) * self.accumulate * len(self.local_rows)

    def __getitem__(self, index: int) -> Batch:
        micro_batch, k = divmod(int(index), len(self.local_rows))
        return self.rows[micro_batch * self.batch_rows + int(self.local_rows[k])]


def make_loader(
    rows: PackedRows, batch_rows: int, accumulate: int, local_rows: Int[np.ndarray, " L"] | None = None
) -> grain.DatasetIterator[Batch]:
    """A checkpointable iterator over optimizer steps: each item is a `Batch` of arrays [accumulate, L, …].

    Its `get_state()`/`set_state()` go into the checkpoint; state k continues with step k, on any number of
    processes.

    Args:
      batch_rows: rows of one micro-batch over all processes.
      accumulate: micro-batches of a step (gradient accumulation).
      local_rows: which rows of a micro-batch this process loads (`sqa_jax.parallel.mesh.local_rows`); None is all.
    """
    local_rows = np.arange(batch_rows) if local_rows is None else local_rows
    L = len(local_rows)

    def split(batch: Batch) -> Batch:
        return jax.tree.map(lambda array: array.reshape(accumulate, L, *array.shape[1:]), batch)

    source = _ProcessRows(rows, batch_rows, accumulate, local_rows)
    dataset = grain.MapDataset.source(source).batch(accumulate * L, drop_remainder=True).map(split)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
