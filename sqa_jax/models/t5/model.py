"""T5's encoder and decoder in Flax Linen, over the same packed rows that a decoder-only model processes.

A sequence of a row is `prompt </s> <pad> target`: the encoder processes what precedes the decoder's start token
(`<pad>`), the decoder the start token and what follows. The target's first token is then predicted where a decoder-only
model predicts it, at the last token of its input, and packing, loss, scoring and generation are the same.

The decoder's tokens are gathered into M slots of a row, so that its layers do not compute the prompts too: see
`sqa_jax.models.t5.split`.

Shapes: B rows, T tokens of a row, M slots of the decoder, S keys, D hidden, H heads, d head width, L layers of the
decoder, P slots of a prefix, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from sqa_jax.errors import UserError
from sqa_jax.models.adaptation import NO_ADAPTATION, Adaptation
from sqa_jax.models.layers.blockwise_attention import SAVED
from sqa_jax.models.layers.kv_cache import (
    Cache,
    PrefillOutput,
    embed,
    num_valid,
    prepend_prefix_kv,
    read_kv,
    write_kv,
)
from sqa_jax.models.layers.linear import KV, Linear, RMSNorm, constrain_batch_sharding, scan_layers
from sqa_jax.models.layers.masks import attention_mask
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.t5.split import Split, split

ENCODED = (
    -2
)  # segment, in a cache, of slots that hold keys and values of the encoder's output, for cross-attention only


@functools.cache
def distance_buckets(bidirectional: bool, buckets: int, max_distance: int) -> Int[np.ndarray, " distances"]:
    """Relative position buckets of the distances -max_distance, …, max_distance (key minus query).

    Near distances have a bucket each, farther ones share logarithmically wider ones (Raffel et al. 2020, section 2.1,
    with the rounding of the reference implementation, float32); those beyond `max_distance` the last one. In a causal
    stack, all later keys are in bucket 0.
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


def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S H d"],
    value: Float[Array, "B S H d"],
    bias: Float[Array, "#B H T S"] | None,
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H d"]:
    """Unscaled dot-product attention with a position bias added to the scores; softmax in float32.

    A query whose keys are all masked (padding) gets the mean of the values, which is not used.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bhts,bhsd->bhtd", weights, v).swapaxes(1, 2), SAVED)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are computed separately: they may come from the encoder or a cache."""

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

    def __call__(self, x, key, value, bias, mask, lora: dict[str, Any]) -> jax.Array:
        out = attend(self._heads(self.q(x, lora.get("q"))), key, value, bias, mask)
        return self.o(out.reshape(*x.shape[:2], -1), lora.get("o"))

    def _heads(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)


