"""Floating-point operations of a student, counted from its shape: a multiply-add is two.

Model operations as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): matrix products and attention
scores; norms, rotations and what rematerialisation computes twice are left out.
"""

from __future__ import annotations

import math

from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.t5.config import T5Config
from sqa_jax.models.vision.qwen2_vl import Qwen2VLVision
from sqa_jax.models.vision.registry import Vision


def forward_flops(config: StudentConfig, tokens: float, context: float, logits: float) -> float:
    """Operations of a forward pass.

    Args:
      tokens: that are read.
      context: mean number of keys that a token sees; half its length for a causal sequence.
      logits: positions at which logits are computed. Of an encoder–decoder, the decoder reads as many tokens, and the
        encoder the rest.
    """
    if isinstance(config, T5Config):
        return _t5_forward_flops(config, tokens - logits, logits, 2 * context)
    linear = sum(rows * columns for _, rows, columns in config.linear_shapes().values())
    attention = 2 * context * config.num_heads * config.head_dim  # scores, and the values that they weigh
    return 2 * (tokens * config.num_layers * (linear + attention) + logits * config.hidden_size * config.vocab_size)


def vision_flops(vision: Vision, features: float, picture: float) -> float:
    """Operations of a vision tower and its connector.

    Args:
      features: that they make.
      picture: features of a picture on average, whose patches see each other; of a tile, where towers read tiles.
    """
    if isinstance(vision, Qwen2VLVision):
        width, layers, shapes, squares = vision.embed_dim, vision.depth, vision.linear_shapes(), vision.merge**2
        embedded, connected = math.prod(vision.patch_shape), (squares * width) * (squares * width + vision.width)
    else:
        tower = vision.tower
        width, layers, shapes = tower.hidden_size, tower.num_layers, tower.linear_shapes()
        picture = vision.features_of_piece
        squares = tower.side**2 / picture
        embedded, connected = 3 * tower.patch_size**2, squares * width * vision.width
    linear = embedded * width + layers * sum(rows * columns for _, rows, columns in shapes.values())
    attention = layers * 2 * squares * picture * width  # scores, and the values that they weigh
    return 2 * features * (squares * (linear + attention) + connected)


def _t5_forward_flops(config: T5Config, encoded: float, decoded: float, length: float) -> float:
    """Operations for tokens of encoder and decoder, of sequences of `length` tokens of both."""
    share = encoded / (encoded + decoded)
    linear = {"encoder": 0, "decoder": 0, "crossed": 0}  # weights that meet tokens of one, the other, or lead across
    for name, (module, rows, columns) in config.linear_shapes().items():
        across = module == "decoder.cross_attn" and name.endswith((".k", ".v"))
        linear["crossed" if across else module.split(".")[0]] += rows * columns
    heads = 2 * config.num_heads * config.head_dim  # scores, and the values that they weigh, for one key
    encoder = encoded * config.num_encoder_layers * (linear["encoder"] + heads * share * length)
    seen = share * length + (1 - share) * length / 2
    decoder = config.num_layers * (decoded * (linear["decoder"] + heads * seen) + encoded * linear["crossed"])
    return 2 * (encoder + decoder + decoded * config.hidden_size * config.vocab_size)


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
      through: whether a gradient goes through the tower.
    """
    forward = forward_flops(config, tokens, context, targets)
    if "full" in methods:
        return 3 * (forward + seen)
    # A low-rank pair meets every token (of an encoder–decoder fewer, so that this is a bound); the places of a prefix or soft prompt are counted in tokens and context.
    return 2 * forward + (1 + through) * seen + (6 * tokens * trained if "lora" in methods else 0)
