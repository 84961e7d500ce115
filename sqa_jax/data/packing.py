"""Sequences into rows of one length, so that nearly every token computed is a real one.

A packed row, for two sequences of three and four tokens whose last two are targets:

    tokens            a0 a1 a2 b0 b1 b2 b3  0
    segments           1  1  1  2  2  2  2  0
    positions          0  1  2  0  1  2  3  0
    target_positions   0  1  4  5               (the position *before* each target: what predicts it)
    targets           a1 a2 b2 b3
    target_mask        1  1  1  1

Logits are computed at `target_positions` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sqa_jax.errors import UserError


class Limits(NamedTuple):
    """Static shape of a row.

    Attributes:
      tokens: T, tokens of a row.
      targets: M, target tokens of a row.
      virtual: places in front of every sequence for a soft prompt.
    """

    tokens: int
    targets: int
    virtual: int = 0


def choose_limits(
    lengths: np.ndarray, targets: np.ndarray, row_length: int, virtual: int, pids: Sequence[str]
) -> Limits:
    """The smallest M that leaves packing free, in multiples of 8.

    Rows hold targets in about the data's own proportion, so M is that proportion of a row with a quarter to
    spare, and at least the longest single target.

    Args:
      lengths: [N] tokens of each sequence, without virtual ones.
      targets: [N] target tokens of each.

    Raises:
      UserError: a sequence does not fit into a row (the first is named).
    """
    sizes = lengths + virtual
    if (long := np.flatnonzero(sizes > row_length)).size:
        raise UserError(
            f"question {pids[long[0]]} takes {sizes[long[0]]} tokens and {long.size} questions do not fit into "
            f"config.train.row_length = {row_length}; raise it, or lower config.recipe.max_prompt"
        )
    share = targets.sum() / sizes.sum()
    wanted = max(int(targets.max()), int(np.ceil(1.25 * share * row_length)))
    return Limits(row_length, min(row_length, -(-wanted // 8) * 8), virtual)


def plan_rows(sizes: np.ndarray, targets: np.ndarray, limits: Limits, rng: np.random.Generator) -> list[list[int]]:
    """Deals one epoch's sequences to rows: shuffled, best-fit decreasing within windows, rows shuffled.

    Each sequence is in exactly one row. Windows keep the order random on a large scale; within one, the
    largest sequences go first, each into the fullest row that still takes it (Johnson 1974), which leaves a
    few percent of padding.

    Args:
      sizes: [N] tokens of each sequence, virtual ones included.
      targets: [N] target tokens of each.
    """
    order = rng.permutation(len(sizes))
    window = 64 * max(1, limits.tokens // max(1, int(sizes.mean())))
    rows: list[list[int]] = []
    open_rows: list[tuple[list[int], int, int]] = []  # (row, tokens free, targets free)
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        for index in chunk[np.argsort(-sizes[chunk], kind="stable")]:
            size, count = int(sizes[index]), int(targets[index])
            fits = [k for k, (_, free, room) in enumerate(open_rows) if free >= size and room >= count]
            if fits:
                best = min(fits, key=lambda k: open_rows[k][1])
                row, free, room = open_rows[best]
                row.append(int(index))
                open_rows[best] = (row, free - size, room - count)
            else:
                rows.append([int(index)])
                open_rows.append((rows[-1], limits.tokens - size, limits.targets - count))
        # Rows that a next window could hardly fill are closed, which also bounds the search.
        open_rows = sorted(open_rows, key=lambda entry: -entry[1])[:8]
    return [rows[k] for k in rng.permutation(len(rows))]


def pack_row(
    sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int], limits: Limits, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays of one row (see the module's picture), int32; `target_mask` float32."""
    T, M, V = limits
    row = {
        "tokens": np.full(T, pad_id, np.int32),
        "segments": np.zeros(T, np.int32),
        "positions": np.zeros(T, np.int32),
        "target_positions": np.zeros(M, np.int32),
        "targets": np.zeros(M, np.int32),
        "target_mask": np.zeros(M, np.float32),
    }
    place = target = 0
    for segment, (tokens, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True), start=1):
        size, count = V + len(tokens), len(tokens) - prompt_length
        row["tokens"][place + V : place + size] = tokens
        row["segments"][place : place + size] = segment
        row["positions"][place : place + size] = np.arange(size)
        row["target_positions"][target : target + count] = place + V + np.arange(prompt_length - 1, len(tokens) - 1)
        row["targets"][target : target + count] = tokens[prompt_length:]
        row["target_mask"][target : target + count] = 1.0
        place, target = place + size, target + count
    return row
