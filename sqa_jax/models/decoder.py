"""A decoder-only transformer in Flax Linen: scanned layers, KV cache, packed rows, and an entry for every adapter.

The parameters are the frozen base; what an adapter adds arrives as an `Adaptation`, so that the two trees never mix and
a gradient over one never touches the other.

Shapes: B rows, T new tokens, S key slots, D hidden, H query heads, K key/value heads, d head width, L layers,
V vocabulary. With a cache, A of its rows receive up to W tokens each.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from sqa_jax.models.adaptation import NO_ADAPTATION, Adaptation
from sqa_jax.models.decoder_config import WINDOW, DecoderConfig
from sqa_jax.models.layers.attention import dot_product_attention, soft_cap
from sqa_jax.models.layers.blockwise_attention import blockwise_attention
from sqa_jax.models.layers.kernels import FusedAttention, fused_attention
from sqa_jax.models.layers.kv_cache import (
    Cache,
    ImageFeatures,
    PackedToCacheMap,
    PrefillOutput,
    embed,
    num_valid,
    prepend_prefix_kv,
    read_kv,
    write_kv,
)
from sqa_jax.models.layers.linear import KV, Linear, RMSNorm, constrain_batch_sharding, scan_layers
from sqa_jax.models.layers.masks import (
    AttentionLayout,
    cache_layout,
    cache_window_positions,
    row_layout,
    row_window_positions,
)
from sqa_jax.models.layers.rope import apply_rope, mrope_positions, rope_sin_cos
from sqa_jax.models.param_spec import ParamTree

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": partial(nn.gelu, approximate=True)}


class AttentionContext(NamedTuple):
    """Inputs of attention that all layers share.

    Attributes:
      sin, cos: [R, B, T, d/2] of the R kinds of rotary embeddings.
      mask: [A, W, S] of layers with full attention.
      local_mask: the same of layers with a sliding window, where it hides anything.
      rows, slots: [A] and [A, W], where the new tokens go in the cache.
      segments: [B, T], for fused attention; None where it cannot be used.
      cache_map: as in `Decoder.__call__`.
    """

    sin: jax.Array
    cos: jax.Array
    mask: jax.Array
    local_mask: jax.Array | None
    rows: jax.Array
    slots: jax.Array
    segments: jax.Array | None
    cache_map: PackedToCacheMap | None


class LayerInputs(NamedTuple):
    """Inputs in which layers differ; each has a leading dimension L before the scan.

    Attributes:
      index: number of the layer.
      rotation: which of the R kinds of rotary embeddings.
      windowed: whether it has a sliding window.
      adaptation: its part of the adapters.
    """

    index: jax.Array
    rotation: jax.Array
    windowed: jax.Array
    adaptation: Adaptation


class Attention(nn.Module):
    """Grouped-query self-attention with rotary embeddings, over packed rows or a KV cache."""

    config: DecoderConfig
    dtype: Any
    lora_dropout: float
    fused: FusedAttention | None

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, cache, context: AttentionContext):
        c, lora, cache_map = self.config, layer.adaptation.lora or {}, context.cache_map
        B, T, _ = x.shape
        query, key, value = self._query_key_value(x, lora, context.sin[layer.rotation], context.cos[layer.rotation])
        self.sow(KV, "key", key)
        self.sow(KV, "value", value)
        mask = context.mask
        if context.local_mask is not None:
            mask = jnp.where(layer.windowed, context.local_mask, mask)
        if cache is None:
            key, value = prepend_prefix_kv(layer.adaptation.prefix, key, value)
        else:
            if cache_map is not None:
                query, key, value = map(cache_map.to_cache_rows, (query, key, value))
            cache = write_kv(cache, layer.index, context.rows, context.slots, key, value)
            rows = None if cache_map is None else context.rows
            key, value = read_kv(cache, layer.index, rows, mask.shape[-1], self.dtype)
        if context.segments is not None and self.fused is not None:
            out = self.fused(query, key, value, context.segments, mask, layer.windowed)
        elif cache is None:
            out = blockwise_attention(query, key, value, mask, c.attention_softcap, causal=not c.prefix_lm)
        else:
            out = dot_product_attention(query, key, value, mask, c.attention_softcap)
        if cache_map is not None:
            out = cache_map.to_packed(out, (B, T))
        out = out.reshape(B, T, c.num_heads * c.head_dim)
        return self._linear("o_proj", c.hidden_size)(out, lora.get("o_proj")), cache

    def _query_key_value(self, x: jax.Array, lora: dict[str, Any], sin: jax.Array, cos: jax.Array) -> list[jax.Array]:
        """Queries [B, T, H, d], keys and values [B, T, K, d]; the first two normed, scaled and rotated."""
        c = self.config

        def heads(name: str, count: int) -> jax.Array:
            return self._linear(name, count * c.head_dim)(x, lora.get(name)).reshape(*x.shape[:2], count, c.head_dim)

        query, key = heads("q_proj", c.num_heads), heads("k_proj", c.num_kv_heads)
        value = heads("v_proj", c.num_kv_heads)
        if c.qk_norm:
            query = RMSNorm(c.norm_epsilon, c.norm_offset, name="q_norm")(query)
            key = RMSNorm(c.norm_epsilon, c.norm_offset, name="k_norm")(key)
        if c.query_scale:  # attention divides by √d
            query *= (c.head_dim / c.query_scale) ** 0.5
        return [apply_rope(query, sin, cos), apply_rope(key, sin, cos), value]

    def _linear(self, name: str, features: int) -> Linear:
        return Linear(features, self.config.bias(name), self.dtype, self.lora_dropout, name=name)


class MLP(nn.Module):
    """Gated MLP, down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202: SwiGLU, and GEGLU with gelu)."""

    config: DecoderConfig
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, lora: dict[str, Any]) -> jax.Array:
        c = self.config

        def linear(name: str, features: int, y: jax.Array) -> jax.Array:
            return Linear(features, c.bias(name), self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        gate, up = linear("gate_proj", c.intermediate_size, x), linear("up_proj", c.intermediate_size, x)
        return linear("down_proj", c.hidden_size, ACTIVATIONS[c.activation](gate) * up)


class Block(nn.Module):
    """One layer, with the signature of `nn.scan`: (carry, this layer's inputs, inputs shared by all layers)."""

    config: DecoderConfig
    dtype: Any
    lora_dropout: float
    fused: FusedAttention | None

    @nn.compact
    def __call__(self, carry, layer: LayerInputs, context: AttentionContext):
        (x, cache), c = carry, self.config
        before, *between, last = c.norms()  # two per layer, or four

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_epsilon, c.norm_offset, name=name)(x)

        y, cache = Attention(c, self.dtype, self.lora_dropout, self.fused, name="self_attn")(
            norm(before, x), layer, cache, context
        )
        mlp, lora = MLP(c, self.dtype, self.lora_dropout, name="mlp"), layer.adaptation.lora or {}
        if c.sandwich_norms:
            after, before = between
            x += norm(after, y)
            x += norm(last, mlp(norm(before, x), lora))
        else:
            x += y
            x += mlp(norm(last, x), lora)
        return (x, cache), None


