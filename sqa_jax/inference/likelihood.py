"""Multiple-choice scoring by log-likelihood: one prompt shared by all options, which are masked branches after it.

A row for one question with prompt p0 p1 p2 and options "x y", "x z", whose common prefix x is computed once:

    tokens      p0 p1 p2  x |  y |  z
    positions    0  1  2  3 |  4 |  4
    branches     0  0  0  0 |  1 |  2

A branch attends to the prompt and to itself, not to other branches. Several questions are packed into a row as
segments; the prefix that all prompts share is prefilled once, beforehand. The score of an option is the sum of its
tokens' log-probabilities; the options' common prefix adds the same to all of them and is left out.

Shapes: B rows of T tokens and M scored tokens; n tokens and m scored tokens of one question.
"""

from __future__ import annotations

import functools
import os.path
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import FrozenConfigDict

from sqa_jax import adapters
from sqa_jax.batches.batch import Batch
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.errors import UserError
from sqa_jax.inference.batching import first_fit, round_up
from sqa_jax.inference.prefix_cache import PrefixKV, SharedPrefixCache, with_shared_prefix
from sqa_jax.models.api import StudentModel, extra_model_inputs
from sqa_jax.models.log_probs import target_log_probs
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.segments import PREFIX_LM
from sqa_jax.parallel.mesh import place_rows, replicated, row_shards

_LENGTH_MULTIPLE = 128  # of a row's tokens, so that few shapes are compiled
_TARGETS_MULTIPLE = 16  # of a row's scored tokens


class MultipleChoice(NamedTuple):
    """A question to score: ids of the prompt, and of each option's continuation."""

    prompt: Sequence[int]
    options: Sequence[Sequence[int]]


class BranchedSequence(NamedTuple):
    """One question's tokens, with its options as branches.

    Attributes:
      target_positions: index of the token whose hidden state predicts each scored token.
      targets: ids of the scored tokens.
      target_options: option that each scored token belongs to.
    """

    tokens: Int[np.ndarray, "n"]
    positions: Int[np.ndarray, "n"]
    branches: Int[np.ndarray, "n"]
    target_positions: Int[np.ndarray, "m"]
    targets: Int[np.ndarray, "m"]
    target_options: Int[np.ndarray, "m"]


def branched_sequence(question: MultipleChoice, prefix_lm: bool = False) -> BranchedSequence:
    """The sequence of one question.

    Args:
      prefix_lm: attention is bidirectional within the prompt.
    """
    shared = list(os.path.commonprefix([list(option) for option in question.options]))
    # An option that is a prefix of another keeps its last token, so that each has something to score.
    shared = shared[: min((len(option) - 1 for option in question.options), default=0)]
    trunk = list(question.prompt) + shared
    tokens, positions = list(trunk), list(range(len(trunk)))
    branches = [PREFIX_LM * prefix_lm] * len(question.prompt) + [0] * len(shared)
    target_positions, targets, target_options = [], [], []
    for number, option in enumerate(question.options):
        rest = list(option[len(shared) :])
        target_positions += [len(trunk) - 1] + [len(tokens) + k for k in range(len(rest) - 1)]
        targets += rest
        target_options += [number] * len(rest)
        # The last token of an option predicts nothing that is scored, so it is left out.
        tokens += rest[:-1]
        positions += [len(trunk) + k for k in range(len(rest) - 1)]
        branches += [number + 1] * (len(rest) - 1)
    arrays = (tokens, positions, branches, target_positions, targets, target_options)
    return BranchedSequence(*(np.asarray(a, np.int32) for a in arrays))


class _Plan(NamedTuple):
    """How questions are packed into rows.

    Attributes:
      rows: indices of the questions of each row.
      length, targets: T and M.
      decoder_tokens: tokens of a row, at most, that predict another one; see `with_max_decoder_tokens`.
      features: image features of a row at most.
    """

    rows: list[list[int]]
    length: int
    targets: int
    decoder_tokens: int
    features: int


@functools.lru_cache(maxsize=4)
def _shared_forward(adapter_config, mesh: Mesh):
    """The compiled forward pass of all scorers with equal settings: (decoder, adapter, base, shared_kv, batch)."""

    def forward(
        decoder: StudentModel, adapter: ParamTree, base: ParamTree, shared_kv: PrefixKV | None, batch: Batch
    ) -> Float[Array, "B M"]:
        """Log-probabilities of the batch's targets."""
        params = adapters.model_params(adapter, base)
        adaptation = with_shared_prefix(adapter_config, adapter, decoder.config, shared_kv)
        inputs = extra_model_inputs(decoder, params, adaptation, batch.branches, batch.images)
        hidden, _ = decoder.apply(
            {"params": params}, batch.tokens, batch.positions, batch.segments, adaptation, **inputs
        )
        return target_log_probs(decoder, params, hidden, batch.target_positions, batch.targets)

    # Replicated, so that every process can read it.
    return jax.jit(forward, static_argnums=0, out_shardings=replicated(mesh))


