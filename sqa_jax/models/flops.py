"""Floating-point operations (FLOPs) of a model, from its shape: a multiply-add is two.

Model operations as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): matrix products and attention
scores; norms, rotary embeddings and recomputation (remat) are left out.
"""

from __future__ import annotations

import math

from sqa_jax.models.student_config import StudentConfig
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision
from sqa_jax.models.vision.registry import VisionConfig


def forward_flops(config: StudentConfig, tokens: float, context: float, logits: float) -> float:
    """Operations of a forward pass.

    Args:
      tokens: that are processed.
      context: mean number of keys that a token attends to; half the length of a causal sequence.
      logits: positions at which logits are computed. Of an encoder–decoder, the decoder processes as many tokens, and
        the encoder the others.
    """
    return config.forward_flops(tokens, context, logits)


def vision_flops(vision: VisionConfig, features: float, features_per_image: float) -> float:
    """Operations of a vision encoder and its connector.

    Args:
      features: that they compute.
      features_per_image: mean number of features of an image, within which patches attend to each other. Encoders of
        tiles use the number of a tile instead.
    """
    if isinstance(vision, Qwen2VLVision):
        width, layers, shapes, patches = vision.embed_dim, vision.depth, vision.linear_shapes(), vision.merge**2
        embedded, connected = math.prod(vision.patch_shape), (patches * width) * (patches * width + vision.width)
    else:
        encoder = vision.encoder
        width, layers, shapes = encoder.hidden_size, encoder.num_layers, encoder.linear_shapes()
        features_per_image = vision.features_per_piece
        patches = encoder.patches_per_side**2 / features_per_image  # of a feature
        embedded, connected = 3 * encoder.patch_size**2, patches * width * vision.width
    linear = embedded * width + layers * sum(rows * columns for _, rows, columns in shapes.values())
    attention = layers * 2 * patches * features_per_image * width  # scores, and the weighted sum of values
    return 2 * features * (patches * (linear + attention) + connected)


def training_flops(
    config: StudentConfig,
    methods: tuple[str, ...],
    trained: int,
    tokens: float,
    context: float,
    targets: float,
    vision: float = 0.0,
    through_vision: bool = False,
) -> float:
    """Operations of forward and backward passes.

    The backward pass takes the gradient of every product's input, as many operations as the forward pass; the
    gradient of the weights, as many again, is taken of trained weights only.

    Args:
      methods: `config.adapter.methods`.
      trained: parameters of the adapter.
      targets: target tokens.
      vision: operations of the vision encoder's forward pass; 0 where features are computed beforehand.
      through_vision: whether gradients flow through the vision encoder.
    """
    forward = forward_flops(config, tokens, context, targets)
    if "full" in methods:
        return 3 * (forward + vision)
    # LoRA's pairs are applied to every token (of an encoder–decoder to fewer, so that this is a bound); a prefix or soft
    # prompt is counted in tokens and context.
    return 2 * forward + (1 + through_vision) * vision + (6 * tokens * trained if "lora" in methods else 0)
