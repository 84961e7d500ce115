"""T5's encoder and decoder in Flax Linen, over the same packed rows that a decoder-only student reads.

A sequence of a row is `prompt </s> <pad> target`: what stands before the decoder's start token (`<pad>`) is the
encoder's, it and what follows are the decoder's. The target's first token is so predicted where a decoder-only
student predicts it, at the last token of what it was given, and packing, loss, scoring and generation are the same.

The decoder's tokens are gathered into M places of a row, so that its layers do not compute the prompts too: see
`sqa_jax.models.t5.split`.

Shapes in comments: B rows, T tokens of a row, M places of the decoder, S keys, D hidden, H heads, d head width,
L layers of the decoder, P places of a prefix, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from sqa_jax.models.layers.attention import attention_mask
from sqa_jax.models.layers.blockwise_attention import SAVED
from sqa_jax.models.layers.kv_cache import NO_ADAPTATION, Adaptation, Cache, embed, num_valid, prepend_prefix_kv
from sqa_jax.models.layers.linear import Linear, RMSNorm, constrain_batch_sharding, scan_layers
from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.t5.split import Split, split

ENCODED = -2  # segment, in a cache, of places that hold the encoder's keys and values: only cross-attention sees them


@functools.cache
def distance_buckets(bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of the relative positions -max_distance, …, max_distance (key minus query), farther ones being like the last.

    Near distances have a bucket each, farther ones share logarithmically wider ones (Raffel et al. 2020, section 2.1,
    with the rounding of the reference implementation, float32). Of a causal stack, all later keys are bucket 0.
    """
    relative = np.arange(-max_distance, max_distance + 1)
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets * (relative > 0)
        distance = np.abs(relative)
    else:
        distance = np.maximum(-relative, 0)
    near = buckets // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(near))
    scale = np.float32(np.log(max_distance / near))
    far = near + (ratio / scale * np.float32(buckets - near)).astype(np.int32)
    return offset + np.where(distance < near, distance, np.minimum(far, buckets - 1))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, visible: jax.Array) -> jax.Array:
    """Attention without scaling, with a bias of the scores; softmax in float32.

    Args:
      query: [B, T, H, d].
      key, value: [B, S, H, d].
      bias: [B or 1, H, T, S] float32, or None.
      visible: [B, T, S]; a query that sees nothing (padding) gets the mean of the values, which nobody reads.

    Returns:
      [B, T, H, d].
    """
    q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bhts,bhsd->bhtd", weights, v).swapaxes(1, 2), SAVED)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are computed apart, as they may come from elsewhere."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    def setup(self):
        inner = self.config.num_heads * self.config.head_dim
        self.q, self.k, self.v = (Linear(inner, False, self.dtype, self.lora_dropout) for _ in range(3))
        self.o = Linear(self.config.hidden_size, False, self.dtype, self.lora_dropout)

    def keys_and_values(self, x: jax.Array, lora: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] → two of [B, S, H, d]."""
        return self._heads(self.k(x, lora.get("k"))), self._heads(self.v(x, lora.get("v")))

    def __call__(self, x, key, value, bias, visible, lora: dict[str, Any]) -> jax.Array:
        out = attend(self._heads(self.q(x, lora.get("q"))), key, value, bias, visible)
        return self.o(out.reshape(*x.shape[:2], -1), lora.get("o"))

    def _heads(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)


class MLP(nn.Module):
    """wo(gelu(wi_0(x)) · wi_1(x)) (Shazeer 2020, arXiv:2002.05202, GEGLU), or wo(relu(wi(x)))."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, lora: dict[str, Any]) -> jax.Array:
        c = self.config

        def linear(name, features, y):
            return Linear(features, False, self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        if c.gated:
            y = nn.gelu(linear("wi_0", c.intermediate_size, x)) * linear("wi_1", c.intermediate_size, x)
        else:
            y = nn.relu(linear("wi", c.intermediate_size, x))
        return linear("wo", c.hidden_size, y)


class EncoderBlock(nn.Module):
    """One layer of the encoder, in the form that `nn.scan` wants: (carry, this layer's inputs, what all layers share)."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x, lora, shared):
        c, own = self.config, lora.get("self_attn", {})
        attention = Attention(c, self.dtype, self.lora_dropout, name="self_attn")
        y = RMSNorm(c.norm_epsilon, name="self_attn_layernorm")(x)
        x += attention(y, *attention.keys_and_values(y, own), *shared, own)
        y = RMSNorm(c.norm_epsilon, name="mlp_layernorm")(x)
        return x + MLP(c, self.dtype, self.lora_dropout, name="mlp")(y, lora.get("mlp", {})), None


class DecoderContext(NamedTuple):
    """What all layers of the decoder share.

    Attributes:
      encoded: [B, T, D] the encoder's output; None where its keys and values are in the cache.
      bias: [B, H, M, S] of self-attention.
      own, cross: [B, M, S] and [B, M, T], what self- and cross-attention see.
      slots: [B, M] where new keys and values go in the cache.
    """

    encoded: jax.Array | None
    bias: jax.Array
    own: jax.Array
    cross: jax.Array
    slots: jax.Array | None


class DecoderBlock(nn.Module):
    """One layer of the decoder, as `EncoderBlock`."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, carry, inputs, sight: DecoderContext):
        (x, cache), (layer, lora, prefix) = carry, inputs
        c = self.config
        B = len(x)
        own, other = lora.get("self_attn", {}), lora.get("cross_attn", {})
        attention = Attention(c, self.dtype, self.lora_dropout, name="self_attn")
        cross = Attention(c, self.dtype, self.lora_dropout, name="cross_attn")
        y = RMSNorm(c.norm_epsilon, name="self_attn_layernorm")(x)
        key, value = attention.keys_and_values(y, own)
        if cache is None:
            encoded = cross.keys_and_values(sight.encoded, other)
            self.sow("read", "of_decoder", (key, value))
            self.sow("read", "of_encoder", encoded)
            key, value = prepend_prefix_kv(prefix, key, value)
        else:
            rows, heads = jnp.arange(B)[:, None, None], jnp.arange(c.num_heads)[:, None]
            cache = tuple(
                old.at[layer, rows, heads, sight.slots[:, None]].set(new.swapaxes(1, 2).astype(old.dtype), mode="drop")
                for old, new in zip(cache, (key, value), strict=True)
            )
            # In each place of the cache lies either what the encoder made or what the decoder did.
            key, value = encoded = [
                jax.lax.dynamic_index_in_dim(own, layer, keepdims=False).astype(self.dtype).swapaxes(1, 2)
                for own in cache
            ]
        x += attention(y, key, value, sight.bias, sight.own, own)
        y = RMSNorm(c.norm_epsilon, name="cross_attn_layernorm")(x)
        x += cross(y, *encoded, None, sight.cross, other)
        y = RMSNorm(c.norm_epsilon, name="mlp_layernorm")(x)
        x += MLP(c, self.dtype, self.lora_dropout, name="mlp")(y, lora.get("mlp", {}))
        return (x, cache), None


class Stack(nn.Module):
    """The layers of the encoder or of the decoder, their common position bias, and the last norm."""

    block: type[nn.Module]
    depth: int
    config: T5Config
    dtype: Any
    remat: str
    lora_dropout: float

    def setup(self):
        c = self.config
        self.relative_attention_bias = nn.Embed(c.num_buckets, c.num_heads)
        self.layers = scan_layers(self.block, self.depth, self.remat)(c, self.dtype, self.lora_dropout)
        self.norm = RMSNorm(c.norm_epsilon)

    def bias(self, relative: jax.Array, bidirectional: bool) -> jax.Array:
        """Of relative positions [B, T, S], key minus query, what is added to each head's scores: [B, H, T, S]."""
        c = self.config
        buckets = jnp.asarray(distance_buckets(bidirectional, c.num_buckets, c.max_distance))
        by_distance = self.relative_attention_bias(buckets)
        index = jnp.clip(relative, -c.max_distance, c.max_distance) + c.max_distance
        return jnp.moveaxis(by_distance[index], -1, 1)

    def __call__(self, carry, inputs, shared):
        return self.layers(carry, inputs, shared)[0]


class T5(nn.Module):
    """T5 encoder–decoder (Raffel et al. 2020, arXiv:1910.10683), called as a `Decoder` is.

    Dropout of the published models is left out; LoRA's is as in `Decoder`.

    Attributes:
      config: shape and options.
      dtype: of the computation; parameters may be of another.
      remat: a key of `REMAT_POLICIES`.
      lora_dropout: rate at which LoRA's input is dropped where a "dropout" generator is given.
      data_shards, rows: as of `Decoder`.
      max_decoder_tokens: places of a row that the decoder computes, see `split`; None is all of them.
    """

    config: T5Config
    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0
    data_shards: int = 1
    rows: NamedSharding | None = None
    max_decoder_tokens: int | None = None

    def setup(self):
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        options = (c, self.dtype, self.remat, self.lora_dropout)
        self.encoder = Stack(EncoderBlock, c.num_encoder_layers, *options)
        self.decoder = Stack(DecoderBlock, c.num_layers, *options)
        if not c.tie_embeddings:
            self.lm_head = Linear(c.vocab_size, False, self.dtype, 0.0)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        adaptation: Adaptation = NO_ADAPTATION,
        cache: Cache | None = None,
        branches: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Reads tokens; `unembed` turns what it returns into logits, where they are wanted.

        Args:
          tokens: [B, T] ids; a sequence is the decoder's from its first start token on. Those of a soft prompt, -1,
            -2, …, are in what the encoder reads.
          positions: [B, T], 0-based within each sequence. Those of what the encoder reads follow one another, as the
            tokens do.
          segments: [B, T], 1, 2, … for the sequences of a row, 0 for padding on either side.
          adaptation: what the adapters add. A prefix lies in front of the decoder's own keys and values; the decoder's
            positions start behind it.
          cache: what the rows have read before, see `prefill`; the new tokens, all of them the decoder's, go behind it.
            Made by `init_cache` with the same adaptation. A row that has no room left drops its tokens.
          branches: [B, T] forks of what the decoder reads (see `attention_mask`).

        Returns:
          Normed hidden states [B, T, D], of the decoder's tokens only, else zeros; and the cache with the new tokens.
        """
        if cache is None:
            return self._whole(tokens, positions, segments, adaptation, branches), None
        return self._behind(tokens, segments, adaptation, cache)

    def _whole(self, tokens, positions, segments, adaptation: Adaptation, branches) -> jax.Array:
        T, P = tokens.shape[1], adaptation.prefix_length
        x = constrain_batch_sharding(embed(self.embed_tokens, tokens, adaptation), self.rows)
        parts = self.split(tokens, positions, segments)

        # The encoder's tokens of a sequence lie side by side, so distances are those of the row's columns.
        column = jnp.arange(T)
        encoder_segments = jnp.where(parts.decoded, PADDING, segments)
        visible = (encoder_segments[:, :, None] == encoder_segments[:, None, :]) & (encoder_segments != PADDING)[
            :, None, :
        ]
        bias = self.encoder.bias((column - column[:, None])[None], bidirectional=True)
        encoded = self.encoder.norm(self.encoder(x, _lora(adaptation, "encoder"), (bias, visible)))

        own, number, place = parts.gathered(segments), parts.gathered(parts.numbers), parts.places
        key_own = jnp.pad(own, ((0, 0), (P, 0)), constant_values=GLOBAL_SEGMENT)
        key_place = jnp.pad(place, ((0, 0), (P, 0)), constant_values=-1)
        key_number = jnp.concatenate([jnp.broadcast_to(jnp.arange(-P, 0), (len(x), P)), number], axis=1)
        branch = None if branches is None else parts.gathered(branches)
        key_branch = None if branches is None else jnp.pad(branch, ((0, 0), (P, 0)))
        sight = DecoderContext(
            encoded,
            self.decoder.bias(key_number[:, None] - number[..., None], bidirectional=False),
            attention_mask(own, key_own, place, key_place, branch, key_branch),
            attention_mask(own, encoder_segments, place, jnp.broadcast_to(column, encoder_segments.shape)),
            None,
        )
        inputs = (jnp.arange(self.config.num_layers), _lora(adaptation, "decoder"), adaptation.prefix)
        hidden, _ = self.decoder((constrain_batch_sharding(parts.gathered(x), self.rows), None), inputs, sight)
        return parts.spread(self.decoder.norm(hidden))

    def _behind(self, tokens, segments, adaptation: Adaptation, cache: Cache) -> tuple[jax.Array, Cache]:
        B, T = tokens.shape
        slots = cache.length[:, None] + jnp.arange(T)
        known = cache.segments.at[jnp.arange(B)[:, None], slots].set(segments, mode="drop")
        slot = jnp.broadcast_to(jnp.arange(known.shape[1]), known.shape)
        # Places behind a row's newest one may hold what the row held before: they are seen by neither attention.
        cross = (known[:, None] == ENCODED) & (slot[:, None] <= slots[..., None])
        relative = slot[:, None] - slots[..., None]
        # Between a prefix and the decoder's tokens lies in the cache what the encoder has read.
        relative += jnp.where(known[:, None] == GLOBAL_SEGMENT, cross.sum(axis=-1, keepdims=True), 0)
        sight = DecoderContext(
            None,
            self.decoder.bias(relative, bidirectional=False),
            attention_mask(segments, known, slots, slot),
            cross & (segments != PADDING)[..., None],
            slots,
        )
        inputs = (jnp.arange(self.config.num_layers), _lora(adaptation, "decoder"), None)
        hidden, kv = self.decoder((self.embed_tokens(tokens), (cache.key, cache.value)), inputs, sight)
        return self.decoder.norm(hidden), Cache(*kv, known, cache.length + num_valid(segments))

    def split(self, tokens, positions, segments) -> Split:
        """The rows' parts between encoder and decoder."""
        return split(tokens, positions, segments, self.config.decoder_start, self.max_decoder_tokens)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits in float32: [..., D] → [..., V]."""
        if self.config.scale_outputs:
            hidden = hidden * self.config.hidden_size**-0.5
        logits = self.embed_tokens.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return logits.astype(jnp.float32)

    def logits(self, *args, **kwargs) -> tuple[jax.Array, Cache | None]:
        """Logits of every position, [B, T, V]: for small inputs; training asks only where there is a target."""
        hidden, cache = self(*args, **kwargs)
        return self.unembed(hidden), cache


def _lora(adaptation: Adaptation, stack: str) -> dict[str, dict[str, Any]]:
    """LoRA of one stack, {module: {layer: pair}}, from names such as "encoder.self_attn.q"."""
    nested: dict[str, dict[str, Any]] = {}
    for name, pair in (adaptation.lora or {}).items():
        own, module, layer = name.split(".")
        if own == stack:
            nested.setdefault(module, {})[layer] = pair
    return nested


def prefill(
    student: T5, weights: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array, adaptation: Adaptation
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Reads packed rows, and gives what later tokens need of them: see `sqa_jax.models.api.prefill`.

    In an encoder's token's place lie its keys and values for cross-attention, in a decoder's those of self-attention.
    """
    (hidden, _), kept = student.apply({"params": weights}, tokens, positions, segments, adaptation, mutable=["read"])
    layers = kept["read"]["decoder"]["layers"]
    (own,), (cross,) = layers["of_decoder"], layers["of_encoder"]
    parts = student.split(tokens, positions, segments)
    decoded = parts.decoded[..., None, None]
    key, value = (jnp.where(decoded, jax.vmap(parts.spread)(o), c) for o, c in zip(own, cross, strict=True))
    return hidden, key, value, jnp.where(parts.decoded, 1, ENCODED)