class LikelihoodScorer:
    """Scores options with one compiled forward pass.

    Args:
      adapter_config: `config.adapter`.
      mesh: rows are sharded over its data axes.
      row_length: tokens of a row; grown to the longest question where that needs more.
      batch_rows: rows of one forward pass at most; rounded up to a multiple of the data shards.
      images: of the questions, for vision-language models.
    """

    def __init__(
        self,
        adapter_config,
        decoder: StudentModel,
        mesh: Mesh,
        row_length: int,
        batch_rows: int,
        images: ImageBatcher | None = None,
    ):
        self.decoder, self.mesh, self.images = decoder, mesh, images
        self._shards = row_shards(mesh)
        self.batch_rows = round_up(batch_rows, self._shards)
        # Sizes only grow, so that later calls with questions of like sizes compile nothing.
        self._sizes = _Plan([], row_length, 0, 0, 0)
        self._shared_prefix_cache = SharedPrefixCache(adapter_config, decoder, mesh)
        self._forward_jit = _shared_forward(FrozenConfigDict(adapter_config), mesh)

    def __call__(
        self, adapter: ParamTree, base: ParamTree, questions: Sequence[MultipleChoice]
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields, batch by batch, (index into `questions`, log-probabilities of each option's scored tokens).

        Raises:
          UserError: a question is longer than the student's maximum length.
        """
        if not questions:
            return
        shared = self._shared_prefix_cache(adapter, base, [question.prompt for question in questions])
        prefix_lm = self.decoder.config.prefix_lm
        sequences = [
            branched_sequence(question._replace(prompt=prompt), prefix_lm)
            for question, prompt in zip(questions, shared.prompts, strict=True)
        ]
        self._check_length(shared.length, sequences)
        plan = self._plan(sequences, [len(prompt) for prompt in shared.prompts])
        decoder = self.decoder.with_max_decoder_tokens(plan.decoder_tokens)
        count = min(self.batch_rows, round_up(len(plan.rows), self._shards))  # few questions take few rows
        for start in range(0, len(plan.rows), count):
            rows = plan.rows[start : start + count]
            batch = _pack([[sequences[k] for k in row] for row in rows], count, plan.length, plan.targets)
            if self.images is not None:
                tokens, images = self.images.add_images(batch.tokens, plan.features)
                batch = batch._replace(tokens=tokens, images=images)
            batch = place_rows(batch, self.mesh, count)
            log_probs = np.asarray(self._forward_jit(decoder, adapter, base, shared.kv, batch))
            for row, members in enumerate(rows):
                position = 0
                for index in members:
                    sequence = sequences[index]
                    scores = log_probs[row, position : position + len(sequence.targets)]
                    position += len(sequence.targets)
                    options = range(len(questions[index].options))
                    yield index, [scores[sequence.target_options == k] for k in options]

    def _check_length(self, prefix: int, sequences: Sequence[BranchedSequence]) -> None:
        limit = self.decoder.config.max_positions
        if any(prefix + int(sequence.positions.max()) >= limit for sequence in sequences):
            raise UserError(
                f"a question takes more than the student's {limit} positions; lower config.recipe.max_prompt, and for a "
                "vision-language model config.student.max_image_tokens"
            )

    def _plan(self, sequences: Sequence[BranchedSequence], prompt_lengths: Sequence[int]) -> _Plan:
        """Packs sequences into rows, of sizes not smaller than those of the calls before."""
        lengths = [len(sequence.tokens) for sequence in sequences]
        targets = [len(sequence.targets) for sequence in sequences]
        before = self._sizes
        T = max(before.length, round_up(max(lengths), _LENGTH_MULTIPLE))
        # Twice the questions' mean share of scored tokens: capacity costs little, a row that is closed early much.
        # (Short questions, which share rows, have more than the mean share.)
        share = sum(targets) / sum(lengths)
        M = round_up(max([before.targets, int(2 * share * T), *targets]), _TARGETS_MULTIPLE)
        rows = first_fit(lengths, targets, T, M)
        # From the last token of each prompt on, tokens predict others.
        predicting = [length - prompt + 1 for length, prompt in zip(lengths, prompt_lengths, strict=True)]
        decoder_tokens = round_up(max(sum(predicting[k] for k in row) for row in rows), _TARGETS_MULTIPLE)
        features = 0
        if self.images is not None:
            count = self.images.count_features
            features = self.images.padded_capacity(max(sum(count(sequences[k].tokens) for k in row) for row in rows))
        self._sizes = _Plan([], T, M, max(before.decoder_tokens, decoder_tokens), max(before.features, features))
        return self._sizes._replace(rows=rows)


def _pack(rows: list[list[BranchedSequence]], count: int, length: int, targets: int) -> Batch:
    """`count` packed rows, of which the last ones may be empty; the targets are the scored tokens."""
    batch = Batch(
        *(np.zeros((count, length), np.int32) for _ in range(3)),
        *(np.zeros((count, targets), np.int32) for _ in range(2)),
        target_mask=np.zeros((count, targets), np.float32),
        branches=np.zeros((count, length), np.int32),
    )
    assert isinstance(batch.branches, np.ndarray)
    for row, members in enumerate(rows):
        position = target = 0
        for segment, sequence in enumerate(members, start=1):
            span = slice(position, position + len(sequence.tokens))
            scored = slice(target, target + len(sequence.targets))
            batch.tokens[row, span] = sequence.tokens
            batch.positions[row, span] = sequence.positions
            batch.branches[row, span] = sequence.branches
            batch.segments[row, span] = segment
            batch.target_positions[row, scored] = sequence.target_positions + position
            batch.targets[row, scored] = sequence.targets
            batch.target_mask[row, scored] = 1.0
            position, target = span.stop, scored.stop
    return batch


def choose(log_probs: Sequence[Float[np.ndarray, "_"]], normalize: str) -> int:
    """The likeliest option: by the sum over its tokens ("none") or their mean ("length"); ties go to the first."""
    scores = [p.mean() if normalize == "length" else p.sum() for p in log_probs]
    return int(np.argmax(scores))
