"""Packed rows split between T5's encoder and decoder.

A sequence is the encoder's up to its first start token (`<pad>`), and the decoder's from there on:

    tokens        p0 p1 </s> <pad> t0 t1 | q0 </s> <pad> u0 u1 u2
    processed by  e  e   e    d   d  d     e   e    d   d  d  d

Shapes: B rows, T tokens of a row, M slots that the decoder computes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from sqa_jax.models.segments import PADDING


class Split(NamedTuple):
    """Which tokens of packed rows the decoder processes, and in which of its slots.

    Attributes:
      decoded: [B, T] whether a token is the decoder's.
      numbers: [B, T] position of each of the decoder's tokens in its sequence: 0 for the start token.
      gather: [B, M] which token of the row each slot of the decoder processes; T for none.
      scatter: [B, T] slot of each token; M for none.
    """

    decoded: jax.Array
    numbers: jax.Array
    gather: jax.Array
    scatter: jax.Array

    def to_decoder(self, x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B M *rest"]:
        """Gathers the decoder's tokens into its slots; zeros where a slot has no token."""
        return _picked(x, self.gather)

    def to_rows(self, x: Shaped[Array, "B M *rest"]) -> Shaped[Array, "B T *rest"]:
        """Scatters the decoder's slots back; zeros at tokens that no slot processes."""
        return _picked(x, self.scatter)


@jax.vmap
def _picked(x: jax.Array, indices: jax.Array) -> jax.Array:
    return x.at[indices].get(mode="fill", fill_value=0)


def split(
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    start: int,
    max_decoder_tokens: int | None,
) -> Split:
    """Splits rows between encoder and decoder.

    Args:
      tokens, positions, segments: as in `T5.__call__`.
      start: the decoder's start token. Its first one in a sequence counts, later ones are like any other token.
      max_decoder_tokens: M; None is T. Where a row has more of the decoder's tokens, the last ones of sequences are left
        out, whose states no other token depends on.
    """
    B, T = tokens.shape
    M = T if max_decoder_tokens is None else min(max_decoder_tokens, T)
    column = jnp.broadcast_to(jnp.arange(T), (B, T))

    def latest(where):  # the last such column at or before each, -1 for none, and whether it is of the same sequence
        found = jax.lax.cummax(jnp.where(where, column, -1), axis=1)
        segment = jnp.take_along_axis(segments, jnp.maximum(found, 0), axis=1)
        return found, (found >= 0) & (segment == segments) & (segments != PADDING)

    continues = segments[:, 1:] == segments[:, :-1]
    _, decoded = latest(tokens == start)
    opening, _ = latest(decoded & ~jnp.pad(continues & decoded[:, :-1], ((0, 0), (1, 0))))
    numbers = positions - jnp.take_along_axis(positions, jnp.maximum(opening, 0), axis=1)

    # The last token of each sequence gets a slot after all others.
    ends = ~jnp.pad(continues, ((0, 0), (0, 1)))
    inner, last = decoded & ~ends, decoded & ends
    last_slots = inner.sum(axis=1, keepdims=True) + jnp.cumsum(last, axis=1)
    slot = jnp.where(inner, jnp.cumsum(inner, axis=1), last_slots) - 1
    scatter = jnp.where(decoded & (slot < M), slot, M)
    gather = jax.vmap(lambda slots, columns: jnp.full(M, T, jnp.int32).at[slots].set(columns, mode="drop"))(
        scatter, column
    )
    return Split(decoded, jnp.where(decoded, numbers, 0), gather, scatter)
