"""What a trained soft prompt has come to mean: the words whose embeddings point where its vectors do.

Lester et al. 2021, arXiv:2104.08691, section 7: nearest by cosine among the rows of the embedding table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sqa_jax.files import write_json
from sqa_jax.parallel.mesh import replicated
from sqa_jax.parallel.processes import is_main


def nearest(prompt: jax.Array, table: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The rows of a table [V, D] nearest to each vector of a prompt [P, D].

    Returns:
      Their numbers, nearest first, and their cosines: [P, count] each.
    """
    towards = prompt / jnp.linalg.norm(prompt, axis=1, keepdims=True)
    lengths = jnp.linalg.norm(table.astype(jnp.float32), axis=1)
    cosines = jnp.einsum("pd,vd->pv", towards, table.astype(jnp.float32), precision="highest")
    cosines, rows = jax.lax.top_k(cosines / jnp.maximum(lengths, 1e-30), count)
    return rows, cosines


def report_nearest_tokens(
    file: Path, prompt: jax.Array, table: jax.Array, tokenizer: Any, mesh: Mesh, count: int = 5
) -> None:
    """Writes and prints the `count` words nearest to each of a prompt's tokens, as [[{token, text, cosine}, …], …].

    All processes compute, the first one writes.
    """
    known = min(len(tokenizer), len(table))  # rows behind are no words
    run = jax.jit(lambda prompt, table: nearest(prompt, table[:known], count), out_shardings=replicated(mesh))
    rows, cosines = map(np.asarray, run(prompt, table))
    if not is_main():
        return
    told = [
        [
            {"token": int(row), "text": tokenizer.decode([int(row)]), "cosine": round(float(cosine), 4)}
            for row, cosine in zip(*own, strict=True)
        ]
        for own in zip(rows, cosines, strict=True)
    ]
    write_json(file, told)
    print("the trained prompt's nearest words:")
    for number, words in enumerate(told, start=1):
        print(f"{number:5}  " + "  ".join(f"{word['text']!r} {word['cosine']:.2f}" for word in words))
