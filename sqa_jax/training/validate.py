"""Validation during training: loss on gold targets, and accuracy where options can be scored directly."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from sqa_jax.batches.batch import Batch, empty_like, stack_rows
from sqa_jax.batches.config_data import encoder_for
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.loader import PackedRows, pack_sequences
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.inference.answer import LikelihoodAnswerer
from sqa_jax.models.api import StudentModel
from sqa_jax.models.soft_tokens import SoftPromptTokens
from sqa_jax.parallel.mesh import place_rows, replicated
from sqa_jax.prompts.formats import render_target
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.runtime import Runtime
from sqa_jax.training.loss import row_losses


class Validator:
    """Validation loss and accuracy on a fixed set of questions.

    Args:
      problems: the validation questions.
      soft_prompt: token ids that stand for the trained soft prompt.
      images: image inputs of the questions, for a vision-language model.

    Raises:
      UserError: no question fits into a row.
    """

    def __init__(
        self,
        config,
        runtime: Runtime,
        problems: Sequence[Problem],
        soft_prompt: SoftPromptTokens,
        images: ImageBatcher | None = None,
    ):
        self._problems, self._mesh = problems, runtime.mesh
        fmt, tokenizer = arm_format(config.recipe), runtime.student.tokenizer
        gold = [render_target(fmt, p.choices, p.answer, p.lecture, p.solution, config.recipe.answer) for p in problems]
        encoder = encoder_for(config, tokenizer, images and images.images)
        encoded = [e for e in encoder.encode(problems, [fmt] * len(problems), gold) if e.fits]
        encoded = [e for e in encoded if len(e.tokens) + soft_prompt.count <= config.train.row_length]
        if not encoded:
            raise UserError(
                f"none of the {len(problems)} questions of {config.eval.val_split!r} fits into a row of {config.train.row_length} "
                "tokens, so nothing would say when training is good; raise config.train.row_length (or "
                "config.recipe.max_prompt), or choose another config.eval.val_split"
            )
        rows = pack_sequences(
            [soft_prompt.put(e.tokens, e.image_end) for e in encoded],
            np.array([soft_prompt.count + e.prompt_length for e in encoded]), [""] * len(encoded), config.train.row_length,
            tokenizer.pad_token_id, 0, runtime.student.config.prefix_lm, images,
        )  # fmt: skip
        self._batches = _batches(rows, config.train.batch_rows)
        self._loss = _shared_loss(FrozenConfigDict(config.adapter), runtime.decoder, runtime.mesh)
        self._answers = LikelihoodAnswerer(config, runtime, images) if fmt.answer_first else None

    def __call__(self, adapter: Any, base: Any) -> dict[str, float]:
        """{"val_loss": nats per target token, "val_accuracy": percent (only where the answer comes first)}."""
        total = targets = 0.0
        for batch in self._batches:
            total += float(self._loss(adapter, base, place_rows(batch, self._mesh, len(batch.tokens))))
            targets += float(batch.target_mask.sum())
        metrics = {"val_loss": total / targets}
        if self._answers is not None:
            predictions = self._answers(adapter, base, self._problems)
            correct = sum(prediction.answer == self._problems[prediction.index].answer for prediction in predictions)
            metrics["val_accuracy"] = 100 * correct / len(self._problems)
        return metrics


@functools.lru_cache(maxsize=4)
def _shared_loss(adapter_config, decoder: StudentModel, mesh: Mesh):
    """The compiled sum of a batch's losses, of all runs with equal settings."""

    def loss(adapter: Any, base: Any, batch: Batch) -> jax.Array:
        return row_losses(adapter_config, decoder, adapter, base, batch, None).sum()

    return jax.jit(loss, out_shardings=replicated(mesh))


def _batches(rows: PackedRows, batch_rows: int) -> list[Batch]:
    """One epoch in batches of one shape; the last is padded with rows that have no target."""
    count = rows.rows_of_epoch(0)
    packed = [rows[k] for k in range(count)]
    packed += [empty_like(packed[0])] * (-count % batch_rows)
    return [stack_rows(packed[start : start + batch_rows]) for start in range(0, len(packed), batch_rows)]
