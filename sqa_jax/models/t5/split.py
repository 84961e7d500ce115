"""Packed rows parted between T5's encoder and decoder.

A sequence is the encoder's up to its first start token (`<pad>`), and from there on the decoder's:

    tokens      p0 p1 </s> <pad> t0 t1 | q0 </s> <pad> u0 u1 u2
    computed by  e  e   e    d   d  d     e   e    d   d  d  d

Shapes in comments: B rows, T tokens of a row, M places that the decoder computes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sqa_jax.models.segments import PADDING


class Split(NamedTuple):
    """Which tokens of packed rows the decoder computes, and where.

    Attributes:
      decoded: [B, T] whether a token is the decoder's.
      numbers: [B, T] of each of its tokens the place in its sequence: 0 for the start token.
      places: [B, M] which token of the row each place of the decoder computes; T for none.
      back: [B, T] at which place each token is; M for none.
    """

    decoded: jax.Array
    numbers: jax.Array
    places: jax.Array
    back: jax.Array

    def gathered(self, x: jax.Array) -> jax.Array:
        """[B, T, …] → [B, M, …], zeros where there is no token."""
        return _picked(x, self.places)

    def spread(self, x: jax.Array) -> jax.Array:
        """[B, M, …] → [B, T, …], zeros where no place computes the token."""
        return _picked(x, self.back)


@jax.vmap
def _picked(x: jax.Array, indices: jax.Array) -> jax.Array:
    return x.at[indices].get(mode="fill", fill_value=0)


def split(tokens: jax.Array, positions: jax.Array, segments: jax.Array, start: int, most: int | None) -> Split:
    """Parts rows between encoder and decoder.

    Args:
      tokens, positions, segments: [B, T].
      start: the decoder's start token. Its first one in a sequence counts, later ones are as any other token.
      most: M; None is T. Where a row has more of the decoder's tokens, the last ones of sequences are left out, whose
        states no other token sees.
    """
    B, T = tokens.shape
    M = T if most is None else min(most, T)
    column = jnp.broadcast_to(jnp.arange(T), (B, T))

    def latest(where):  # the last such column at or before each, -1 for none, and whether it is of the same sequence
        found = jax.lax.cummax(jnp.where(where, column, -1), axis=1)
        owner = jnp.take_along_axis(segments, jnp.maximum(found, 0), axis=1)
        return found, (found >= 0) & (owner == segments) & (segments != PADDING)

    goes_on = segments[:, 1:] == segments[:, :-1]
    _, decoded = latest(tokens == start)
    opening, _ = latest(decoded & ~jnp.pad(goes_on & decoded[:, :-1], ((0, 0), (1, 0))))
    numbers = positions - jnp.take_along_axis(positions, jnp.maximum(opening, 0), axis=1)

    ends = ~jnp.pad(goes_on, ((0, 0), (0, 1)))
    first, second = decoded & ~ends, decoded & ends
    seconds = first.sum(axis=1, keepdims=True) + jnp.cumsum(second, axis=1)
    place = jnp.where(first, jnp.cumsum(first, axis=1), seconds) - 1
    back = jnp.where(decoded & (place < M), place, M)
    places = jax.vmap(lambda b, c: jnp.full(M, T, jnp.int32).at[b].set(c, mode="drop"))(back, column)
    return Split(decoded, jnp.where(decoded, numbers, 0), places, back)
