"""The data that a configuration names: questions, images, teacher records, and the encoder of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sqa_jax.data.images import HasImage, ImageStore, load_images
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import ProblemSet, load_problems
from sqa_jax.data.teacher_records import TeacherRecord, load_records, make_records
from sqa_jax.errors import UserError
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.prompts.encode import Encoder, PromptImages


def load_config_problems(config) -> ProblemSet:
    """The questions that `config.data` names."""
    data = config.data
    return load_problems(data.source, data.path, data.splits, data.images)


def training_problems(config, problems: ProblemSet) -> Sequence[Problem]:
    """The training split, of `config.data.subjects`; or `train_limit` of them sampled with the seed, in split order.

    Raises:
      UserError: there is no such subject.
    """
    chosen = problems.split(config.data.train_split)
    if subjects := set(config.data.subjects):
        known = {problem.subject for problem in chosen}
        if subjects - known:
            raise UserError(
                f"config.data.subjects: {', '.join(sorted(subjects - known))} not in split {config.data.train_split!r}; "
                f"it has {', '.join(sorted(known))}"
            )
        chosen = [problem for problem in chosen if problem.subject in subjects]
    limit = config.data.train_limit
    if 0 < limit < len(chosen):
        kept = np.random.default_rng(config.seed).choice(len(chosen), limit, replace=False)
        chosen = [chosen[k] for k in sorted(kept)]
    return chosen


def config_images(config, student: StudentConfig, problems: Sequence[HasImage]) -> ImageStore | None:
    """The preprocessed images of questions, for a vision-language model; None for a text-only student."""
    if student.vision is None:
        return None
    return load_images(config.data.cache, student.vision, student.vocab_size, problems)


def encoder_for(config, tokenizer: Any, images: PromptImages | None = None) -> Encoder:
    """The encoder of a configuration: one for training and for inference."""
    recipe = config.recipe
    return Encoder(tokenizer, recipe.max_prompt, recipe.chat, recipe.caption, images=images)


def config_records(config, problems: ProblemSet) -> list[TeacherRecord]:
    """The teacher records that `config.data.teacher` names; "sample" stands for the sample's simulated teacher."""
    paths = [path for path in config.data.teacher if path != "sample"]
    records = load_records(paths, problems.all())
    if "sample" in config.data.teacher:
        from sqa_jax.data import sample

        records += make_records(sample.teacher_replies(sample.generate()), problems.all())
    return records
