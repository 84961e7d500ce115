"""Deep visual prompts: trained vectors among the patches of every layer of a vision tower.

Jia et al. 2022, "ImageFeatures Prompt Tuning", arXiv:2203.12119, VPT-Deep, eq. 5: layer i reads [P_i; E_i] and what it makes of
P_i is dropped. Started as there (section 4.1, Xavier's uniform distribution of an embedding of patches).

Tree: {"embedding": [L, P, E]}, float32, of a tower of L layers and width E.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import StudentConfig

Tree = dict[str, Any]


def init(settings, student: StudentConfig, key: jax.Array) -> Tree:
    """New prompts: U(±√(6 / (3·p² + E))) for patches of p × p pixels.

    Raises:
      UserError: the student has no tower, or the length is not positive.
    """
    if student.vision is None:
        raise UserError(
            "config.adapter.methods: visual prompts are for students that see; this one reads text alone, which prompt "
            "or prefix is for"
        )
    if settings.length < 1:
        raise UserError(f"config.adapter.visual.length is {settings.length}; it must be 1 or more")
    layers, width, patch = student.vision.tower_shape
    bound = (6 / (3 * patch**2 + width)) ** 0.5
    return {"embedding": jax.random.uniform(key, (layers, settings.length, width), jnp.float32, -bound, bound)}
