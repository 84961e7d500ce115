"""What a student computes with besides its weights: what adapters add, and the keys and values of what it has read.

Shapes in comments: B rows, T new tokens, S key slots, D hidden, K key/value heads, d head width, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING
from sqa_jax.models.vision.adapter import VisionAdapter


class Adaptation(NamedTuple):
    """What adapters add to a student, in the form in which the forward pass uses it.

    Attributes:
      lora: {layer name: {"a": [L, in, r], "b": [L, r, out]}}, with the scale already in `b`.
      prefix: {"key": [L, P, K·d], "value": [L, P, K·d]}, keys as after the rotation.
      prompt: [P, D], embeddings of a soft prompt's tokens, whose ids are -1, -2, … (`sqa_jax.batches.packing.with_soft_tokens`).
      tower: what is added to the half that sees; None is nothing.
    """

    lora: dict[str, Any] | None = None
    prefix: dict[str, jax.Array] | None = None
    prompt: jax.Array | None = None
    tower: VisionAdapter | None = None

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix["key"].shape[1]

    @property
    def prompt_length(self) -> int:
        return 0 if self.prompt is None else self.prompt.shape[0]


NO_ADAPTATION = Adaptation()


class ImageFeatures(NamedTuple):
    """What a student sees of the pictures in its rows.

    Token V + f of row b, V being the size of the vocabulary, stands for feature f of that row.

    Attributes:
      features: [B, F, D].
      places: [B, F, 4], where the positions of a student's text and pictures differ (Qwen2-VL): of each feature its
        time, row and column behind the position at which its picture begins, and by how much it takes the text behind
        it further.
    """

    features: jax.Array
    places: jax.Array | None = None


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


class PackedToCacheMap(NamedTuple):
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
        segments = segments.at[:, :P].set(GLOBAL_SEGMENT)
    return Cache(key, value, segments, jnp.full((rows,), P, jnp.int32))


def embed(
    table: nn.Embed, tokens: jax.Array, adaptation: Adaptation, visual: ImageFeatures | None = None, scale: float = 1.0
) -> jax.Array:
    """Embeddings [B, T, D]: of words, times `scale`; of a soft prompt, and of pictures, as they are."""
    V = table.num_embeddings
    x = table(jnp.clip(tokens, 0, V - 1))
    if scale != 1.0:
        x *= jnp.asarray(scale, x.dtype)
    if adaptation.prompt is not None:
        virtual = adaptation.prompt[jnp.clip(-1 - tokens, 0, adaptation.prompt_length - 1)].astype(x.dtype)
        x = jnp.where((tokens < 0)[..., None], virtual, x)
    if visual is not None:
        which = jnp.clip(tokens - V, 0, visual.features.shape[1] - 1)
        seen = jnp.take_along_axis(visual.features, which[..., None], axis=1).astype(x.dtype)
        x = jnp.where((tokens >= V)[..., None], seen, x)
    return x


def prepend_prefix_kv(prefix: dict[str, jax.Array] | None, key: jax.Array, value: jax.Array) -> list[jax.Array]:
    """One layer's keys and values [B, T, K, d] with its prefix, [P, K·d] of each, in front: [B, P + T, K, d]."""
    if prefix is None:
        return [key, value]

    def joined(front: jax.Array, own: jax.Array) -> jax.Array:
        front = front.astype(own.dtype).reshape(1, -1, *own.shape[2:])
        return jnp.concatenate([jnp.broadcast_to(front, (len(own), *front.shape[1:])), own], axis=1)

    return [joined(prefix["key"], key), joined(prefix["value"], value)]


def num_valid(segments: jax.Array) -> jax.Array:
    """Of new tokens [B, T] how many each row keeps, [B]: trailing padding is not kept, the next token overwrites it."""
    return jnp.max(jnp.where(segments != PADDING, jnp.arange(1, segments.shape[1] + 1), 0), axis=1)