class Decoder(nn.Module):
    """Decoder of the Llama family (Touvron et al. 2023, arXiv:2302.13971), and by its options of Qwen's and Gemma's.

    Attributes:
      config: shape and options.
      dtype: of the computation; parameters may have another.
      remat: a key of `REMAT_POLICIES`.
      lora_dropout: rate at which LoRA's input is dropped where a "dropout" RNG is given.
      fused: fused attention of packed rows, used where the mask depends on segments alone: without prefix, cache and
        branches.
      data_shards: shards of the batch dimension; what is computed a chunk at a time takes as much of each.
      batch_sharding: of the batch dimension, as a constraint; see `sqa_jax.models.layers.linear.constrain_batch_sharding`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0
    fused: FusedAttention | None = None
    data_shards: int = 1
    batch_sharding: NamedSharding | None = None

    @classmethod
    def for_mesh(cls, config: DecoderConfig, attention: str, mesh: Mesh, **fields: Any) -> Decoder:
        """A decoder with the kernel that `config.student.attention` names.

        Raises:
          UserError: there is no such kernel, or not on this mesh's platform.
        """
        return cls(config, fused=fused_attention(attention, config, fields["dtype"], mesh), **fields)

    def setup(self):
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        self.layers = scan_layers(Block, c.num_layers, self.remat)(c, self.dtype, self.lora_dropout, self.fused)
        self.norm = RMSNorm(c.norm_epsilon, c.norm_offset)
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
        attended_slots: int | None = None,
        cache_map: PackedToCacheMap | None = None,
        image_features: ImageFeatures | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states of tokens; `unembed` turns them into logits, where they are needed.

        Args:
          tokens: [B, T] ids: of the vocabulary; of soft prompt tokens, -1, -2, …; of image features, see `ImageFeatures`.
          positions: [B, T], 0-based within each sequence.
          segments: [B, T], 1, 2, … for the sequences of a row, 0 for padding on either side.
          adaptation: what the adapters add.
          cache: keys and values of the rows' earlier tokens; the new ones are appended. Made by `init_cache` with the
            same prefix. A row that has no room left drops its tokens.
          branches: [B, T] forks of a segment (see `attention_mask`). Only their trunk may stay in a cache: the caller
            sets its `length` back to the trunk's end.
          attended_slots: number of the cache's slots, a prefix included, that attention is computed over; later ones
            must be empty.
          cache_map: with a cache, [B, T] are packed tokens of any of its rows, which this map distributes.
          image_features: of the images in the rows.

        Returns:
          Normed hidden states [B, T, D], and the cache with the new tokens in it.
        """
        c = self.config
        scale = c.hidden_size**0.5 if c.embedding_scale else 1.0
        x = embed(self.embed_tokens, tokens, adaptation.prompt, image_features, scale)
        x = constrain_batch_sharding(x, self.batch_sharding if cache is None else None)
        if cache is None:
            layout = row_layout(segments, branches, adaptation.prefix_length)
        else:
            layout = cache_layout(cache, segments, branches, cache_map)
        mask = layout.mask()[..., :attended_slots]
        # A prefix takes the first P positions, as in PEFT.
        rotated = positions + adaptation.prefix_length + c.first_position
        needs_mask = cache is not None or branches is not None or adaptation.prefix is not None
        context = AttentionContext(
            *self._rope(tokens, rotated, segments, image_features),
            mask,
            self._local_mask(mask, layout, positions, adaptation.prefix_length, cache, cache_map),
            layout.rows,
            layout.slots,
            None if self.fused is None or needs_mask else segments,
            cache_map,
        )
        carry = (x, None if cache is None else (cache.key, cache.value))
        (x, kv), _ = self.layers(carry, self._layer_inputs(adaptation), context)
        if cache is not None:
            assert layout.cache_segments is not None
            length = cache.length.at[layout.rows].add(num_valid(layout.segments), mode="drop")
            cache = Cache(kv[0], kv[1], layout.cache_segments, length)
        return self.norm(x), cache

    def _rope(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        image_features: ImageFeatures | None,
    ) -> tuple[Float[Array, "R B T half"], Float[Array, "R B T half"]]:
        """Sines and cosines of each kind of rotary embeddings that the layers have."""
        c = self.config
        if c.mrope_sections:
            if image_features is not None and image_features.mrope_offsets is not None:
                offsets = image_features.mrope_offsets
                positions = mrope_positions(tokens, positions, segments, c.vocab_size, offsets)
            else:
                positions = jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
        pairs = [rope_sin_cos(positions, c.head_dim, rope, c.mrope_sections) for rope in c.ropes]
        sin, cos = map(jnp.stack, zip(*pairs, strict=True))
        return sin, cos

    def _local_mask(
        self,
        mask: jax.Array,
        layout: AttentionLayout,
        positions: jax.Array,
        prefix_length: int,
        cache: Cache | None,
        cache_map: PackedToCacheMap | None,
    ) -> jax.Array | None:
        """The mask of layers with a sliding window; None where it would hide nothing more."""
        window, num_slots = self.config.window, mask.shape[-1]
        if not 0 < window < num_slots:
            return None
        if cache is None:
            of_queries, of_keys = row_window_positions(layout, positions, prefix_length)
        else:
            of_queries, of_keys = cache_window_positions(layout, positions, cache, cache_map)
        return mask & layout.window_mask(of_queries, of_keys, window, num_slots)

    def _layer_inputs(self, adaptation: Adaptation) -> LayerInputs:
        c = self.config
        return LayerInputs(
            jnp.arange(c.num_layers),
            jnp.asarray([c.ropes.index(c.rope_of(kind)) for kind in c.kinds]),
            jnp.asarray([kind == WINDOW for kind in c.kinds]),
            adaptation._replace(prompt=None, vision=None),
        )

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits in float32."""
        logits = self.embed_tokens.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return soft_cap(logits.astype(jnp.float32), self.config.logit_softcap)

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
        **extra_inputs: Any,
    ) -> PrefillOutput:
        """Processes packed rows without a cache and returns what one needs: see `StudentModel.prefill`."""
        (hidden, _), sown = self.apply(
            {"params": params}, tokens, positions, segments, adaptation, **extra_inputs, mutable=[KV]
        )
        attention: Any = sown[KV]["layers"]["self_attn"]
        (key,), (value,) = attention["key"], attention["value"]
        return PrefillOutput(hidden, key, value, jnp.ones_like(segments))

    @nn.nowrap
    def with_max_decoder_tokens(self, count: int) -> Decoder:
        """The same model: every token is the decoder's."""
        return self
