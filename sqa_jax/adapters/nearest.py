"""Interpretation of a trained soft prompt: the vocabulary tokens with the nearest embeddings.

Lester et al. 2021, arXiv:2104.08691, section 7: nearest by cosine similarity among the rows of the embedding table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sqa_jax.files import write_json
from sqa_jax.parallel.mesh import replicated
from sqa_jax.parallel.processes import is_main


def nearest(
    prompt: Float[Array, "P D"], table: Float[Array, "V D"], count: int
) -> tuple[Int[Array, "P count"], Float[Array, "P count"]]:
    """The rows of an embedding table nearest to each soft prompt token.

    Returns:
      Their indices, nearest first, and their cosine similarities.
    """
    directions = prompt / jnp.linalg.norm(prompt, axis=1, keepdims=True)
    norms = jnp.linalg.norm(table.astype(jnp.float32), axis=1)
    cosines = jnp.einsum("pd,vd->pv", directions, table.astype(jnp.float32), precision="highest")
    cosines, rows = jax.lax.top_k(cosines / jnp.maximum(norms, 1e-30), count)
    return rows, cosines


def report_nearest_tokens(
    file: Path, prompt: jax.Array, table: jax.Array, tokenizer: Any, mesh: Mesh, count: int = 5
) -> None:
    """Writes and prints the `count` tokens nearest to each soft prompt token, as [[{token, text, cosine}, …], …].

    All processes compute, the first one writes.
    """
    known = min(len(tokenizer), len(table))  # further rows of the table are padding
    run = jax.jit(lambda prompt, table: nearest(prompt, table[:known], count), out_shardings=replicated(mesh))
    rows, cosines = map(np.asarray, run(prompt, table))
    if not is_main():
        return
    report = [
        [
            {"token": int(row), "text": tokenizer.decode([int(row)]), "cosine": round(float(cosine), 4)}
            for row, cosine in zip(*pair, strict=True)
        ]
        for pair in zip(rows, cosines, strict=True)
    ]
    write_json(file, report)
    print("the trained soft prompt's nearest tokens:")
    for number, tokens in enumerate(report, start=1):
        print(f"{number:5}  " + "  ".join(f"{token['text']!r} {token['cosine']:.2f}" for token in tokens))
