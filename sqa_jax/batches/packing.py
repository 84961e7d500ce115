"""Packing: several sequences share a row of fixed length, so that few of the tokens computed are padding.

A packed row, for two sequences of three and four tokens whose last two are targets:

    tokens            a0 a1 a2 b0 b1 b2 b3  0
    segments           1  1  1  2  2  2  2  0
    positions          0  1  2  0  1  2  3  0
    target_positions   0  1  4  5               (the position *before* each target, whose hidden state predicts it)
    targets           a1 a2 b2 b3
    target_mask        1  1  1  1

Tokens attend within their segment only. Logits are computed at `target_positions` only. In a prefix LM, `branches`
marks the prompts, whose tokens attend to each other bidirectionally: see
`sqa_jax.models.layers.masks.attention_mask`. Image inputs of a row: see `sqa_jax.batches.images`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sqa_jax.batches.batch import Batch
from sqa_jax.errors import UserError
from sqa_jax.models.segments import PREFIX_LM

_WINDOW_ROWS = 64  # a window of sequences fills about so many rows
_MAX_OPEN_ROWS = 8  # rows that a window leaves open for the next


class Limits(NamedTuple):
    """Static shape of a row.

    Attributes:
      tokens: T, tokens of a row.
      targets: M, target tokens of a row.
      features: F, image features of a row; 0 for text-only students.
      prefix_lm: whether prompts are attended to bidirectionally (prefix LM).
    """

    tokens: int
    targets: int
    features: int = 0
    prefix_lm: bool = False


def choose_limits(
    lengths: Int[np.ndarray, " N"], targets: Int[np.ndarray, " N"], row_length: int, pids: Sequence[str]
) -> Limits:
    """The limits of rows without images: the smallest M, in multiples of 8, that does not constrain packing.

    Args:
      lengths: tokens of each sequence.
      targets: target tokens of each.
      row_length: T.
      pids: the question of each, for messages.

    Raises:
      UserError: a sequence does not fit into a row (the first is named).
    """
    if (long := np.flatnonzero(lengths > row_length)).size:
        raise UserError(
            f"question {pids[long[0]]} takes {lengths[long[0]]} tokens and {long.size} questions do not fit into "
            f"config.train.row_length = {row_length}; raise it, or lower config.recipe.max_prompt, and for a "
            "vision-language model config.student.max_image_tokens"
        )
    return Limits(row_length, min(row_length, -(-capacity_for(lengths, targets, row_length) // 8) * 8))


def capacity_for(lengths: Int[np.ndarray, " N"], counts: Int[np.ndarray, " N"], row_length: int) -> int:
    """How many targets, or image features, a row must have room for so that they do not constrain packing.

    Rows hold them in about the proportion of the data, so the capacity is that proportion of a row with a quarter to
    spare, and at least the maximum of a single sequence.

    Args:
      lengths: tokens of each sequence.
      counts: targets, or features, of each sequence.
      row_length: T.
    """
    share = counts.sum() / lengths.sum()
    return max(int(counts.max()), int(np.ceil(1.25 * share * row_length)))


def plan_rows(counts: Int[np.ndarray, "N C"], capacity: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """Best-fit-decreasing bin packing in shuffled windows: one epoch's rows, as indices of sequences.

    Each sequence is in exactly one row. Sequences are shuffled and cut into windows. Within a window, the longest go
    first, each into the fullest row that it fits into (Johnson 1974), which leaves a few percent of padding. Windows
    keep the order random on a large scale; at last the rows are shuffled.

    Args:
      counts: of each sequence its tokens, and what else a row has limited room for.
      capacity: of a row, for each of the C.
      rng: of the epoch.
    """
    lengths = counts[:, 0]
    order = rng.permutation(len(lengths))
    window = _WINDOW_ROWS * max(1, capacity[0] // max(1, int(lengths.mean())))
    rows: list[list[int]] = []
    open_rows: list[tuple[list[int], list[int]]] = []  # (row, its free capacity)
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        for index in chunk[np.argsort(-lengths[chunk], kind="stable")]:
            count = counts[index].tolist()
            fits = [k for k, (_, free) in enumerate(open_rows) if all(map(operator.le, count, free))]
            if fits:
                best = min(fits, key=lambda k: open_rows[k][1][0])
                row, free = open_rows[best]
                row.append(int(index))
            else:
                best, row, free = len(open_rows), [int(index)], list(capacity)
                rows.append(row)
                open_rows.append((row, free))
            open_rows[best] = (row, list(map(operator.sub, free, count)))
        # Rows that the next window could hardly fill are closed, which also bounds the search.
        open_rows = sorted(open_rows, key=lambda entry: -entry[1][0])[:_MAX_OPEN_ROWS]
    return [rows[k] for k in rng.permutation(len(rows))]


def pack_row(
    sequences: Sequence[Int[np.ndarray, " _"]], prompt_lengths: Sequence[int], limits: Limits, pad_id: int
) -> Batch:
    """One row of sequences, without leading dimensions (see the module's docstring for its values)."""
    T, M = limits.tokens, limits.targets
    row = Batch(
        tokens=np.full(T, pad_id, np.int32),
        segments=np.zeros(T, np.int32),
        positions=np.zeros(T, np.int32),
        target_positions=np.zeros(M, np.int32),
        targets=np.zeros(M, np.int32),
        target_mask=np.zeros(M, np.float32),
        branches=np.zeros(T, np.int32) if limits.prefix_lm else None,
    )
    start = first = 0  # of the sequence in `tokens`, and of its targets in `targets`
    for segment, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True), start=1):
        size = len(tokens)
        span, scored = slice(start, start + size), slice(first, first + size - prompt_length)
        row.tokens[span] = tokens
        row.segments[span] = segment
        row.positions[span] = np.arange(size)
        row.target_positions[scored] = start + np.arange(prompt_length - 1, size - 1)
        row.targets[scored] = tokens[prompt_length:]
        row.target_mask[scored] = 1.0
        if row.branches is not None:
            row.branches[start : start + prompt_length] = PREFIX_LM
        start, first = span.stop, scored.stop
    return row