class MLP(nn.Module):
    """Gated MLP, wo(gelu(wi_0(x)) · wi_1(x)) (Shazeer 2020, arXiv:2002.05202, GEGLU), or wo(relu(wi(x)))."""

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
    """One encoder layer, with the signature of `nn.scan`: (carry, this layer's inputs, inputs shared by all layers)."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x, lora, bias_and_mask):
        c, attention_lora = self.config, lora.get("self_attn", {})
        attention = Attention(c, self.dtype, self.lora_dropout, name="self_attn")
        y = RMSNorm(c.norm_epsilon, name="self_attn_layernorm")(x)
        key, value = attention.keys_and_values(y, attention_lora)
        bias, mask = bias_and_mask
        x += attention(y, key, value, bias, mask, attention_lora)
        y = RMSNorm(c.norm_epsilon, name="mlp_layernorm")(x)
        return x + MLP(c, self.dtype, self.lora_dropout, name="mlp")(y, lora.get("mlp", {})), None


class DecoderContext(NamedTuple):
    """Inputs that all decoder layers share.

    Attributes:
      encoded: [B, T, D] the encoder's output; None where its keys and values are in the cache.
      bias: [B, H, M, S] position bias of self-attention.
      self_mask, cross_mask: [B, M, S] and [B, M, T], masks of self- and cross-attention.
      slots: [B, M] where new keys and values go in the cache.
    """

    encoded: jax.Array | None
    bias: jax.Array
    self_mask: jax.Array
    cross_mask: jax.Array
    slots: jax.Array | None


class DecoderBlock(nn.Module):
    """One decoder layer, with the signature of `nn.scan`."""

    config: T5Config
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, carry, inputs, context: DecoderContext):
        (x, cache), (layer, lora, prefix) = carry, inputs
        c = self.config
        self_lora, cross_lora = lora.get("self_attn", {}), lora.get("cross_attn", {})
        attention = Attention(c, self.dtype, self.lora_dropout, name="self_attn")
        cross = Attention(c, self.dtype, self.lora_dropout, name="cross_attn")
        y = RMSNorm(c.norm_epsilon, name="self_attn_layernorm")(x)
        key, value = attention.keys_and_values(y, self_lora)
        if cache is None:
            assert context.encoded is not None
            encoded = cross.keys_and_values(context.encoded, cross_lora)
            self.sow(KV, "of_decoder", (key, value))
            self.sow(KV, "of_encoder", encoded)
            key, value = prepend_prefix_kv(prefix, key, value)
        else:
            assert context.slots is not None
            cache = write_kv(cache, layer, jnp.arange(len(x)), context.slots, key, value)
            # Each slot of the cache holds keys and values of either the encoder's output or the decoder's tokens.
            key, value = encoded = read_kv(cache, layer, None, context.self_mask.shape[-1], self.dtype)
        x += attention(y, key, value, context.bias, context.self_mask, self_lora)
        y = RMSNorm(c.norm_epsilon, name="cross_attn_layernorm")(x)
        x += cross(y, *encoded, None, context.cross_mask, cross_lora)
        y = RMSNorm(c.norm_epsilon, name="mlp_layernorm")(x)
        x += MLP(c, self.dtype, self.lora_dropout, name="mlp")(y, lora.get("mlp", {}))
        return (x, cache), None


class Stack(nn.Module):
    """The layers of the encoder or of the decoder, the position bias that they share, and the final norm."""

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

    def bias(self, relative: Int[Array, "B T S"], bidirectional: bool) -> Float[Array, "B H T S"]:
        """Position bias of each head's scores, from relative positions, key minus query."""
        c = self.config
        buckets = jnp.asarray(distance_buckets(bidirectional, c.num_buckets, c.max_distance))
        by_distance = self.relative_attention_bias(buckets)
        index = jnp.clip(relative, -c.max_distance, c.max_distance) + c.max_distance
        return jnp.moveaxis(by_distance[index], -1, 1)

    def __call__(self, carry, inputs, shared):
        return self.layers(carry, inputs, shared)[0]


