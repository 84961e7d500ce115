"""One tiny model of each family and option, as transformers makes it: what parity tests are run on."""

from __future__ import annotations

import torch
import transformers

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


def make_model(family: str, **options) -> torch.nn.Module:
    """A random PyTorch model, away from the uniform start, so that a mix-up of two tensors shows.

    Layers say more than embeddings, so that greedy texts depend on the whole prompt and do not repeat one token.
    """
    torch.manual_seed(0)
    if family == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5 | options)).eval()
    else:
        config = transformers.CONFIG_MAPPING[family](**SIZES | options)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    layers = 0.1 if family == "t5" else 0.25  # T5 does not divide attention's scores by the heads' width
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.2 if "norm" in name or "bias" in name else 0.05 if "embed" in name else layers
            p.add_(torch.randn_like(p) * spread)
        if family == "t5":
            model.shared.weight.mul_(0.05)
    return model
