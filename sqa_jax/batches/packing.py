"""Sequences into rows of one length, so that nearly every token computed is a real one.

A packed row, for two sequences of three and four tokens whose last two are targets:

    tokens            a0 a1 a2 b0 b1 b2 b3  0
    segments           1  1  1  2  2  2  2  0
    positions          0  1  2  0  1  2  3  0
    target_positions   0  1  4  5               (the position *before* each target: what predicts it)
    targets           a1 a2 b2 b3
    target_mask        1  1  1  1

Logits are computed at `target_positions` only. Where prompts are read both ways (a prefix LM), `branches` marks them,
see `sqa_jax.models.layers.attention.attention_mask`; where students see, the row has what it sees, see `sqa_jax.batches.images`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sqa_jax.batches.batch import Batch
from sqa_jax.errors import UserError
from sqa_jax.models.segments import PREFIX_LM


class Limits(NamedTuple):
    """Static shape of a row.

    Attributes:
      tokens: T, tokens of a row.
      targets: M, target tokens of a row.
      features: F, of the pictures of a row; 0 where students see none.
      both_ways: whether prompts are read both ways.
    """

    tokens: int
    targets: int
    features: int = 0
    both_ways: bool = False


def choose_limits(lengths: np.ndarray, targets: np.ndarray, row_length: int, pids: Sequence[str]) -> Limits:
    """The limits of rows without pictures: the smallest M that leaves packing free, in multiples of 8.

    Args:
      lengths: [N] tokens of each sequence.
      targets: [N] target tokens of each.

    Raises:
      UserError: a sequence does not fit into a row (the first is named).
    """
    if (long := np.flatnonzero(lengths > row_length)).size:
        raise UserError(
            f"question {pids[long[0]]} takes {lengths[long[0]]} tokens and {long.size} questions do not fit into "
            f"config.train.row_length = {row_length}; raise it, or lower config.recipe.max_prompt, and for a student that "
            "sees config.student.max_image_tokens"
        )
    return Limits(row_length, min(row_length, -(-capacity_for(lengths, targets, row_length) // 8) * 8))


def capacity_for(lengths: np.ndarray, counts: np.ndarray, row_length: int) -> int:
    """How much of something a row should take so that packing is free.

    Rows hold it in about the data's own proportion, so it is that proportion of a row with a quarter to spare, and at
    least the most that a single sequence has.

    Args:
      lengths: [N] tokens of each sequence.
      counts: [N] how much each has of it.
    """
    share = counts.sum() / lengths.sum()
    return max(int(counts.max()), int(np.ceil(1.25 * share * row_length)))


def plan_rows(counts: np.ndarray, room: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """Deals one epoch's sequences to rows: shuffled, best-fit decreasing within windows, rows shuffled.

    Each sequence is in exactly one row. Windows keep the order random on a large scale; within one, the
    largest sequences go first, each into the fullest row that still takes it (Johnson 1974), which leaves a
    few percent of padding.

    Args:
      counts: [N, C] of each sequence its tokens, and of other things that a row has room for.
      room: [C] of a row.
    """
    sizes = counts[:, 0]
    order = rng.permutation(len(sizes))
    window = 64 * max(1, room[0] // max(1, int(sizes.mean())))
    rows: list[list[int]] = []
    open_rows: list[tuple[list[int], list[int]]] = []  # (row, what is free in it)
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        for index in chunk[np.argsort(-sizes[chunk], kind="stable")]:
            own = counts[index].tolist()
            fits = [k for k, (_, free) in enumerate(open_rows) if all(map(operator.le, own, free))]
            if fits:
                best = min(fits, key=lambda k: open_rows[k][1][0])
                row, free = open_rows[best]
                row.append(int(index))
            else:
                best, row, free = len(open_rows), [int(index)], room
                rows.append(row)
                open_rows.append((row, []))
            open_rows[best] = (row, list(map(operator.sub, free, own)))
        # Rows that a next window could hardly fill are closed, which also bounds the search.
        open_rows = sorted(open_rows, key=lambda entry: -entry[1][0])[:8]
    return [rows[k] for k in rng.permutation(len(rows))]


def pack_row(sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int], limits: Limits, pad_id: int) -> Batch:
    """The arrays of one row (see the module's picture), int32; `target_mask` float32."""
    T, M = limits.tokens, limits.targets
    row = Batch(
        tokens=np.full(T, pad_id, np.int32),
        segments=np.zeros(T, np.int32),
        positions=np.zeros(T, np.int32),
        target_positions=np.zeros(M, np.int32),
        targets=np.zeros(M, np.int32),
        target_mask=np.zeros(M, np.float32),
        branches=np.zeros(T, np.int32) if limits.both_ways else None,
    )
    place = target = 0
    for segment, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True), start=1):
        size, count = len(tokens), len(tokens) - prompt_length
        row.tokens[place : place + size] = tokens
        row.segments[place : place + size] = segment
        row.positions[place : place + size] = np.arange(size)
        row.target_positions[target : target + count] = place + np.arange(prompt_length - 1, size - 1)
        row.targets[target : target + count] = tokens[prompt_length:]
        row.target_mask[target : target + count] = 1.0
        if row.branches is not None:
            row.branches[place : place + prompt_length] = PREFIX_LM
        place, target = place + size, target + count
    return row
