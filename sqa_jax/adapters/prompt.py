"""Prompt tuning: trained embeddings (soft prompt tokens) prepended to the input.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691: the input is
[P_e; X_e], with P_e a free [P, D] matrix. Initialised from rows of the embedding table, drawn at random or those of a
text's tokens (their section 3.2: better than random, above all for small models), from the mean of all rows, or from a
normal distribution of the table's standard deviation; in all cases larger by √D where the model multiplies its embeddings
by that (Gemma), because P_e is inserted after the multiplication. So does PEFT, whose `PromptEmbedding` starts from the
output of the embedding module, and Gemma's multiplies (peft 0.21, transformers' `GemmaTextScaledWordEmbedding`).

A T5 has it before the encoder's input, as in PEFT, whose file has as many rows more for the decoder, which PEFT does
not use.

Tree: {"embedding": [P, D]}, float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sqa_jax.errors import UserError
from sqa_jax.models.student_config import StudentConfig

INITS = ("vocabulary", "mean", "normal", "text")


def init(
    settings: Any,
    student: StudentConfig,
    table: Float[Array, "V D"],
    key: jax.Array,
    text_tokens: Sequence[int] = (),
) -> dict[str, Float[Array, "P D"]]:
    """A new soft prompt, equal to the layers' input for vocabulary tokens: Gemma's embeddings are scaled by √D.

    Args:
      settings: `config.adapter.prompt`.
      table: the student's embedding table.
      text_tokens: ids of `config.adapter.prompt.text`, repeated or cut to the length as PEFT's `prompt_tuning_init_text`.

    Raises:
      UserError: the length is not positive, `init` is not a known initialisation, or there is no text for it.
    """
    P, (V, D) = settings.length, table.shape
    if P < 1:
        raise UserError(f"config.adapter.prompt.length is {P}; it must be 1 or more")
    if settings.init not in INITS:
        raise UserError(f"config.adapter.prompt.init is {settings.init!r}; choose one of {', '.join(INITS)}")
    if settings.init == "text" and not text_tokens:
        raise UserError("config.adapter.prompt.init is text, but config.adapter.prompt.text is empty; write it there")
    if settings.init == "normal":
        embedding = jax.random.normal(key, (P, D)) * jnp.std(table.astype(jnp.float32))
    elif settings.init == "mean":
        embedding = jnp.broadcast_to(table.mean(axis=0, dtype=jnp.float32), (P, D))
    elif settings.init == "text":
        embedding = table[jnp.resize(jnp.asarray(text_tokens), P)]
    else:
        # The first rows of a BPE vocabulary are special tokens and single bytes; words come later.
        embedding = table[jax.random.randint(key, (P,), min(512, V // 2), V)]
    scale = D**0.5 if student.embedding_scale else 1.0
    return {"embedding": embedding.astype(jnp.float32) * scale}
