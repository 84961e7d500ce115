"""One tiny random checkpoint of each family and option, in transformers' format: what parity tests are run on.

Writing one needs no PyTorch: `config.json` is written by transformers' configuration classes, and `model.safetensors`
holds random NumPy tensors with the names and shapes of `sqa_jax.models.params.param_specs`. Reading one with
PyTorch fails if the model has another tensor than the file.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import transformers
from safetensors.numpy import save_file

from sqa_jax.checkpoints.hf_config import from_hf
from sqa_jax.checkpoints.safetensors_source import read_hf_config
from sqa_jax.models.params import param_specs, published_name

if TYPE_CHECKING:
    import torch

SIZES = dict(
    vocab_size=264, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)  # fmt: skip
# Windows of five keys, shorter than every sequence of the tests, and layers of each kind.
WINDOWED = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
BOUNDED = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
TWO_ROPES = {
    "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}
FAMILIES = {
    "llama": ("llama", dict(tie_word_embeddings=True, rope_theta=5000.0)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "gemma": ("gemma", dict(num_key_value_heads=1, head_dim=16)),
    "gemma2": ("gemma2", dict(head_dim=16, query_pre_attn_scalar=40, **BOUNDED, **WINDOWED)),
    "gemma3": ("gemma3_text", dict(head_dim=16, query_pre_attn_scalar=20, **WINDOWED)),
}
ENCODER_DECODERS = {"t5": ("t5", {})}
# Options that a family has besides.
VARIANTS = {
    "llama, multi-head": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama, biases, one kv head": ("llama", dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=24)),
    "llama 3": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama, linear rope": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))),
    "qwen2, windows": ("qwen2", dict(use_sliding_window=True, max_window_layers=1, sliding_window=5)),
    "gemma3, linear rope": ("gemma3_text", dict(head_dim=16, rope_parameters=TWO_ROPES, **WINDOWED)),
}  # fmt: skip
T5 = dict(
    vocab_size=264, d_model=48, d_kv=10, d_ff=80, num_layers=2, num_decoder_layers=2, num_heads=4,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
)  # fmt: skip


def hf_config(kind: str, **options) -> transformers.PretrainedConfig:
    """transformers' configuration of a tiny model; importing and building it needs no PyTorch.

    Args:
      kind: transformers' `model_type`, such as "gemma2".
      options: override those that all tiny models share.
    """
    sizes = T5 if kind == "t5" else SIZES
    return transformers.CONFIG_MAPPING[kind](**sizes | options)


def write_checkpoint(directory: str | Path, kind: str | transformers.PretrainedConfig, **options) -> Path:
    """Writes `config.json` and `model.safetensors` with random tensors; the same arguments give the same file.

    Args:
      kind: transformers' `model_type`, whose tiny configuration is used with `options`; or a whole configuration, such
        as a vision-language model's.
    """
    config = hf_config(kind, **options) if isinstance(kind, str) else kind
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    save_file(random_tensors(directory), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def random_tensors(directory: str | Path) -> dict[str, np.ndarray]:
    """Random float32 tensors for the `config.json` in `directory`, by their published names.

    They are far from what models start from, so that a mix-up of two tensors shows. Layers have a larger effect than
    embeddings, so that greedy texts depend on the whole prompt and do not repeat one token.
    """
    raw = read_hf_config(directory)
    config = from_hf(raw, f"{directory}/config.json").as_stored(raw, ())
    tensors = {}
    for spec in param_specs(config):
        for name in spec.names:
            name = published_name(config, name)
            rng = np.random.default_rng([0, zlib.crc32(name.encode())])
            values = rng.normal(0, _spread(name, config), spec.file_shape)
            if _is_norm(name) and name.endswith("weight") and not (config.norm_offset and "vision" not in name):
                values += 1
            tensors[name] = values.astype(np.float32)
    return tensors


def _is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def _spread(name: str, config) -> float:
    """Standard deviation of a tensor's values."""
    if config.is_encoder_decoder:  # attention scores are not divided by √d
        spreads = {"norm": 0.2, "relative_attention_bias": 0.25, "shared": 0.05, "lm_head": 1.0, "SelfAttention": 0.15}
        return next((spread for part, spread in spreads.items() if part in name), 0.18)
    if config.vision is not None:
        return 0.01 if "embed_tokens" in name else 0.2
    return 0.2 if _is_norm(name) or name.endswith("bias") else 0.05 if "embed" in name else 0.25


def torch_model(directory: str | Path) -> torch.nn.Module:
    """The checkpoint as transformers loads it with PyTorch, with plain attention, for inference.

    Raises:
      AssertionError: a tensor of the model is not in the file, or one of the file is not in the model.
    """
    config = read_hf_config(directory)
    if config.get("is_encoder_decoder"):
        auto = transformers.AutoModelForSeq2SeqLM
    else:
        auto = (
            transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
        )
    model, report = auto.from_pretrained(directory, attn_implementation="eager", output_loading_info=True)
    faults = {key: value for key, value in report.items() if value}
    assert not faults, f"{directory}: {faults}"
    return model.eval()
