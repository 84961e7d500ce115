"""The KV cache, trained prefixes in it, and input embeddings with soft prompts and image features.

Shapes: B rows, T new tokens, S key slots, D hidden, K key/value heads, d head width, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING


class ImageFeatures(NamedTuple):
    """Features of the images in a batch's rows.

    Token V + f of row b, V being the size of the vocabulary, stands for feature f of that row.

    Attributes:
      features: [B, F, D].
      mrope_offsets: [B, F, 4], where text and images advance positions differently (Qwen2-VL): of each feature its time,
        row and column after the position at which its image begins, and by how much it advances the text after it.
    """

    features: jax.Array
    mrope_offsets: jax.Array | None = None


class Cache(NamedTuple):
    """Keys and values of the tokens processed so far (KV cache).

    Attributes:
      key, value: [L, B, K, S, d], the layout of attention's matrix products.
      segments: [B, S], as in `sqa_jax.models.layers.masks.attention_mask`; free slots are `PADDING`.
      length: [B], slots in use: where the row's next token goes.
    """

    key: jax.Array
    value: jax.Array
    segments: jax.Array
    length: jax.Array


class PrefillOutput(NamedTuple):
    """What later tokens need of packed rows that a model has processed.

    Attributes:
      hidden: [B, T, D] normed hidden states.
      key, value: [L, B, T, K, d] of all layers, without those of a prefix.
      segments: [B, T] what `Cache.segments` gets for each slot of a row that is all of segment 1.
    """

    hidden: jax.Array
    key: jax.Array
    value: jax.Array
    segments: jax.Array


class PackedToCacheMap(NamedTuple):
    """How packed tokens are distributed over rows of a cache, so that only attention works row by row.

    Attributes:
      rows: [A] rows of the cache that receive tokens; the cache's number of rows for none.
      gather: [A, W] which of the N packed tokens each row receives, in order; N for none.
      scatter: [N] where in `gather`, flat, each token is; A·W for none.
    """

    rows: jax.Array
    gather: jax.Array
    scatter: jax.Array

    def to_cache_rows(self, x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "A W *rest"]:
        """Packed tokens by rows of the cache."""
        return x.reshape(-1, *x.shape[2:]).at[self.gather].get(mode="fill", fill_value=0)

    def to_packed(self, x: Shaped[Array, "A W *rest"], shape: tuple[int, int]) -> Shaped[Array, "B T *rest"]:
        """The inverse of `to_cache_rows`, `shape` being (B, T)."""
        flat = x.reshape(-1, *x.shape[2:]).at[self.scatter].get(mode="fill", fill_value=0)
        return flat.reshape(*shape, *x.shape[2:])


class CacheConfig(Protocol):
    """What a cache's shape depends on of a model's configuration."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


def init_cache(
    config: CacheConfig,
    rows: int,
    slots: int,
    prefix: dict[str, Float[Array, "L P Kd"]] | None = None,
    dtype: Any = jnp.float32,
) -> Cache:
    """An empty cache for `slots` tokens a row, after the keys and values of a trained prefix where there is one."""
    P = 0 if prefix is None else prefix["key"].shape[1]
    shape = (config.num_layers, rows, config.num_kv_heads, P + slots, config.head_dim)
    key, value = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    segments = jnp.full((rows, P + slots), PADDING, jnp.int32)
    if prefix is not None:
        heads = (config.num_layers, 1, P, config.num_kv_heads, config.head_dim)
        key, value = (
            empty.at[..., :P, :].set(prefix[name].reshape(heads).swapaxes(2, 3).astype(dtype))
            for name, empty in (("key", key), ("value", value))
        )
        segments = segments.at[:, :P].set(GLOBAL_SEGMENT)
    return Cache(key, value, segments, jnp.full((rows,), P, jnp.int32))


def write_kv(
    cache: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    rows: Int[Array, " A"],
    slots: Int[Array, "A W"],
    key: Float[Array, "A W K d"],
    value: Float[Array, "A W K d"],
) -> tuple[jax.Array, jax.Array]:
    """One layer's new keys and values in their slots of a cache's [L, B, K, S, d]; what is beyond the cache is dropped."""
    heads = jnp.arange(key.shape[2])[:, None]

    def written(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(old.dtype)
        return old.at[layer, rows[:, None, None], heads, slots[:, None]].set(new, mode="drop")

    return written(cache[0], key), written(cache[1], value)


def read_kv(
    cache: tuple[jax.Array, jax.Array], layer: jax.Array, rows: jax.Array | None, num_slots: int, dtype: Any
) -> tuple[Float[Array, "A S K d"], Float[Array, "A S K d"]]:
    """One layer's keys and values in the first `num_slots` slots of some rows of a cache; `rows` None is all."""

    def picked(stored: jax.Array) -> jax.Array:
        stored = jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)[:, :, :num_slots]
        stored = stored if rows is None else stored.at[rows].get(mode="clip")
        return stored.astype(dtype).swapaxes(1, 2)

    return picked(cache[0]), picked(cache[1])


def embed(
    table: nn.Embed,
    tokens: Int[Array, "B T"],
    soft_prompt: Float[Array, "P D"] | None = None,
    image_features: ImageFeatures | None = None,
    scale: float = 1.0,
) -> Float[Array, "B T D"]:
    """Input embeddings: of tokens times `scale`; soft prompts (ids -1, -2, …) and image features as they are."""
    V = table.num_embeddings
    x = table(jnp.clip(tokens, 0, V - 1))
    if scale != 1.0:
        x *= jnp.asarray(scale, x.dtype)
    if soft_prompt is not None:
        soft = soft_prompt[jnp.clip(-1 - tokens, 0, len(soft_prompt) - 1)].astype(x.dtype)
        x = jnp.where((tokens < 0)[..., None], soft, x)
    if image_features is not None:
        index = jnp.clip(tokens - V, 0, image_features.features.shape[1] - 1)
        features = jnp.take_along_axis(image_features.features, index[..., None], axis=1).astype(x.dtype)
        x = jnp.where((tokens >= V)[..., None], features, x)
    return x


def prepend_prefix_kv(
    prefix: dict[str, Float[Array, "P Kd"]] | None, key: Float[Array, "B T K d"], value: Float[Array, "B T K d"]
) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
    """One layer's keys and values after those of its trained prefix: S = P + T."""
    if prefix is None:
        return key, value

    def joined(before: jax.Array, x: jax.Array) -> jax.Array:
        before = before.astype(x.dtype).reshape(1, -1, *x.shape[2:])
        return jnp.concatenate([jnp.broadcast_to(before, (len(x), *before.shape[1:])), x], axis=1)

    return joined(prefix["key"], key), joined(prefix["value"], value)


def num_valid(segments: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many of each row's new tokens stay in a cache: not trailing padding, which the next token overwrites."""
    return jnp.max(jnp.where(segments != PADDING, jnp.arange(1, segments.shape[1] + 1), 0), axis=1)
