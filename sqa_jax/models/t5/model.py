"""T5, an encoder–decoder in Flax Linen, over the same packed rows that a decoder-only model processes.

A sequence of a row is `prompt </s> <pad> target`: the encoder processes what precedes the decoder's start token
(`<pad>`), the decoder the start token and what follows. The target's first token is then predicted where a decoder-only
model predicts it, at the last token of its input, and packing, loss, scoring and generation are the same.

The decoder's tokens are gathered into M slots of a row, so that its layers do not compute the prompts too: see
`sqa_jax.models.t5.split`.

Shapes: B rows, T tokens of a row, M slots of the decoder, S keys, D hidden, H heads, d head width, L layers of the
decoder, P slots of a prefix, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from sqa_jax.errors import UserError
from sqa_jax.models.adaptation import NO_ADAPTATION, Adaptation
from sqa_jax.models.layers.kv_cache import (
    Cache,
    PrefillOutput,
    embed,
    num_valid,
)
from sqa_jax.models.layers.linear import KV, Linear, constrain_batch_sharding
from sqa_jax.models.layers.masks import attention_mask
from sqa_jax.models.param_spec import ParamTree
from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.t5.layers import DecoderBlock, DecoderContext, EncoderBlock, Stack
from sqa_jax.models.t5.split import Split, split

# Segment, in a cache, of slots that hold keys and values of the encoder's output, for cross-attention only.
ENCODED = -2


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
