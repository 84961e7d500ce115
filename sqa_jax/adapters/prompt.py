"""Prompt tuning: trained embeddings in front of the input.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691: the model
reads [P_e; X_e], with P_e a free [P, D] matrix. Started from rows of the embedding table (their section 3.2:
better than random, above all for small models) or from a normal distribution of the table's own spread.

A T5 has it in front of what its encoder reads, as in PEFT, whose file has as many rows more for the decoder, which
PEFT does not use.

Tree: {"embedding": [P, D]}, float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sqa_jax.errors import UserError

Tree = dict[str, Any]


def init(settings, table: jax.Array, key: jax.Array) -> Tree:
    """A new soft prompt. `table` is the student's embedding table [V, D].

    Raises:
      UserError: the length is not positive or `init` is not a known way to start.
    """
    P = settings.length
    if P < 1:
        raise UserError(f"config.adapter.prompt.length is {P}; it must be 1 or more")
    if settings.init == "vocabulary":
        # The first rows of a BPE vocabulary are special tokens and single bytes; words come later.
        rows = jax.random.randint(key, (P,), min(512, table.shape[0] // 2), table.shape[0])
        embedding = table[rows]
    elif settings.init == "normal":
        embedding = jax.random.normal(key, (P, table.shape[1])) * jnp.std(table.astype(jnp.float32))
    else:
        raise UserError(f"config.adapter.prompt.init is {settings.init!r}; choose vocabulary or normal")
    return {"embedding": embedding.astype(jnp.float32)}
