"""Floating-point operations of a student, counted from its shape: a multiply-add is two.

Model operations as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): matrix products and attention
scores; norms, rotations and what rematerialisation computes twice are left out.
"""

from __future__ import annotations

import math

from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision
from sqa_jax.models.vision.registry import VisionConfig


def forward_flops(config: StudentConfig, tokens: float, context: float, logits: float) -> float:
    """Operations of a forward pass.

    Args:
      tokens: that are read.
      context: mean number of keys that a token sees; half its length for a causal sequence.
      logits: positions at which logits are computed. Of an encoder–decoder, the decoder reads as many tokens, and the
        encoder the rest.
    """
    return config.forward_flops(tokens, context, logits)


def vision_flops(vision: VisionConfig, features: float, picture: float) -> float:
    """Operations of a vision tower and its connector.

    Args:
      features: that they make.
      picture: features of a picture on average, whose patches see each other; of a tile, where towers read tiles.
    """
    if isinstance(vision, Qwen2VLVision):
        width, layers, shapes, squares = vision.embed_dim, vision.depth, vision.linear_shapes(), vision.merge**2
        embedded, connected = math.prod(vision.patch_shape), (squares * width) * (squares * width + vision.width)
    else:
        encoder = vision.encoder
        width, layers, shapes = encoder.hidden_size, encoder.num_layers, encoder.linear_shapes()
        picture = vision.features_per_piece
        squares = encoder.patches_per_side**2 / picture
        embedded, connected = 3 * encoder.patch_size**2, squares * width * vision.width
    linear = embedded * width + layers * sum(rows * columns for _, rows, columns in shapes.values())
    attention = layers * 2 * squares * picture * width  # scores, and the values that they weigh
    return 2 * features * (squares * (linear + attention) + connected)


def training_flops(
    config: StudentConfig,
    methods: tuple[str, ...],
    trained: int,
    tokens: float,
    context: float,
    targets: float,
    seen: float = 0.0,
    through: bool = False,
) -> float:
    """Operations of forward and backward passes.

    The backward pass takes the gradient of every product's input, as many operations as the forward pass; the
    gradient of the weights, as many again, is taken of trained weights only.

    Args:
      methods: `config.adapter.methods`.
      trained: parameters of the adapter.
      targets: tokens that are learned.
      seen: operations in which the tower makes the tokens' features in the step; 0 where they are known.
      through: whether a gradient goes through the encoder.
    """
    forward = forward_flops(config, tokens, context, targets)
    if "full" in methods:
        return 3 * (forward + seen)
    # A low-rank pair meets every token (of an encoder–decoder fewer, so that this is a bound); the places of a prefix or soft prompt are counted in tokens and context.
    return 2 * forward + (1 + through) * seen + (6 * tokens * trained if "lora" in methods else 0)
