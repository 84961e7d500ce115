"""What a student computes with besides its weights: what adapters add, and the keys and values of what it has read.

Shapes in comments: B rows, T new tokens, S key slots, D hidden, K key/value heads, d head width, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sqa_jax.students.attention import EVERYWHERE, PADDING
from sqa_jax.students.config import StudentConfig


class Adaptation(NamedTuple):
    """What adapters add to a decoder, in the form in which the forward pass uses it.

    Attributes:
      lora: {layer name: {"a": [L, in, r], "b": [L, r, out]}}, with the scale already in `b`.
      prefix: {"key": [L, P, K·d], "value": [L, P, K·d]}, keys as after the rotation.
      prompt: [P, D], embeddings of the first P positions of every sequence.
    """

    lora: dict[str, Any] | None = None
    prefix: dict[str, jax.Array] | None = None
    prompt: jax.Array | None = None

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix["key"].shape[1]

    @property
    def prompt_length(self) -> int:
        return 0 if self.prompt is None else self.prompt.shape[0]


NO_ADAPTATION = Adaptation()


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
      key, value: [L, B, K, S, d], as attention's products want them.
      segments: [B, S], as in `visibility`; slots not yet written are `PADDING`.
      length: [B], slots in use: where the row's next token goes.
    """

    key: jax.Array
    value: jax.Array
    segments: jax.Array
    length: jax.Array


class Grid(NamedTuple):
    """How packed tokens lie in the rows of a cache, so that only attention works row by row.

    Attributes:
      rows: [A] rows of the cache that read something; the cache's number of rows for none.
      places: [A, W] which of the N packed tokens are read, in order; N for none.
      back: [N] where in `places`, flat, each token is; A·W for none.
    """

    rows: jax.Array
    places: jax.Array
    back: jax.Array

    def spread(self, x: jax.Array) -> jax.Array:
        """[B, T, …] of packed tokens → [A, W, …]."""
        return x.reshape(-1, *x.shape[2:]).at[self.places].get(mode="fill", fill_value=0)

    def packed(self, x: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """[A, W, …] → [B, T, …] of packed tokens, `shape` being (B, T)."""
        flat = x.reshape(-1, *x.shape[2:]).at[self.back].get(mode="fill", fill_value=0)
        return flat.reshape(*shape, *x.shape[2:])


def init_cache(config: StudentConfig, rows: int, slots: int, adaptation: Adaptation, dtype=jnp.float32) -> Cache:
    """An empty cache for `slots` tokens a row; a prefix, where there is one, lies in front of them."""
    P = adaptation.prefix_length
    shape = (config.num_layers, rows, config.num_kv_heads, P + slots, config.head_dim)
    key, value = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    segments = jnp.full((rows, P + slots), PADDING, jnp.int32)
    if adaptation.prefix is not None:
        heads = (config.num_layers, 1, P, config.num_kv_heads, config.head_dim)
        key, value = (
            empty.at[..., :P, :].set(adaptation.prefix[name].reshape(heads).swapaxes(2, 3).astype(dtype))
            for name, empty in (("key", key), ("value", value))
        )
        segments = segments.at[:, :P].set(EVERYWHERE)
    return Cache(key, value, segments, jnp.full((rows,), P, jnp.int32))


def with_prompt(x: jax.Array, positions: jax.Array, adaptation: Adaptation) -> jax.Array:
    """Embeddings [B, T, D], of which the first positions of every sequence are a soft prompt's, if there is one."""
    if adaptation.prompt is None:
        return x
    P = adaptation.prompt_length
    virtual = adaptation.prompt[jnp.minimum(positions, P - 1)].astype(x.dtype)
    return jnp.where((positions < P)[..., None], virtual, x)


def behind_prefix(prefix: dict[str, jax.Array] | None, key: jax.Array, value: jax.Array) -> list[jax.Array]:
    """One layer's keys and values [B, T, K, d] with its prefix, [P, K·d] of each, in front: [B, P + T, K, d]."""
    if prefix is None:
        return [key, value]

    def joined(front: jax.Array, own: jax.Array) -> jax.Array:
        front = front.astype(own.dtype).reshape(1, -1, *own.shape[2:])
        return jnp.concatenate([jnp.broadcast_to(front, (len(own), *front.shape[1:])), own], axis=1)

    return [joined(prefix["key"], key), joined(prefix["value"], value)]


def used_places(segments: jax.Array) -> jax.Array:
    """Of new tokens [B, T] how many each row keeps, [B]: trailing padding is not kept, the next token overwrites it."""
    return jnp.max(jnp.where(segments != PADDING, jnp.arange(1, segments.shape[1] + 1), 0), axis=1)
