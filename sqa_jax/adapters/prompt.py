"""Prompt tuning: trained embeddings in front of the input.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691: the model
reads [P_e; X_e], with P_e a free [P, D] matrix. Started from rows of the embedding table, drawn or those of a text's
words (their section 3.2: better than random, above all for small models), from the mean of all rows, or from a normal
distribution of the table's own spread; in all cases by √D larger where the model multiplies its embeddings by that
(Gemma), because P_e is put in behind this. So does PEFT, whose `PromptEmbedding` starts from what the embedding module
gives, and Gemma's multiplies (peft 0.21, transformers' `GemmaTextScaledWordEmbedding`).

A T5 has it in front of what its encoder reads, as in PEFT, whose file has as many rows more for the decoder, which
PEFT does not use.

Tree: {"embedding": [P, D]}, float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import StudentConfig

INITS = ("vocabulary", "mean", "normal", "text")
Tree = dict[str, Any]


def init(settings, student: StudentConfig, table: jax.Array, key: jax.Array, words: Sequence[int] = ()) -> Tree:
    """A new soft prompt, that begins as what the student reads of words: Gemma's are scaled by √D.

    Args:
      table: the student's embedding table [V, D].
      words: ids of `config.adapter.prompt.text`, repeated or cut to the length as PEFT's `prompt_tuning_init_text`.

    Raises:
      UserError: the length is not positive, `init` is not a known way to start, or there is no text to start from.
    """
    P, (V, D) = settings.length, table.shape
    if P < 1:
        raise UserError(f"config.adapter.prompt.length is {P}; it must be 1 or more")
    if settings.init not in INITS:
        raise UserError(f"config.adapter.prompt.init is {settings.init!r}; choose one of {', '.join(INITS)}")
    if settings.init == "text" and not words:
        raise UserError("config.adapter.prompt.init is text, but config.adapter.prompt.text is empty; write it there")
    if settings.init == "normal":
        embedding = jax.random.normal(key, (P, D)) * jnp.std(table.astype(jnp.float32))
    elif settings.init == "mean":
        embedding = jnp.broadcast_to(table.mean(axis=0, dtype=jnp.float32), (P, D))
    elif settings.init == "text":
        embedding = table[jnp.resize(jnp.asarray(words), P)]
    else:
        # The first rows of a BPE vocabulary are special tokens and single bytes; words come later.
        embedding = table[jax.random.randint(key, (P,), min(512, V // 2), V)]
    scale = D**0.5 if student.embedding_scale else 1.0
    return {"embedding": embedding.astype(jnp.float32) * scale}
