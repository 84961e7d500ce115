"""Choosing among options by their likelihood: the prompt is read once, the options are branches behind it.

A row for one question with prompt p0 p1 p2 and options "x y", "x z", whose common beginning x is read once:

    tokens      p0 p1 p2  x |  y |  z
    positions    0  1  2  3 |  4 |  4
    branches     0  0  0  0 |  1 |  2

Several questions share a row as segments; what all of them begin with is not in the rows but read once, beforehand.
The log-probability of an option is the sum over its own tokens; the common beginning of the options adds the same to
all of them and is left out.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sqa_jax import adapters
from sqa_jax.batches.batch import Batch
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.errors import UserError
from sqa_jax.inference.batching import first_fit
from sqa_jax.inference.prefix_cache import SharedPrefixCache, with_shared_prefix
from sqa_jax.models.api import Module, extra_model_inputs, with_max_decoder_tokens
from sqa_jax.models.log_probs import target_log_probs
from sqa_jax.models.segments import PREFIX_LM
from sqa_jax.parallel.mesh import place_rows, replicated, row_shards


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


def layout(choice: Choice, both_ways: bool = False) -> _Tree:
    """The tree of one question, whose prompt the student reads both ways or not."""
    shared = list(os.path.commonprefix([list(option) for option in choice.options]))
    # An option that is the beginning of another keeps its last token, so that each has something to score.
    shared = shared[: min((len(option) - 1 for option in choice.options), default=0)]
    trunk = list(choice.prompt) + shared
    tokens, positions = list(trunk), list(range(len(trunk)))
    branches = [PREFIX_LM * both_ways] * len(choice.prompt) + [0] * len(shared)
    predicting, targets, owners = [], [], []
    for number, option in enumerate(choice.options):
        own = list(option[len(shared) :])
        # The last token of an option predicts nothing that is scored, so it is not read.
        places = [len(trunk) - 1] + [len(tokens) + k for k in range(len(own) - 1)]
        tokens += own[:-1]
        positions += [len(trunk) + k for k in range(len(own) - 1)]
        branches += [number + 1] * (len(own) - 1)
        predicting, targets, owners = predicting + places, targets + own, owners + [number] * len(own)
    arrays = (tokens, positions, branches, predicting, targets, owners)
    return _Tree(*(np.asarray(a, np.int32) for a in arrays))


class LikelihoodScorer:
    """Scores options with one compiled forward pass.

    Args:
      settings: `config.adapter`.
      mesh: rows lie over its data axes.
      row_length: tokens of a row; grown to the longest question where that needs more.
      batch_rows: most rows of one forward pass; rounded up to what the mesh's data axes divide.
      pictures: what puts into rows what they see, where the student sees.
    """

    def __init__(
        self,
        settings,
        decoder: Module,
        mesh: Mesh,
        row_length: int,
        batch_rows: int,
        images: ImageBatcher | None = None,
    ):
        self.settings, self.decoder, self.mesh, self.images = settings, decoder, mesh, images
        self._shards = row_shards(mesh)
        self.row_length, self.batch_rows = row_length, -(-batch_rows // self._shards) * self._shards
        self._scored = self._decoded = self._features = (
            0  # grow with what is asked, so that later calls of like size compile nothing
        )
        self._beginning = SharedPrefixCache(settings, decoder, mesh)
        # Replicated, so that every process can read it.
        self._forward = jax.jit(self._log_probs, static_argnums=0, out_shardings=replicated(mesh))

    def _log_probs(self, decoder: Module, adapter: Any, base: Any, beginning: Any, batch: Batch) -> jax.Array:
        weights = adapters.model_params(adapter, base)
        adaptation = with_shared_prefix(self.settings, adapter, decoder.config, beginning)
        hidden, _ = decoder.apply(
            {"params": weights},
            batch.tokens,
            batch.positions,
            batch.segments,
            adaptation,
            **extra_model_inputs(decoder, weights, adaptation, batch.branches, batch.images),
        )
        return target_log_probs(decoder, weights, hidden, batch.target_positions, batch.targets)

    def __call__(self, adapter: Any, base: Any, choices: Sequence[Choice]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields, batch by batch, (index into `choices`, log-probabilities of each option's own tokens).

        Raises:
          UserError: a question is longer than the student's positions.
        """
        if not choices:
            return
        prompts = [choice.prompt for choice in choices]
        begun, beginning, rest = self._beginning(adapter, base, prompts)
        both_ways = self.decoder.config.prefix_lm
        trees = [layout(one._replace(prompt=own), both_ways) for one, own in zip(choices, rest, strict=True)]
        longest = max(len(tree.tokens) for tree in trees)
        limit = self.decoder.config.max_positions
        if any(begun + int(tree.positions.max()) >= limit for tree in trees):
            raise UserError(
                f"a question takes more than the student's {limit} positions; lower config.recipe.max_prompt, and for a "
                "student that sees config.student.max_image_tokens"
            )
        length = self.row_length = max(self.row_length, -(-longest // 128) * 128)
        # Twice the questions' own proportion of scored tokens: room costs little, and a row closed early much. (Short
        # questions, which share rows, have more than their proportion.)
        share = sum(len(t.targets) for t in trees) / sum(len(t.tokens) for t in trees)
        scored = max([self._scored, int(2 * share * length)] + [len(t.targets) for t in trees])
        scored = self._scored = -(-scored // 16) * 16
        rows = first_fit([len(t.tokens) for t in trees], [len(t.targets) for t in trees], length, scored)
        # From the last token of each prompt on, tokens have others behind them that are predicted.
        behind = [len(tree.tokens) - len(own) + 1 for tree, own in zip(trees, rest, strict=True)]
        most = max(sum(behind[k] for k in row) for row in rows)
        self._decoded = max(self._decoded, -(-most // 16) * 16)
        decoder = with_max_decoder_tokens(self.decoder, self._decoded)
        if self.images is not None:
            most = max(sum(self.images.count(trees[k].tokens) for k in row) for row in rows)
            self._features = max(self._features, self.images.room(most))
        at_once = min(self.batch_rows, -(-len(rows) // self._shards) * self._shards)  # few questions take few rows
        for start in range(0, len(rows), at_once):
            batch_rows = rows[start : start + at_once]
            batch = _pack([[trees[k] for k in row] for row in batch_rows], at_once, length, scored)
            if self.images is not None:
                tokens, images = self.images.add_images(batch.tokens, self._features)
                batch = batch._replace(tokens=tokens, images=images)
            batch = place_rows(batch, self.mesh, at_once)
            log_probs = np.asarray(self._forward(decoder, adapter, base, beginning, batch))
            for row, members in enumerate(batch_rows):
                place = 0
                for index in members:
                    tree = trees[index]
                    own = log_probs[row, place : place + len(tree.targets)]
                    place += len(tree.targets)
                    yield index, [own[tree.option == k] for k in range(len(choices[index].options))]


def _pack(rows: list[list[_Tree]], count: int, length: int, scored: int) -> Batch:
    """`count` packed rows, of which the last ones may be empty; the targets are the scored tokens."""
    batch = Batch(
        *(np.zeros((count, length), np.int32) for _ in range(3)),
        *(np.zeros((count, scored), np.int32) for _ in range(2)),
        target_mask=np.zeros((count, scored), np.float32),
        branches=np.zeros((count, length), np.int32),
    )
    for row, members in enumerate(rows):
        place = target = 0
        for segment, tree in enumerate(members, start=1):
            span, own = slice(place, place + len(tree.tokens)), slice(target, target + len(tree.targets))
            batch.tokens[row, span] = tree.tokens
            batch.positions[row, span] = tree.positions
            batch.branches[row, span] = tree.branches
            batch.segments[row, span] = segment
            batch.target_positions[row, own] = tree.predicting + place
            batch.targets[row, own] = tree.targets
            batch.target_mask[row, own] = 1.0
            place, target = span.stop, own.stop
    return batch


def choose(log_probs: list[np.ndarray], normalize: str) -> int:
    """The likeliest option: by the sum over its tokens ("none") or the mean a token ("length"); ties go to the first."""
    scores = [p.mean() if normalize == "length" else p.sum() for p in log_probs]
    return int(np.argmax(scores))
