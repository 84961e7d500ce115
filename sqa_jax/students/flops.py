"""Floating-point operations of a decoder, counted from its shape: a multiply-add is two.

Model operations as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): matrix products and attention
scores; norms, rotations and what rematerialisation computes twice are left out.
"""

from __future__ import annotations

from sqa_jax.students.config import DecoderConfig


def forward_flops(config: DecoderConfig, tokens: float, context: float, logits: float) -> float:
    """Operations of a forward pass.

    Args:
      tokens: that are read.
      context: mean number of keys that a token sees; half its length for a causal sequence.
      logits: positions at which logits are computed.
    """
    linear = sum(rows * columns for _, rows, columns in config.linear_shapes().values())
    attention = 2 * context * config.num_heads * config.head_dim  # scores, and the values that they weigh
    return 2 * (tokens * config.num_layers * (linear + attention) + logits * config.hidden_size * config.vocab_size)


def training_flops(
    config: DecoderConfig, methods: tuple[str, ...], trained: int, tokens: float, context: float, targets: float
) -> float:
    """Operations of forward and backward passes.

    The backward pass takes the gradient of every product's input, as many operations as the forward pass; the
    gradient of the weights, as many again, is taken of trained weights only.

    Args:
      methods: `config.adapter.methods`.
      trained: parameters of the adapter.
      targets: tokens that are learned.
    """
    forward = forward_flops(config, tokens, context, targets)
    if "full" in methods:
        return 3 * forward
    # A low-rank pair meets every token; the places of a prefix or soft prompt are counted in tokens and context.
    return 2 * forward + (6 * tokens * trained if "lora" in methods else 0)
