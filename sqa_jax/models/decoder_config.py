"""Configuration of the decoder: every option in which the families differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from sqa_jax.errors import UserError
from sqa_jax.models.rope_frequencies import Rope
from sqa_jax.models.validation import check_numbers

if TYPE_CHECKING:
    from sqa_jax.models.vision.registry import VisionConfig

# Kinds of layers: full attention, sliding-window attention, and full attention without position embeddings (NoPE).
FULL, WINDOW, NOPE = "full", "window", "nope"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder-only transformer.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: D, width of the residual stream.
      intermediate_size: F, width of the gated MLP.
      num_layers: L.
      num_heads: H, query heads.
      num_kv_heads: K, key and value heads; H is a multiple of it (grouped-query attention).
      head_dim: d, width of one head.
      rope: rotary frequencies.
      norm_epsilon: of the RMS norms.
      tie_embeddings: the output layer is the transposed embedding table.
      qkv_bias, output_bias: biases on q, k and v, and on o.
      mlp_bias: biases in the MLP.
      max_positions: longest sequence that the model supports.
      family: the architecture's name in Hugging Face's `model_type`.
      activation: of the MLP's gate, silu or gelu_tanh.
      qk_norm: RMS norm of each head of queries and keys, before rotary embeddings.
      norm_offset: norms multiply by one plus their weight.
      sandwich_norms: norms after attention and MLP, too.
      embedding_scale: embeddings are multiplied by √D.
      query_scale: attention scores are divided by its square root; 0 is d.
      attention_softcap, logit_softcap: c of the soft cap c · tanh(x / c) of scores and logits; 0 is none.
      window: size of the sliding window, in keys, the query's position included.
      layer_types: of each layer "full", "window" or "nope"; () is all "full".
      local_rope: rotary frequencies of layers with a sliding window; None is the same.
      prefix_lm: attention is bidirectional within the prompt (prefix LM).
      first_position: of a sequence, for rotary embeddings.
      mrope_sections: pairs of a head that rotate by time, row and column (M-RoPE); () is none.
      vision: vision encoder and image preprocessing of a vision-language model; None for a text-only model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope = Rope()
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048
    family: str = "llama"
    activation: str = "silu"
    qk_norm: bool = False
    norm_offset: bool = False
    sandwich_norms: bool = False
    embedding_scale: bool = False
    query_scale: int = 0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    window: int = 0
    layer_types: tuple[str, ...] = ()
    local_rope: Rope | None = None
    prefix_lm: bool = False
    first_position: int = 0
    mrope_sections: tuple[int, ...] = ()
    vision: VisionConfig | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        return False

    @property
    def decoder_start(self) -> None:
        return None

    @property
    def bidirectional_prompt(self) -> bool:
        """Whether a prompt's states depend on all of it, so that no part of it can be cached alone."""
        return self.prefix_lm

    @property
    def stack_depths(self) -> tuple[int, ...]:
        """Layers of each stack."""
        return (self.num_layers,)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return self.layer_types or (FULL,) * self.num_layers

    def rope_of(self, kind: str) -> Rope | None:
        """The rotary frequencies of layers of a kind; None for those without (NoPE)."""
        return {FULL: self.rope, WINDOW: self.local_rope or self.rope, NOPE: None}[kind]

    @property
    def ropes(self) -> list[Rope | None]:
        """The different rotary frequencies of the layers."""
        return list(dict.fromkeys(map(self.rope_of, self.kinds)))

    def norms(self) -> tuple[str, ...]:
        """The norms of a layer's residual stream, under Hugging Face's names."""
        names = ("input_layernorm", "post_attention_layernorm")
        return (*names, "pre_feedforward_layernorm", "post_feedforward_layernorm") if self.sandwich_norms else names

    def bias(self, layer: str) -> bool:
        """Whether a linear layer has a bias."""
        return {"q_proj": self.qkv_bias, "k_proj": self.qkv_bias, "v_proj": self.qkv_bias, "o_proj": self.output_bias}.get(layer, self.mlp_bias)  # fmt: skip

    def linear_shapes(self) -> dict[str, tuple[str, int, int]]:
        """Of each linear layer of a block: its module, input width and output width."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": ("self_attn", d, q),
            "k_proj": ("self_attn", d, kv),
            "v_proj": ("self_attn", d, kv),
            "o_proj": ("self_attn", q, d),
            "gate_proj": ("mlp", d, f),
            "up_proj": ("mlp", d, f),
            "down_proj": ("mlp", f, d),
        }

    def as_stored(self, raw: dict[str, Any], tensors: Collection[str]) -> DecoderConfig:
        """The same: `config.json` says all of it."""
        return self

    def forward_flops(self, tokens: float, context: float, logits: float) -> float:
        """Floating-point operations of a forward pass, see `sqa_jax.models.flops.forward_flops`."""
        linear = sum(rows * columns for _, rows, columns in self.linear_shapes().values())
        attention = 2 * context * self.num_heads * self.head_dim  # scores, and the weighted sum of values
        return 2 * (tokens * self.num_layers * (linear + attention) + logits * self.hidden_size * self.vocab_size)


def checked(config: DecoderConfig, where: str) -> DecoderConfig:
    """The configuration, if its numbers are consistent; raises `UserError` where they are not."""
    check_numbers(config, where, ("query_scale", "attention_softcap", "logit_softcap", "window", "first_position"))
    queries, keys = config.num_heads, config.num_kv_heads
    if queries % keys:
        raise UserError(
            f"{where}: {queries} query heads cannot share {keys} key/value heads evenly; fetch the model again"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{where}: head width {config.head_dim} is odd and cannot be rotated in pairs; fetch the model again"
        )
    if len(config.kinds) != config.num_layers:
        raise UserError(
            f"{where}: lists the types of {len(config.kinds)} layers, but has {config.num_layers}; fetch the model again"
        )
    if WINDOW in config.kinds and not config.window:
        raise UserError(f"{where}: has layers with a sliding window, but no sliding_window; fetch the model again")
    return config
