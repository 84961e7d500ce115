"""Which module computes a student, and what is asked of one besides being called."""

from __future__ import annotations

from typing import Any

import jax

from sqa_jax.models import decoder as decoder_only
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.layers.kv_cache import Adaptation, ImageFeatures
from sqa_jax.models.t5 import model as t5
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.t5.model import T5
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig
from sqa_jax.models.vision.encode import encode_images
from sqa_jax.models.vision.image_input import ImageInputs

Module = Decoder | T5


def module_for(config: StudentConfig) -> type[Decoder] | type[T5]:
    """The class that computes students of this configuration."""
    return T5 if isinstance(config, T5Config) else Decoder


def with_max_decoder_tokens(student: Module, most: int) -> Module:
    """The module for rows in which at most `most` tokens have another one behind them that is predicted.

    An encoder–decoder then computes its decoder for so many places a row only; see `T5.max_decoder_tokens`.
    """
    return student.clone(max_decoder_tokens=most) if isinstance(student, T5) else student


def extra_model_inputs(
    student: Module,
    weights: Any,
    adaptation: Adaptation,
    branches: jax.Array | None = None,
    images: ImageInputs | None = None,
    dropout: jax.Array | None = None,
) -> dict[str, Any]:
    """What besides tokens a student reads of a batch's rows, as arguments of its module and of `prefill`.

    Args:
      branches: [B, T], where the rows fork or their prompts are attended to bidirectionally (prefix LM).
      images: of the rows, where they may hold images.
      dropout: a key, or None where nothing is dropped.
    """
    more = {} if branches is None else {"branches": branches}
    if images is None:
        return more
    if (features := images.features) is not None:
        if adaptation.vision is not None:
            raise ValueError("these features are of the bare tower, which the adapter changes")
    else:
        how = ComputeConfig(student.dtype, student.remat, student.lora_dropout, student.rows)
        features = encode_images(
            student.config.vision,
            weights["vision"],
            images.encoder,
            how,
            adaptation.vision or NO_VISION_ADAPTER,
            dropout,
        )
    return {**more, "visual": ImageFeatures(features, images.mrope_offsets)}


def prefill(
    student: Module,
    weights: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    adaptation: Adaptation,
    **more: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Reads packed rows, and gives what later tokens need of them.

    Args:
      weights: parameters of the student.
      tokens, positions, segments, adaptation: as `Decoder.__call__`.
      more: as `extra_model_inputs` gives it.

    Returns:
      Normed hidden states [B, T, D]; keys and values of all layers [L, B, T, K, d], without a prefix's; and for a
      cache the segment [B, T] that each place is of, where all of its row is of segment 1.
    """
    module = t5 if isinstance(student, T5) else decoder_only
    return module.prefill(student, weights, tokens, positions, segments, adaptation, **more)