class T5(nn.Module):
    """T5 encoder–decoder (Raffel et al. 2020, arXiv:1910.10683), with the interface of a `Decoder`.

    Dropout of the published models is left out; LoRA's is as in `Decoder`.

    Attributes:
      config: shape and options.
      dtype: of the computation; parameters may have another.
      remat: a key of `REMAT_POLICIES`.
      lora_dropout: rate at which LoRA's input is dropped where a "dropout" RNG is given.
      data_shards, batch_sharding: as of `Decoder`.
      max_decoder_tokens: slots of a row that the decoder computes, see `split`; None is all of them.
    """

    config: T5Config
    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0
    data_shards: int = 1
    batch_sharding: NamedSharding | None = None
    max_decoder_tokens: int | None = None

    @classmethod
    def for_mesh(cls, config: T5Config, attention: str, mesh: Mesh, **fields: Any) -> T5:
        """A T5 with the attention that `config.student.attention` names.

        Raises:
          UserError: it names a fused kernel.
        """
        if attention not in ("auto", "plain"):
            raise UserError(f"config.student.attention={attention} supports no position bias, which T5 needs; use auto")
        return cls(config, **fields)

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
        """Hidden states of the decoder's tokens; `unembed` turns them into logits, where they are needed.

        Args:
          tokens: [B, T] ids; a sequence is the decoder's from its first start token on. Those of a soft prompt, -1,
            -2, …, are in the encoder's input.
          positions: [B, T], 0-based within each sequence, consecutive in the encoder's input.
          segments: [B, T], 1, 2, … for the sequences of a row, 0 for padding on either side.
          adaptation: what the adapters add. A prefix precedes the keys and values of the decoder's self-attention; the
            decoder's positions start after it.
          cache: keys and values of the rows' earlier tokens, see `prefill`; the new tokens, all of them the decoder's, are
            appended. Made by `init_cache` with the same prefix. A row that has no room left drops its tokens.
          branches: [B, T] forks of the decoder's tokens (see `attention_mask`).

        Returns:
          Normed hidden states [B, T, D], zeros at the encoder's tokens; and the cache with the new tokens.
        """
        if cache is None:
            return self._prefill(tokens, positions, segments, adaptation, branches), None
        return self._decode_step(tokens, segments, adaptation, cache)

    def _prefill(self, tokens, positions, segments, adaptation: Adaptation, branches) -> jax.Array:
        """Whole rows: the encoder's tokens, then the decoder's in its M slots."""
        parts = self.split(tokens, positions, segments)
        encoder_segments = jnp.where(parts.decoded, PADDING, segments)
        x = constrain_batch_sharding(embed(self.embed_tokens, tokens, adaptation.prompt), self.batch_sharding)
        encoded = self._encode(x, encoder_segments, adaptation)
        context = self._decoder_context(parts, encoded, segments, encoder_segments, branches, adaptation.prefix_length)
        inputs = (jnp.arange(self.config.num_layers), _lora(adaptation, "decoder"), adaptation.prefix)
        x = constrain_batch_sharding(parts.to_decoder(x), self.batch_sharding)
        hidden, _ = self.decoder((x, None), inputs, context)
        return parts.to_rows(self.decoder.norm(hidden))

    def _encode(self, x: Float[Array, "B T D"], segments: Int[Array, "B T"], adaptation: Adaptation) -> jax.Array:
        """The encoder's output at its tokens; `segments` is `PADDING` at the decoder's."""
        # The encoder's tokens of a sequence are contiguous, so relative positions are those of the row's columns.
        column = jnp.arange(x.shape[1])
        mask = (segments[:, :, None] == segments[:, None, :]) & (segments != PADDING)[:, None, :]
        bias = self.encoder.bias((column - column[:, None])[None], bidirectional=True)
        return self.encoder.norm(self.encoder(x, _lora(adaptation, "encoder"), (bias, mask)))

    def _decoder_context(
        self, parts: Split, encoded: jax.Array, segments, encoder_segments, branches, prefix_length: int
    ) -> DecoderContext:
        """Masks and position bias of the decoder's slots, after the keys of a prefix of P slots."""
        (B, T), P = segments.shape, prefix_length
        query_segments, number, slot = parts.to_decoder(segments), parts.to_decoder(parts.numbers), parts.gather
        key_segments = jnp.pad(query_segments, ((0, 0), (P, 0)), constant_values=GLOBAL_SEGMENT)
        key_slot = jnp.pad(slot, ((0, 0), (P, 0)), constant_values=-1)
        key_number = jnp.concatenate([jnp.broadcast_to(jnp.arange(-P, 0), (B, P)), number], axis=1)
        branch = None if branches is None else parts.to_decoder(branches)
        key_branch = None if branch is None else jnp.pad(branch, ((0, 0), (P, 0)))
        column = jnp.broadcast_to(jnp.arange(T), (B, T))
        return DecoderContext(
            encoded,
            self.decoder.bias(key_number[:, None] - number[..., None], bidirectional=False),
            attention_mask(query_segments, key_segments, slot, key_slot, branch, key_branch),
            attention_mask(query_segments, encoder_segments, slot, column),
            None,
        )

    def _decode_step(self, tokens, segments, adaptation: Adaptation, cache: Cache) -> tuple[jax.Array, Cache]:
        """New tokens of the decoder, after those in the cache."""
        B, T = tokens.shape
        slots = cache.length[:, None] + jnp.arange(T)
        key_segments = cache.segments.at[jnp.arange(B)[:, None], slots].set(segments, mode="drop")
        key_slots = jnp.broadcast_to(jnp.arange(key_segments.shape[1]), key_segments.shape)
        # Slots after a row's newest one may hold what the row held before: they are masked in both attentions.
        cross_mask = (key_segments[:, None] == ENCODED) & (key_slots[:, None] <= slots[..., None])
        relative = key_slots[:, None] - slots[..., None]
        # In the cache, the encoder's tokens are between a prefix and the decoder's tokens.
        relative += jnp.where(key_segments[:, None] == GLOBAL_SEGMENT, cross_mask.sum(axis=-1, keepdims=True), 0)
        context = DecoderContext(
            None,
            self.decoder.bias(relative, bidirectional=False),
            attention_mask(segments, key_segments, slots, key_slots),
            cross_mask & (segments != PADDING)[..., None],
            slots,
        )
        inputs = (jnp.arange(self.config.num_layers), _lora(adaptation, "decoder"), None)
        hidden, kv = self.decoder((self.embed_tokens(tokens), (cache.key, cache.value)), inputs, context)
        length = cache.length + num_valid(segments)
        return self.decoder.norm(hidden), Cache(kv[0], kv[1], key_segments, length)

    @nn.nowrap
    def split(self, tokens, positions, segments) -> Split:
        """The rows' parts of encoder and decoder."""
        return split(tokens, positions, segments, self.config.decoder_start, self.max_decoder_tokens)

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits in float32."""
        if self.config.scale_outputs:
            hidden = hidden * self.config.hidden_size**-0.5
        logits = self.embed_tokens.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return logits.astype(jnp.float32)

    def logits(self, *args, **kwargs) -> tuple[jax.Array, Cache | None]:
        """Logits of every position, [B, T, V]: for small inputs; training computes those of targets only."""
        hidden, cache = self(*args, **kwargs)
        return self.unembed(hidden), cache

    @nn.nowrap
    def prefill(
        self,
        params: ParamTree,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        adaptation: Adaptation,
    ) -> PrefillOutput:
        """Processes packed rows without a cache and returns what one needs: see `StudentModel.prefill`.

        Slots of the encoder's tokens get keys and values for cross-attention, those of the decoder's for self-attention.
        """
        (hidden, _), sown = self.apply({"params": params}, tokens, positions, segments, adaptation, mutable=[KV])
        layers: Any = sown[KV]["decoder"]["layers"]
        (of_decoder,), (of_encoder,) = layers["of_decoder"], layers["of_encoder"]
        parts = self.split(tokens, positions, segments)
        decoded = parts.decoded[..., None, None]
        key, value = (
            jnp.where(decoded, jax.vmap(parts.to_rows)(new), encoded)
            for new, encoded in zip(of_decoder, of_encoder, strict=True)
        )
        return PrefillOutput(hidden, key, value, jnp.where(parts.decoded, 1, ENCODED))

    @nn.nowrap
    def with_max_decoder_tokens(self, count: int) -> T5:
        """The model for rows in which at most `count` tokens predict a next one: the decoder computes so many slots."""
        return self.clone(max_decoder_tokens=count)


def _lora(adaptation: Adaptation, stack: str) -> dict[str, dict[str, Any]]:
    """LoRA of one stack, {module: {layer: pair}}, from names such as "encoder.self_attn.q"."""
    nested: dict[str, dict[str, Any]] = {}
    for name, pair in (adaptation.lora or {}).items():
        own_stack, module, layer = name.split(".")
        if own_stack == stack:
            nested.setdefault(module, {})[layer] = pair
    return nested
