"""A decoder's configuration from a GGUF file's metadata.

llama.cpp writes only a part of a family's differences into the file; the rest is fixed by the architecture in its
source (src/models, `load_arch_hparams`), and here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sqa_jax.checkpoints.gguf.source import GGUFSource
from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import FULL, NOPE, WINDOW, DecoderConfig, checked
from sqa_jax.models.rope_frequencies import Rope

_GEMMA = {"activation": "gelu_tanh", "norm_offset": True, "embedding_scale": True}
# By llama.cpp's names of architectures: fields that differ from a Llama's.
_FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"qk_norm": True},
    "smollm3": {},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"sandwich_norms": True},
    "gemma3": _GEMMA | {"sandwich_norms": True, "qk_norm": True, "family": "gemma3_text"},
}
# (n, type of most layers, type of every n-th)
_PATTERNS = {"smollm3": (4, FULL, NOPE), "gemma2": (2, WINDOW, FULL), "gemma3": (6, WINDOW, FULL)}
_WINDOWED = ("gemma2", "gemma3")
# Older files of Gemma 2 lack these keys.
_DEFAULTS = {
    "gemma2": {
        "attention.sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
}
# Number of layers of the 27B models, whose q·k is scaled by the residual stream's width per head, not by the head's.
_WIDE_QUERIES = {("gemma2", 46), ("gemma3", 62)}


def from_gguf(source: GGUFSource) -> DecoderConfig:
    """The decoder's configuration from a GGUF file's metadata (keys such as `llama.block_count`) and tensors.

    Raises:
      UserError: the architecture or an option is not supported, a key is missing, or the sizes contradict each other.
    """
    where, tensors = source.where, source.shapes
    architecture = source.metadata.get("general.architecture")
    if architecture not in _FAMILY_FIELDS:
        raise UserError(
            f"{where}: architecture {architecture!r} is not supported; supported: {', '.join(_FAMILY_FIELDS)}"
        )

    def get(key: str, default: Any = None) -> Any:
        default = _DEFAULTS.get(architecture, {}).get(key, default)
        value = source.metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise UserError(f"{where}: key {architecture}.{key} is missing; the file is damaged, fetch it again")
        return value

    if get("expert_count", 0):
        raise UserError(f"{where}: a mixture of experts is not supported; choose a dense student")
    try:
        heads, hidden, layers = get("attention.head_count"), get("embedding_length"), get("block_count")
        if layers > len(tensors):  # before a list with an entry for each is built
            raise UserError(f"{where}: {len(tensors)} tensors cannot be {layers} layers; fetch it again")
        head_dim = get("attention.key_length", hidden // heads)
        window = get("attention.sliding_window", 0) if architecture in _WINDOWED else 0
        fields: dict[str, Any] = {"family": architecture, **_FAMILY_FIELDS[architecture]}
        config = DecoderConfig(
            **fields,
            vocab_size=get("vocab_size", len(source.metadata.get("tokenizer.ggml.tokens", ())) or None),
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope=_rope(source, float(get("rope.freq_base", 10000.0)), head_dim, get),
            local_rope=Rope(float(get("rope.freq_base_swa", 10000.0))) if architecture == "gemma3" and window else None,
            norm_epsilon=float(get("attention.layer_norm_rms_epsilon")),
            tie_embeddings="lm_head.weight" not in tensors,
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
            output_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in tensors,
            attention_softcap=float(get("attn_logit_softcapping", 0.0)),
            logit_softcap=float(get("final_logit_softcapping", 0.0)),
            query_scale=hidden // heads if (architecture, layers) in _WIDE_QUERIES else 0,
            window=window,
            layer_types=_layer_types(architecture, layers, window),
            max_positions=get("context_length"),
        )
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(
            f"{where}: a size in its metadata is not a positive number; the file is damaged, fetch it again"
        ) from None
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{where}: a rotary embedding of a part of the head is not supported; choose another student")
    return checked(config, where)


def _layer_types(architecture: str, layers: int, window: int) -> tuple[str, ...]:
    if architecture not in _PATTERNS or (architecture in _WINDOWED and not window):
        return ()
    period, usual, nth = _PATTERNS[architecture]
    return tuple(usual if (i + 1) % period else nth for i in range(layers))


def _rope(source: GGUFSource, theta: float, head_dim: int, get: Callable[..., Any]) -> Rope:
    """The rotary frequencies of the layers with full attention.

    Of Llama 3's scaling llama.cpp stores only the divisor of each frequency.
    """
    kind, divisors = get("rope.scaling.type", "none"), source.rope_divisors
    if divisors is not None and kind == "none":
        # All of Meta's models have the defaults of the other parameters.
        rope = Rope(theta, "llama3", factor=max(1.0, float(divisors.max())))
        expected = rope.divisors(head_dim)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise UserError(
                f"{source.where}: tensor rope_freqs.weight is not Llama 3's scaling by {rope.factor:g} of frequencies of "
                f"base {theta:g}, which is the only one that is supported; use the model's Hugging Face directory"
            )
        return rope
    if divisors is None and kind == "linear":
        return Rope(theta, "linear", factor=float(get("rope.scaling.factor")))
    if kind != "none":
        raise UserError(f"{source.where}: rope type {kind!r} is not supported; supported: none, linear, llama3")
    return Rope(theta)
