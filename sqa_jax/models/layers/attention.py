"""Which tokens see which, rotary positions, and grouped-query attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sqa_jax.models.decoder_config import Rope
from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING, PREFIX_LM


def attention_mask(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_slots: jax.Array,
    key_slots: jax.Array,
    query_branches: jax.Array | None = None,
    key_branches: jax.Array | None = None,
) -> jax.Array:
    """The one rule of who sees whom: same segment, not later (but in a prompt read both ways), not in a sister branch.

    A row may hold several sequences (packing); each is a segment 1, 2, … A segment may fork: tokens of
    branch 0 are its trunk, which every branch sees, while branches do not see each other. Scoring all the
    options of a question after one reading of its prompt uses this. Tokens of branch `PREFIX_LM` are trunk, too.

    Args:
      query_segments: [B, T] segment of each query, `PADDING` for none.
      key_segments: [B, S] segment of each key; `GLOBAL_SEGMENT` is seen by all.
      query_slots: [B, T] place of each query in the row (with a cache: in the cache).
      key_slots: [B, S] place of each key; an `GLOBAL_SEGMENT` key has a place before all queries.
      query_branches, key_branches: [B, T] and [B, S] branch of each, both or neither.

    Returns:
      [B, T, S] booleans.
    """
    query, key = query_segments[:, :, None], key_segments[:, None, :]
    visible = ((key == query) | (key == GLOBAL_SEGMENT)) & (query != PADDING)
    earlier = key_slots[:, None, :] <= query_slots[:, :, None]
    if query_branches is None:
        return visible & earlier
    query_branches, key_branches = query_branches[:, :, None], key_branches[:, None, :]
    trunk = (key_branches <= 0) | (key_branches == query_branches)
    return visible & (earlier & trunk | prefix_lm_mask(query_branches, key_branches))


def prefix_lm_mask(query_branches: jax.Array, key_branches: jax.Array) -> jax.Array:
    """Whether query and key are both of a prompt that is read both ways; shapes as they broadcast."""
    return (query_branches == PREFIX_LM) & (key_branches == PREFIX_LM)


def sliding_window_mask(query_places: jax.Array, key_places: jax.Array, window: int) -> jax.Array:
    """Which keys a sliding window shows: the query's own place and `window` - 1 before it.

    Args:
      query_places, key_places: [B, T] and [B, S] positions within the same sequence.

    Returns:
      [B, T, S] booleans, to be joined with `attention_mask`.
    """
    return query_places[:, :, None] - key_places[:, None, :] < window


def rope_sin_cos(
    positions: jax.Array, head_dim: int, rope: Rope | None, sections: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines of rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 15).

    Args:
      positions: [B, T] integers; [B, T, 3] with `sections`.
      rope: None turns nothing.
      sections: how many of a head's pairs turn by time, row and column (Wang et al. 2024, arXiv:2409.12191, M-RoPE).

    Returns:
      Two float32 arrays [B, T, head_dim / 2].
    """
    frequencies = np.zeros(head_dim // 2, np.float32) if rope is None else rope.frequencies(head_dim)
    positions = positions[..., np.repeat(np.arange(3), sections)] if sections else positions[..., None]
    angles = positions.astype(jnp.float32) * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def mrope_positions(
    tokens: jax.Array, positions: jax.Array, segments: jax.Array, first: int, places: jax.Array
) -> jax.Array:
    """Positions in time, row and column where pictures stand in the text (Wang et al. 2024, arXiv:2409.12191, section 2.1).

    A picture's features are at the position where it begins, plus their row and column; the text behind it goes on
    behind the larger of its sides, however many features it has.

    Args:
      tokens, positions, segments: [B, T] as in `Decoder.__call__`. Pictures are in the trunk of a segment.
      first: tokens from this one on are features.
      places: as `cache.ImageFeatures.places`.

    Returns:
      [B, T, 3] integers.
    """
    seen = (tokens >= first)[..., None]
    which = jnp.clip(tokens - first, 0, places.shape[1] - 1)[..., None]
    own = jnp.where(seen, jnp.take_along_axis(places, which, axis=1), 0)
    # By how much the text has been taken further than one a token, before each token of the row, and of its segment.
    further = jnp.where(seen[..., 0], own[..., 3] - 1, 0)
    before = jnp.cumsum(further, axis=1) - further
    opens = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    column = jnp.arange(tokens.shape[1])
    opening = jax.lax.cummax(jnp.where(opens, column, 0), axis=1)
    before -= jnp.take_along_axis(before, opening, axis=1)
    return (positions + before)[..., None] + own[..., :3]


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + d/2}) of each head by the angles: [B, T, heads, d] → the same."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = sin[:, :, None, :], cos[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float = 0.0
) -> jax.Array:
    """Grouped-query scaled dot-product attention, softmax in float32 (Ainslie et al. 2023, arXiv:2305.13245).

    The G query heads that share a key head are laid out as rows of one matrix product, so that keys and
    values are never repeated and the products are plain batched ones, which CPUs need to be fast.

    Args:
      query: [B, T, H, d].
      key, value: [B, S, K, d] with H = G·K.
      visible: [B, T, S]; a query that sees nothing (padding) gets the mean of the values, which nobody reads.
      softcap: as `DecoderConfig.attention_softcap`.

    Returns:
      [B, T, H, d].
    """
    B, T, H, d = query.shape
    S, K = key.shape[1:3]
    G = H // K
    q = query.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    k, v = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrd,bksd->bkrs", q, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = soft_cap(scores, softcap).reshape(B, K, G, T, S)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("bkrs,bksd->bkrd", weights, v)
    return out.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


def soft_cap(x: jax.Array, softcap: float) -> jax.Array:
    """c · tanh(x / c), which lies between ±c; x itself for c = 0 (Gemma 2, arXiv:2408.00118, section 2)."""
    return softcap * jnp.tanh(x / softcap) if softcap else x
