"""The options of the decoder, read from the formats in which models are published."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.students import t5_config
from sqa_jax.students.t5_config import T5Config

# Architectures of Hugging Face's config.json and of GGUF files that this decoder computes exactly.
SUPPORTED = ("llama",)


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
      rope_theta: base of the rotary frequencies.
      norm_epsilon: of the RMS norms.
      tie_embeddings: the output layer is the transposed embedding table.
      attention_bias: biases on q, k and v (and o).
      mlp_bias: biases in the MLP.
      max_positions: longest sequence that the model was made for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048

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


StudentConfig = DecoderConfig | T5Config


def from_hf(raw: dict[str, Any], where: str) -> StudentConfig:
    """A student's options from Hugging Face's `config.json`.

    Raises:
      UserError: the architecture, rope type, activation or quantization is not supported, a key is missing, or
        the sizes contradict each other.
    """
    if raw.get("model_type") == "t5":
        return t5_config.from_hf(raw, where)
    _check_architecture(raw.get("model_type"), where, (*SUPPORTED, "t5"))
    # transformers 5 writes rope_parameters, earlier versions rope_scaling and rope_theta.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{where}: rope type {rope_type!r} is not supported; supported: default")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: a rotary embedding of a part of the head is not supported; choose another student")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: activation {raw['hidden_act']!r} is not supported; supported: silu")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise UserError(
            f"{where}: weights quantized with {method!r} are not supported; use the original weights or a .gguf file"
        )
    try:
        config = DecoderConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            norm_epsilon=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            max_positions=raw.get("max_position_embeddings", 2048),
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; fetch the model's config.json again") from None
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(
            f"{where}: a size in it is not a positive number; fetch the model's config.json again"
        ) from None
    return _checked(config, where)


def to_hf(config: StudentConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads as the same model."""
    if isinstance(config, T5Config):
        return t5_config.to_hf(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def from_gguf(metadata: dict[str, Any], tensors: Collection[str], where: str) -> DecoderConfig:
    """The decoder's options from a GGUF file's metadata (keys such as `llama.block_count`).

    Args:
      metadata: keys and values.
      tensors: Hugging Face's names of the file's tensors: ties and biases are not among the keys.
      where: the file, for messages.

    Raises:
      UserError: the architecture or an option is not supported, a key is missing, or the sizes contradict each other.
    """
    architecture = metadata.get("general.architecture")
    _check_architecture(architecture, where)

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise UserError(f"{where}: key {architecture}.{key} is missing; the file is damaged, fetch it again")
        return value

    scaling = get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        # Only llama3's scaling comes as a tensor.
        found = "llama3" if scaling == "none" else scaling
        raise UserError(f"{where}: rope type {found!r} is not supported; supported: none")
    if get("expert_count", 0):
        raise UserError(f"{where}: a mixture of experts is not supported; choose a dense student")
    try:
        heads, hidden = get("attention.head_count"), get("embedding_length")
        config = DecoderConfig(
            vocab_size=get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None),
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length"),
            num_layers=get("block_count"),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=get("attention.key_length", hidden // heads),
            rope_theta=float(get("rope.freq_base", 10000.0)),
            norm_epsilon=float(get("attention.layer_norm_rms_epsilon")),
            tie_embeddings="lm_head.weight" not in tensors,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in tensors,
            max_positions=get("context_length"),
        )
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(
            f"{where}: a size in its metadata is not a positive number; the file is damaged, fetch it again"
        ) from None
    if get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise UserError(f"{where}: a rotary embedding of a part of the head is not supported; choose another student")
    return _checked(config, where)


def _check_architecture(architecture: str | None, where: str, supported: tuple[str, ...] = SUPPORTED) -> None:
    if architecture not in supported:
        raise UserError(f"{where}: architecture {architecture!r} is not supported; supported: {', '.join(supported)}")


def _checked(config: DecoderConfig, where: str) -> DecoderConfig:
    kinds = {"int": int, "float": (int, float)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in kinds and (isinstance(value, bool) or not isinstance(value, kinds[field.type]) or value <= 0):
            raise UserError(
                f"{where}: {field.name} is {value!r}, which is not a positive number; fetch the model again"
            )
    queries, keys = config.num_heads, config.num_kv_heads
    if queries % keys:
        raise UserError(
            f"{where}: {queries} query heads cannot share {keys} key/value heads evenly; fetch the model again"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{where}: head width {config.head_dim} is odd and cannot be rotated in pairs; fetch the model again"
        )
    return config
