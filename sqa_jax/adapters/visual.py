"""Deep visual prompts: trained vectors among the patches in every layer of a vision encoder.

Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119, VPT-Deep, eq. 5: the input of layer i is [P_i; E_i], and its
outputs at P_i are dropped. Initialised as there (section 4.1, Xavier's uniform distribution of a patch embedding).

Tree: {"embedding": [L, P, E]}, float32, for a vision encoder of L layers and width E.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sqa_jax.errors import UserError
from sqa_jax.models.student_config import StudentConfig


def init(settings: Any, student: StudentConfig, key: jax.Array) -> dict[str, Float[Array, "L P E"]]:
    """New prompts: U(±√(6 / (3·p² + E))) for patches of p × p pixels.

    Args:
      settings: `config.adapter.visual`.

    Raises:
      UserError: the student has no vision encoder, or the length is not positive.
    """
    if student.vision is None:
        raise UserError(
            "config.adapter.methods: visual prompts are for vision-language models; this student is a text-only model, "
            "which prompt or prefix is for"
        )
    if settings.length < 1:
        raise UserError(f"config.adapter.visual.length is {settings.length}; it must be 1 or more")
    layers, width, patch = student.vision.encoder_shape
    bound = (6 / (3 * patch**2 + width)) ** 0.5
    return {"embedding": jax.random.uniform(key, (layers, settings.length, width), jnp.float32, -bound, bound)}
