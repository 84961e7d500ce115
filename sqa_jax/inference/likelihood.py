"""Choosing among options by their likelihood: the prompt is read once, the options are branches behind it.

A row for one question with prompt p0 p1 p2 and options "x y", "x z", whose common beginning x is read once:

    tokens      p0 p1 p2  x |  y |  z
    positions    0  1  2  3 |  4 |  4
    branches     0  0  0  0 |  1 |  2

Several questions share a row as segments. The log-probability of an option is the sum over its own tokens;
the common beginning adds the same to all of them and is left out.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sqa_jax.adapters import adapter as adapters
from sqa_jax.errors import UserError
from sqa_jax.students.decoder import Decoder
from sqa_jax.training.loss import target_log_probs


class Choice(NamedTuple):
    """A question to be scored: ids of the prompt, and of each option's continuation."""

    prompt: Sequence[int]
    options: Sequence[Sequence[int]]


class _Tree(NamedTuple):
    """A choice laid out: the columns of its tokens, and what is scored where."""

    tokens: np.ndarray  # [n]
    positions: np.ndarray  # [n]
    branches: np.ndarray  # [n]
    predicting: np.ndarray  # [m] place of the hidden state that predicts each scored token
    targets: np.ndarray  # [m]
    option: np.ndarray  # [m] which option each belongs to


def layout(choice: Choice, virtual: int) -> _Tree:
    """The tree of one question, with `virtual` places for a soft prompt in front."""
    shared = len(os.path.commonprefix([list(option) for option in choice.options]))
    # An option that is the beginning of another keeps its last token, so that each has something to score.
    shared = min(shared, min(len(option) for option in choice.options) - 1)
    trunk = [0] * virtual + list(choice.prompt) + list(choice.options[0][:shared])
    tokens, positions, branches = list(trunk), list(range(len(trunk))), [0] * len(trunk)
    predicting, targets, owners = [], [], []
    for number, option in enumerate(choice.options):
        own = list(option[shared:])
        # The last token of an option predicts nothing that is scored, so it is not read.
        places = [len(trunk) - 1] + [len(tokens) + k for k in range(len(own) - 1)]
        tokens += own[:-1]
        positions += [len(trunk) + k for k in range(len(own) - 1)]
        branches += [number + 1] * (len(own) - 1)
        predicting, targets, owners = predicting + places, targets + own, owners + [number] * len(own)
    arrays = (tokens, positions, branches, predicting, targets, owners)
    return _Tree(*(np.asarray(a, np.int32) for a in arrays))


def _rows(trees: Sequence[_Tree], length: int, scored: int) -> Iterator[list[int]]:
    """Indices of the questions of each row: first fit in the given order of decreasing size."""
    rows: list[tuple[list[int], int, int]] = []
    for index in sorted(range(len(trees)), key=lambda k: -len(trees[k].tokens)):
        n, m = len(trees[index].tokens), len(trees[index].targets)
        for place, (row, free, room) in enumerate(rows):
            if free >= n and room >= m:
                row.append(index)
                rows[place] = (row, free - n, room - m)
                break
        else:
            rows.append(([index], length - n, scored - m))
    return (row for row, _, _ in rows)


class LikelihoodScorer:
    """Scores options with one compiled forward pass of fixed shape.

    Args:
      settings: `config.adapter`.
      row_length: tokens of a row; grown to the longest question where that needs more.
      batch_rows: rows of one forward pass.
    """

    def __init__(self, settings, decoder: Decoder, row_length: int, batch_rows: int, batch_sharding=None):
        self.settings, self.decoder = settings, decoder
        self.row_length, self.batch_rows, self.sharding = row_length, batch_rows, batch_sharding
        self.virtual = adapters.virtual_tokens(settings)
        self._scored = 0  # grows with what is asked, so that later calls of like size compile nothing
        self._forward = jax.jit(self._log_probs)

    def _log_probs(self, adapter: Any, base: Any, batch: dict[str, jax.Array]) -> jax.Array:
        weights = adapters.weights(adapter, base)
        hidden, _ = self.decoder.apply(
            {"params": weights},
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            adapters.activate(self.settings, adapter, self.decoder.config),
            branches=batch["branches"],
        )
        return target_log_probs(self.decoder, weights, hidden, batch["predicting"], batch["targets"])

    def __call__(self, adapter: Any, base: Any, choices: Sequence[Choice]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields, batch by batch, (index into `choices`, log-probabilities of each option's own tokens).

        Raises:
          UserError: a question is longer than the student's positions.
        """
        virtual = self.virtual if "prompt" in adapter else 0
        trees = [layout(choice, virtual) for choice in choices]
        longest = max((len(tree.tokens) for tree in trees), default=0)
        limit = self.decoder.config.max_positions
        if any(int(tree.positions.max()) >= limit for tree in trees):
            raise UserError(
                f"a question takes more than the student's {limit} positions; lower config.recipe.max_prompt"
            )
        length = self.row_length = max(self.row_length, -(-longest // 128) * 128)
        # Room for scored tokens in the questions' own proportion, so that it seldom closes a row early.
        share = sum(len(t.targets) for t in trees) / max(1, sum(len(t.tokens) for t in trees))
        scored = max([self._scored, int(1.3 * share * length)] + [len(t.targets) for t in trees])
        scored = self._scored = -(-scored // 16) * 16
        rows = list(_rows(trees, length, scored))
        for start in range(0, len(rows), self.batch_rows):
            batch_rows = rows[start : start + self.batch_rows]
            batch = self._pack([[trees[k] for k in row] for row in batch_rows], length, scored)
            if self.sharding is not None:
                batch = jax.device_put(batch, self.sharding)
            log_probs = np.asarray(self._forward(adapter, base, batch))
            for row, members in enumerate(batch_rows):
                place = 0
                for index in members:
                    tree = trees[index]
                    own = log_probs[row, place : place + len(tree.targets)]
                    place += len(tree.targets)
                    yield index, [own[tree.option == k] for k in range(len(choices[index].options))]

    def _pack(self, rows: list[list[_Tree]], length: int, scored: int) -> dict[str, np.ndarray]:
        names = ("tokens", "positions", "segments", "branches")
        batch = {name: np.zeros((self.batch_rows, length), np.int32) for name in names}
        batch |= {name: np.zeros((self.batch_rows, scored), np.int32) for name in ("predicting", "targets")}
        for row, members in enumerate(rows):
            place = target = 0
            for segment, tree in enumerate(members, start=1):
                span, own = slice(place, place + len(tree.tokens)), slice(target, target + len(tree.targets))
                batch["tokens"][row, span] = tree.tokens
                batch["positions"][row, span] = tree.positions
                batch["branches"][row, span] = tree.branches
                batch["segments"][row, span] = segment
                batch["predicting"][row, own] = tree.predicting + place
                batch["targets"][row, own] = tree.targets
                place, target = span.stop, own.stop
        return batch


def choose(log_probs: list[np.ndarray], normalize: str) -> int:
    """The likeliest option: by the sum over its tokens ("none") or the mean a token ("length"); ties go to the first."""
    scores = [p.mean() if normalize == "length" else p.sum() for p in log_probs]
    return int(np.argmax(scores))
