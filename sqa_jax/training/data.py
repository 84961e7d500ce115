"""The data of a training run: pre-tokenized dataset, packed rows, and the loader of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sqa_jax import adapters
from sqa_jax.batches.config_data import load_config_problems, training_problems
from sqa_jax.batches.dataset import DistillationDataset, build_or_reuse
from sqa_jax.batches.loader import PackedRows, make_loader, pack_dataset, training_steps
from sqa_jax.data.problem import Problem
from sqa_jax.inference.features import image_batcher
from sqa_jax.models.soft_tokens import SoftPromptTokens
from sqa_jax.parallel.mesh import local_rows
from sqa_jax.parallel.processes import main_first
from sqa_jax.runtime import Runtime


class TrainingData(NamedTuple):
    """What a run trains and validates on.

    Attributes:
      dataset: the pre-tokenized training set.
      reused: it was on disk already.
      rows: the endless stream of packed rows.
      loader: checkpointable iterator over this process's part of each step's rows.
      local_rows: indices of the rows of a micro-batch that this process loads, [N] int.
      steps: optimizer steps of the whole run.
      soft_prompt: token ids that stand for the trained soft prompt.
      validation: the validation questions.
    """

    dataset: DistillationDataset
    reused: bool
    rows: PackedRows
    loader: Any
    local_rows: np.ndarray
    steps: int
    soft_prompt: SoftPromptTokens
    validation: Sequence[Problem]


def load_data(config, runtime: Runtime) -> TrainingData:
    """Builds or reuses the training set, packs it, and positions the loader at step 0.

    Raises:
      UserError: the configuration, the data or the disk does not allow it.
    """
    student = runtime.student
    problems = load_config_problems(config)
    images = image_batcher(config, runtime, training_problems(config, problems))
    with main_first():
        dataset, reused = build_or_reuse(config, student.tokenizer, problems, images and images.images)
    soft_prompt = adapters.soft_prompt_tokens(config.adapter)
    rows = pack_dataset(dataset, config, student.tokenizer.pad_token_id, soft_prompt, student.config.prefix_lm, images)
    local = local_rows(runtime.mesh, config.train.batch_rows)
    loader = make_loader(rows, config.train.batch_rows, config.train.accumulate, local)
    validation = problems.split(config.eval.val_split)[: config.eval.val_limit or None]
    return TrainingData(dataset, reused, rows, loader, local, training_steps(config, rows), soft_prompt, validation)
