"""A decoder-only transformer in Flax Linen: stacked layers, KV cache, and a place for every adapter.

The parameters are the frozen base; what an adapter changes arrives as an `Adaptation`, so the two trees
never mix and a gradient over one never touches the other.

Shapes in comments: B rows, T new tokens, S key slots, D hidden, H query heads, K key/value heads, d head
width, L layers, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sqa_jax.models.decoder_config import WINDOW, DecoderConfig
from sqa_jax.models.layers.attention import (
    apply_rope,
    attention_mask,
    dot_product_attention,
    mrope_positions,
    prefix_lm_mask,
    rope_sin_cos,
    sliding_window_mask,
    soft_cap,
)
from sqa_jax.models.layers.blockwise_attention import blockwise_attention
from sqa_jax.models.layers.kernels import FusedAttention
from sqa_jax.models.layers.kv_cache import (
    NO_ADAPTATION,
    Adaptation,
    Cache,
    ImageFeatures,
    PackedToCacheMap,
    embed,
    num_valid,
    prepend_prefix_kv,
)
from sqa_jax.models.layers.linear import Linear, RMSNorm, constrain_batch_sharding, scan_layers
from sqa_jax.models.segments import GLOBAL_SEGMENT, PADDING

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": partial(nn.gelu, approximate=True)}


class AttentionContext(NamedTuple):
    """What all layers share of the tokens that are read.

    Attributes:
      sin, cos: [R, B, T, d/2] of each of R kinds of rotation.
      visible: [B, T, S] what layers without a window see.
      lately: the same of layers with one, where it hides anything.
      slots: [B, T] places of the tokens in the cache, or in the row behind a prefix.
      segments: [B, T], for fused attention; None where it cannot be used.
      grid: as in `Decoder.__call__`.
    """

    sin: jax.Array
    cos: jax.Array
    visible: jax.Array
    lately: jax.Array | None
    slots: jax.Array
    segments: jax.Array | None
    grid: PackedToCacheMap | None


class LayerInputs(NamedTuple):
    """What tells a layer from the others; stacked in front of the scan.

    Attributes:
      index: its number.
      rotation: which of the R kinds.
      windowed: whether it has a sliding window.
      adaptation: its part of the adapters.
    """

    index: jax.Array
    rotation: jax.Array
    windowed: jax.Array
    adaptation: Adaptation


class Attention(nn.Module):
    config: DecoderConfig
    dtype: Any
    lora_dropout: float
    fused: FusedAttention | None

    @nn.compact
    def __call__(self, x, layer: LayerInputs, cache, around: AttentionContext):
        c, lora, grid = self.config, layer.adaptation.lora or {}, around.grid
        B, T, _ = x.shape
        sin, cos = around.sin[layer.rotation], around.cos[layer.rotation]
        visible = around.visible
        if around.lately is not None:
            visible = jnp.where(layer.windowed, around.lately, visible)

        def linear(name, features):
            return Linear(features, c.bias(name), self.dtype, self.lora_dropout, name=name)

        def heads(name, count, y):
            return linear(name, count * c.head_dim)(y, lora.get(name)).reshape(B, T, count, c.head_dim)

        query, key = heads("q_proj", c.num_heads, x), heads("k_proj", c.num_kv_heads, x)
        value = heads("v_proj", c.num_kv_heads, x)
        if c.qk_norm:
            query = RMSNorm(c.norm_epsilon, c.norm_offset, name="q_norm")(query)
            key = RMSNorm(c.norm_epsilon, c.norm_offset, name="k_norm")(key)
        if c.query_scale:  # attention divides by √d
            query *= (c.head_dim / c.query_scale) ** 0.5
        query, key = apply_rope(query, sin, cos), apply_rope(key, sin, cos)
        self.sow("read", "key", key)
        self.sow("read", "value", value)
        if cache is not None:
            rows = jnp.arange(B)
            if grid is not None:
                rows, (query, key, value) = grid.rows, map(grid.spread, (query, key, value))
            kv_heads, places = jnp.arange(c.num_kv_heads)[:, None], around.slots[:, None]
            cache = tuple(
                old.at[layer.index, rows[:, None, None], kv_heads, places].set(
                    new.swapaxes(1, 2).astype(old.dtype), mode="drop"
                )
                for old, new in zip(cache, (key, value), strict=True)
            )

            def known(own):
                own = jax.lax.dynamic_index_in_dim(own, layer.index, keepdims=False)[:, :, : visible.shape[-1]]
                own = own if grid is None else own.at[rows].get(mode="clip")
                return own.astype(self.dtype).swapaxes(1, 2)

            key, value = map(known, cache)
        else:
            key, value = prepend_prefix_kv(layer.adaptation.prefix, key, value)
        if around.segments is not None:
            out = self.fused(query, key, value, around.segments, visible, layer.windowed)
        else:
            attention = partial(blockwise_attention, causal=not c.prefix_lm) if cache is None else dot_product_attention
            out = attention(query, key, value, visible, c.attention_softcap)
        if grid is not None:
            out = grid.packed(out, (B, T))
        out = out.reshape(B, T, c.num_heads * c.head_dim)
        return linear("o_proj", c.hidden_size)(out, lora.get("o_proj")), cache


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202: SwiGLU, and GEGLU with gelu)."""

    config: DecoderConfig
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, lora: dict[str, Any]) -> jax.Array:
        c = self.config

        def linear(name, features, y):
            return Linear(features, c.bias(name), self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        gate, up = linear("gate_proj", c.intermediate_size, x), linear("up_proj", c.intermediate_size, x)
        return linear("down_proj", c.hidden_size, ACTIVATIONS[c.activation](gate) * up)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` wants: (carry, this layer's inputs, what all layers share)."""

    config: DecoderConfig
    dtype: Any
    lora_dropout: float
    fused: FusedAttention | None

    @nn.compact
    def __call__(self, carry, layer: LayerInputs, around: AttentionContext):
        (x, cache), c = carry, self.config
        before, *between, last = c.norms()  # two of a layer, or four

        def norm(name, x):
            return RMSNorm(c.norm_epsilon, c.norm_offset, name=name)(x)

        y, cache = Attention(c, self.dtype, self.lora_dropout, self.fused, name="self_attn")(
            norm(before, x), layer, cache, around
        )
        mlp, lora = MLP(c, self.dtype, self.lora_dropout, name="mlp"), layer.adaptation.lora or {}
        if c.sandwich_norms:
            behind, before = between
            x += norm(behind, y)
            x += norm(last, mlp(norm(before, x), lora))
        else:
            x += y
            x += mlp(norm(last, x), lora)
        return (x, cache), None


class Decoder(nn.Module):
    """Decoder of the Llama family (Touvron et al. 2023, arXiv:2302.13971), and by its options of Qwen's and Gemma's.

    Attributes:
      config: shape and options.
      dtype: of the computation; parameters may be of another.
      remat: a key of `REMAT_POLICIES`.
      lora_dropout: rate at which LoRA's input is dropped where a "dropout" generator is given.
      fused: attention of packed rows in one kernel, used where neither a prefix, a cache nor branches ask for more
        than segments.
      data_shards: parts of the mesh over which a batch's rows lie; what is done a piece at a time takes as much of
        each.
      rows: how these rows lie there, which the compiler is told: see `sqa_jax.models.layers.linear.constrain_batch_sharding`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora_dropout: float = 0.0
    fused: FusedAttention | None = None
    data_shards: int = 1
    rows: NamedSharding | None = None

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
        extent: int | None = None,
        grid: PackedToCacheMap | None = None,
        visual: ImageFeatures | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Reads tokens; `unembed` turns what it returns into logits, where they are wanted.

        Args:
          tokens: [B, T] ids: words'; a soft prompt's, -1, -2, …; pictures' features, see `ImageFeatures`.
          positions: [B, T], 0-based within each sequence.
          segments: [B, T], 1, 2, … for the sequences of a row, 0 for padding on either side.
          adaptation: what the adapters add.
          cache: what the rows have read before; the new tokens go behind it. Made by `init_cache` with the
            same adaptation. A row that has no room left drops its tokens.
          branches: [B, T] forks of a segment (see `attention_mask`). Only their trunk may stay in a cache: the caller
            sets its `length` back to the trunk's end.
          grid: with a cache, tokens of any of its rows are packed into [B, T], and lie in the cache as it says.
          extent: places of the cache, a prefix included, that attention looks at; behind them must be nothing.
          visual: what the tokens of pictures show.

        Returns:
          Normed hidden states [B, T, D], and the cache with the new tokens in it.
        """
        c = self.config
        B, T = tokens.shape
        x = embed(self.embed_tokens, tokens, adaptation, visual, c.hidden_size**0.5 if c.embedding_scale else 1.0)
        x = constrain_batch_sharding(x, self.rows if cache is None else None)

        P = adaptation.prefix_length
        key_branches = None
        if cache is None:
            slots = jnp.broadcast_to(jnp.arange(P, P + T), (B, T))
            key_segments = jnp.pad(segments, ((0, 0), (P, 0)), constant_values=GLOBAL_SEGMENT)
            if branches is not None:
                key_branches = jnp.pad(branches, ((0, 0), (P, 0)))
        else:
            rows = jnp.arange(B)
            if grid is not None:
                rows, segments = grid.rows, grid.spread(segments)
                branches = None if branches is None else grid.spread(branches)
            slots = cache.length.at[rows].get(mode="clip")[:, None] + jnp.arange(segments.shape[1])

            def entered(known, new):  # (all rows, those that read)
                known = known.at[rows[:, None], slots].set(new, mode="drop")
                return known, known if grid is None else known.at[rows].get(mode="clip")

            all_segments, key_segments = entered(cache.segments, segments)
            if branches is not None:  # what was read before is trunk
                _, key_branches = entered(jnp.zeros_like(cache.segments), branches)
        key_slots = jnp.broadcast_to(jnp.arange(key_segments.shape[1]), key_segments.shape)
        visible = attention_mask(segments, key_segments, slots, key_slots, branches, key_branches)[..., :extent]
        lately = None
        if 0 < c.window < visible.shape[-1]:
            # Places are slots but for branches, which are as far from their trunk as if they were alone.
            if cache is None:
                places = P + positions
                key_places = jnp.concatenate([key_slots[:, :P], places], axis=1)
            else:
                own = positions if grid is None else grid.spread(positions)
                first = jnp.argmax(segments != PADDING, axis=1)[:, None]
                places = own + jnp.take_along_axis(slots - own, first, axis=1)
                everywhere = jnp.broadcast_to(jnp.arange(cache.segments.shape[1]), cache.segments.shape)
                _, key_places = entered(everywhere, places)
            close = sliding_window_mask(places, key_places[:, : visible.shape[-1]], c.window)
            if branches is not None:
                close |= prefix_lm_mask(branches[:, :, None], key_branches[:, None, : visible.shape[-1]])
            lately = visible & close

        # A prefix takes the first P positions, as it does in PEFT.
        rotations, turned = list(dict.fromkeys(map(c.rope_of, c.kinds))), positions + P + c.first_position
        if c.mrope_sections:
            if visual is not None:
                turned = mrope_positions(tokens, turned, segments, c.vocab_size, visual.places)
            else:
                turned = jnp.broadcast_to(turned[..., None], (B, T, 3))
        angles = [rope_sin_cos(turned, c.head_dim, rope, c.mrope_sections) for rope in rotations]
        plain = self.fused is None or cache is not None or branches is not None or adaptation.prefix is not None
        around = AttentionContext(
            *map(jnp.stack, zip(*angles, strict=True)), visible, lately, slots, None if plain else segments, grid
        )
        layers = LayerInputs(
            jnp.arange(c.num_layers),
            jnp.asarray([rotations.index(c.rope_of(kind)) for kind in c.kinds]),
            jnp.asarray([kind == WINDOW for kind in c.kinds]),
            adaptation._replace(prompt=None, tower=None),
        )
        carry = (x, None if cache is None else (cache.key, cache.value))
        (x, kv), _ = self.layers(carry, layers, around)
        if cache is not None:
            cache = Cache(*kv, all_segments, cache.length.at[rows].add(num_valid(segments), mode="drop"))
        return self.norm(x), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits in float32: [..., D] → [..., V]."""
        logits = self.embed_tokens.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        return soft_cap(logits.astype(jnp.float32), self.config.logit_softcap)

    def logits(self, *args, **kwargs) -> tuple[jax.Array, Cache | None]:
        """Logits of every position, [B, T, V]: for small inputs; training asks only where there is a target."""
        hidden, cache = self(*args, **kwargs)
        return self.unembed(hidden), cache


def prefill(
    decoder: Decoder,
    weights: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    adaptation: Adaptation,
    branches: jax.Array | None = None,
    visual: ImageFeatures | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Reads packed rows, and gives what later tokens need of them: see `sqa_jax.models.api.prefill`."""
    (hidden, _), kept = decoder.apply(
        {"params": weights}, tokens, positions, segments, adaptation, branches=branches, visual=visual, mutable=["read"]
    )
    (key,), (value,) = (kept["read"]["layers"]["self_attn"][name] for name in ("key", "value"))
    return hidden, key, value, jnp.ones_like(segments)
