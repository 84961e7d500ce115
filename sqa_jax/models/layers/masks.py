"""Attention masks: packed segments, branches, prefix LM, sliding windows; and how a KV cache's slots enter them.

Shapes: B rows, T tokens of a row, S keys. With a cache, A rows of it receive up to W tokens each, so that queries
are [A, W]; without one, A = B and W = T.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sqa_jax.models.layers.kv_cache import Cache, PackedToCacheMap
from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING, PREFIX_LM


def attention_mask(
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    query_slots: Int[Array, "B T"],
    key_slots: Int[Array, "B S"],
    query_branches: Int[Array, "B T"] | None = None,
    key_branches: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """Causal attention within a segment (bidirectional within a prefix LM's prompt), and not across branches.

    A row may hold several sequences (packing); each is a segment 1, 2, … A segment may fork: tokens of branch 0 are its
    trunk, which every branch attends to, while branches do not attend to each other. Scoring all the options of a
    question after one prefill of its prompt uses this. Tokens of branch `PREFIX_LM` are trunk, too.

    Args:
      query_segments: segment of each query, `PADDING` for none.
      key_segments: segment of each key; every query attends to `GLOBAL_SEGMENT`.
      query_slots: slot of each query in the row (with a cache: in the cache).
      key_slots: slot of each key; that of a `GLOBAL_SEGMENT` key precedes all queries.
      query_branches, key_branches: branch of each, both or neither.

    Returns:
      Whether each query attends to each key.
    """
    query, key = query_segments[:, :, None], key_segments[:, None, :]
    same_segment = ((key == query) | (key == GLOBAL_SEGMENT)) & (query != PADDING)
    causal = key_slots[:, None, :] <= query_slots[:, :, None]
    if query_branches is None or key_branches is None:
        return same_segment & causal
    query_branches, key_branches = query_branches[:, :, None], key_branches[:, None, :]
    trunk = (key_branches <= 0) | (key_branches == query_branches)
    return same_segment & (causal & trunk | prefix_lm_mask(query_branches, key_branches))


def prefix_lm_mask(query_branches: Int[Array, "..."], key_branches: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether query and key are both of a prefix LM's prompt, where attention is bidirectional; shapes broadcast."""
    return (query_branches == PREFIX_LM) & (key_branches == PREFIX_LM)


def sliding_window_mask(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int
) -> Bool[Array, "B T S"]:
    """Sliding-window attention: keys at most `window` - 1 positions before the query; to be joined with `attention_mask`.

    Args:
      query_positions, key_positions: within the same sequence.
    """
    return query_positions[:, :, None] - key_positions[:, None, :] < window


class AttentionLayout(NamedTuple):
    """Where queries and keys are, as attention masks need it.

    Attributes:
      rows: [A] rows of the cache that receive tokens; without a cache, all.
      segments, slots, branches: [A, W] of the queries; branches None where nothing forks.
      key_segments, key_branches: [A, S] of the keys.
      cache_segments: [B, S] of the whole cache with the new tokens; None without a cache.
    """

    rows: jax.Array
    segments: jax.Array
    slots: jax.Array
    branches: jax.Array | None
    key_segments: jax.Array
    key_branches: jax.Array | None
    cache_segments: jax.Array | None

    @property
    def key_slots(self) -> Int[Array, "A S"]:
        return jnp.broadcast_to(jnp.arange(self.key_segments.shape[1]), self.key_segments.shape)

    def mask(self) -> Bool[Array, "A W S"]:
        """The mask of full attention."""
        return attention_mask(
            self.segments, self.key_segments, self.slots, self.key_slots, self.branches, self.key_branches
        )

    def window_mask(
        self, query_positions: Int[Array, "A W"], key_positions: Int[Array, "A S"], window: int, num_slots: int
    ) -> Bool[Array, "A W num_slots"]:
        """The mask of a sliding window over the first `num_slots` keys, which bounds no prefix LM's prompt."""
        close = sliding_window_mask(query_positions, key_positions[:, :num_slots], window)
        if self.branches is not None and self.key_branches is not None:
            close |= prefix_lm_mask(self.branches[:, :, None], self.key_branches[:, None, :num_slots])
        return close


def row_layout(segments: Int[Array, "B T"], branches: Int[Array, "B T"] | None, prefix_length: int) -> AttentionLayout:
    """Layout of whole rows, after the keys of a trained prefix of `prefix_length` slots."""
    (B, T), P = segments.shape, prefix_length
    slots = jnp.broadcast_to(jnp.arange(P, P + T), (B, T))
    key_segments = jnp.pad(segments, ((0, 0), (P, 0)), constant_values=GLOBAL_SEGMENT)
    key_branches = None if branches is None else jnp.pad(branches, ((0, 0), (P, 0)))
    return AttentionLayout(jnp.arange(B), segments, slots, branches, key_segments, key_branches, None)


def cache_layout(
    cache: Cache,
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None,
    cache_map: PackedToCacheMap | None,
) -> AttentionLayout:
    """Layout of new tokens in the next free slots of a cache.

    Args:
      cache_map: how packed tokens [B, T] are distributed over rows of the cache; None where each row gets its own.
    """
    rows = jnp.arange(segments.shape[0])
    if cache_map is not None:
        rows, segments = cache_map.rows, cache_map.to_cache_rows(segments)
        branches = None if branches is None else cache_map.to_cache_rows(branches)
    slots = cache.length.at[rows].get(mode="clip")[:, None] + jnp.arange(segments.shape[1])
    cache_segments, key_segments = _write_slots(cache.segments, segments, rows, slots, cache_map)
    key_branches = None
    if branches is not None:  # tokens that are in the cache already are trunk
        _, key_branches = _write_slots(jnp.zeros_like(cache.segments), branches, rows, slots, cache_map)
    return AttentionLayout(rows, segments, slots, branches, key_segments, key_branches, cache_segments)


def row_window_positions(
    layout: AttentionLayout, positions: Int[Array, "B T"], prefix_length: int
) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Positions of queries and keys for a sliding window over whole rows; those of branches continue their trunk's."""
    query_positions = prefix_length + positions
    return query_positions, jnp.concatenate([layout.key_slots[:, :prefix_length], query_positions], axis=1)


def cache_window_positions(
    layout: AttentionLayout, positions: Int[Array, "B T"], cache: Cache, cache_map: PackedToCacheMap | None
) -> tuple[Int[Array, "A W"], Int[Array, "A S"]]:
    """Positions of queries and keys for a sliding window over a cache: slots, but branches continue their trunk's."""
    positions = positions if cache_map is None else cache_map.to_cache_rows(positions)
    first = jnp.argmax(layout.segments != PADDING, axis=1)[:, None]
    query_positions = positions + jnp.take_along_axis(layout.slots - positions, first, axis=1)
    slots = jnp.broadcast_to(jnp.arange(cache.segments.shape[1]), cache.segments.shape)
    return query_positions, _write_slots(slots, query_positions, layout.rows, layout.slots, cache_map)[1]


def _write_slots(
    known: Int[Array, "B S"],
    new: Int[Array, "A W"],
    rows: Int[Array, " A"],
    slots: Int[Array, "A W"],
    cache_map: PackedToCacheMap | None,
) -> tuple[Int[Array, "B S"], Int[Array, "A S"]]:
    """A number per slot of the cache with those of new tokens: of all rows, and of the rows that receive tokens."""
    known = known.at[rows[:, None], slots].set(new, mode="drop")
    return known, known if cache_map is None else known.at[rows].get(mode="clip")
