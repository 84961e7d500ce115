"""Statistics of one training epoch: tokens, sequence lengths, targets, image features, and the shape of packed rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sqa_jax import adapters
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.packing import Limits, capacity_for, choose_limits
from sqa_jax.data.images import ImageStore
from sqa_jax.errors import UserError
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.vision.registry import VisionConfig, vision_family

# ScienceQA's 12,726 training questions in the format of configs/study.py (QCM-AE), in SmolLM2's tokens: 146 tokens a
# question, half of them targets, measured on 540 questions.
_SCIENCEQA_QUESTIONS, _MEAN_LENGTH, _TARGET_SHARE = 12_726, 146, 0.5
_IMAGE_SHARE, _IMAGE_SIZE = 0.49, (500, 350)  # fraction of questions with an image, and the pixels of a typical one


class EpochStats(NamedTuple):
    """Statistics of one epoch.

    Attributes:
      tokens: without padding.
      mean_length: tokens of a sequence.
      target_share: fraction of the tokens that are targets.
      limits: shape of a packed row.
      source: where these numbers come from.
      image_token_share: fraction of the tokens that are image tokens.
      features_per_image: on average.
    """

    tokens: float
    mean_length: float
    target_share: float
    limits: Limits
    source: str
    image_token_share: float = 0.0
    features_per_image: float = 0.0


def epoch_stats(config: Any, student: StudentConfig) -> EpochStats:
    """The epoch of a configuration: of its dataset, which is built if missing, as training does.

    With a random student or `config.plan.tokens`, sequences are those of ScienceQA's training questions on average.

    Raises:
      UserError: the data cannot be read; `config.plan.tokens` does without them.
    """
    if config.plan.tokens or config.student.path.startswith("random:"):
        return _typical_epoch(config, student)
    from sqa_jax.batches.config_data import config_images, load_config_problems, training_problems
    from sqa_jax.batches.dataset import build_or_reuse
    from sqa_jax.batches.loader import pack_dataset
    from sqa_jax.checkpoints.tokenizer import load_tokenizer

    tokenizer, problems = load_tokenizer(config.student.path, config.student.revision), load_config_problems(config)
    images = config_images(config, student, training_problems(config, problems))
    dataset, _ = build_or_reuse(config, tokenizer, problems, images)
    batcher = ImageBatcher(images) if images is not None else None
    soft_prompt = adapters.soft_prompt_tokens(config.adapter)
    rows = pack_dataset(dataset, config, tokenizer.pad_token_id, soft_prompt, student.prefix_lm, batcher)
    tokens, prompt_tokens = sum(map(len, rows.tokens)), int(np.sum(rows.prompt_lengths))
    stats = EpochStats(tokens, tokens / len(rows.tokens), 1 - prompt_tokens / tokens, rows.limits, str(dataset.path))
    if images is None or batcher is None:
        return stats
    features = sum(map(batcher.count_features, rows.tokens))
    return stats._replace(
        image_token_share=features / tokens,
        features_per_image=float(images.feature_offsets[-1]) / max(1, len(images.sizes)),
    )


def _typical_epoch(config: Any, student: StudentConfig) -> EpochStats:
    """An epoch of `config.plan.tokens`, or of as many sequences as ScienceQA has training questions."""
    row_length = config.train.row_length
    image = _typical_image_features(student)
    mean = _MEAN_LENGTH + _IMAGE_SHARE * image
    targets, image_token_share = _TARGET_SHARE * _MEAN_LENGTH, _IMAGE_SHARE * image / mean
    length = np.array([min(math.ceil(mean) + adapters.soft_prompt_tokens(config.adapter).count, row_length)])
    limits = choose_limits(length, np.array([min(math.ceil(targets), row_length)]), row_length, [""])
    limits = limits._replace(prefix_lm=student.prefix_lm)
    if image and student.vision is not None:
        if image > row_length:
            raise UserError(
                f"a typical image takes {image} tokens, more than config.train.row_length = {row_length}; raise it, or lower "
                "config.student.max_image_tokens"
            )
        image_tokens = np.array([math.ceil(image_token_share * length[0])])
        capacity = max(image, capacity_for(length, image_tokens, row_length))
        limits = limits._replace(
            features=empty_image_batcher(student.vision, student.vocab_size).padded_capacity(capacity)
        )
    tokens = config.plan.tokens or _SCIENCEQA_QUESTIONS * mean
    source = "config.plan.tokens" if config.plan.tokens else "about ScienceQA's training questions"
    return EpochStats(tokens, mean, targets / mean, limits, source, image_token_share, image)


def _typical_image_features(student: StudentConfig) -> int:
    """Features of a typical image; 0 for a text-only student."""
    if student.vision is None:
        return 0
    image = vision_family(student.vision).preprocess_image(student.vision, Image.new("RGB", _IMAGE_SIZE))
    return len(image.pieces) * student.vision.features_per_piece


def empty_image_batcher(vision: VisionConfig, vocab_size: int, features: np.ndarray | None = None) -> ImageBatcher:
    """Batches rows that have room for images, but none in them."""
    store = ImageStore(vision, vocab_size, "", np.zeros(0, np.uint8), np.zeros((0, 3), int), {}, {})
    return ImageBatcher(store, features)
