"""Which module computes a student, and what is asked of one besides being called."""

from __future__ import annotations

from typing import Any

import jax

from sqa_jax.students import decoder as decoder_only
from sqa_jax.students import t5
from sqa_jax.students.cache import Adaptation
from sqa_jax.students.config import StudentConfig
from sqa_jax.students.decoder import Decoder
from sqa_jax.students.t5 import T5
from sqa_jax.students.t5_config import T5Config

Module = Decoder | T5


def module_for(config: StudentConfig) -> type[Decoder] | type[T5]:
    """The class that computes students of this configuration."""
    return T5 if isinstance(config, T5Config) else Decoder


def bounded(student: Module, most: int) -> Module:
    """The module for rows in which at most `most` tokens have another one behind them that is predicted.

    An encoder–decoder then computes its decoder for so many places a row only; see `T5.most_decoded`.
    """
    return student.clone(most_decoded=most) if isinstance(student, T5) else student


def read(
    student: Module, weights: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array, adaptation: Adaptation
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Reads packed rows, and gives what later tokens need of them.

    Args:
      weights: parameters of the student.
      tokens, positions, segments, adaptation: as `Decoder.__call__`.

    Returns:
      Normed hidden states [B, T, D]; keys and values of all layers [L, B, T, K, d], without a prefix's; and for a
      cache the segment [B, T] that each place is of, where all of its row is of segment 1.
    """
    module = t5 if isinstance(student, T5) else decoder_only
    return module.read(student, weights, tokens, positions, segments, adaptation)
