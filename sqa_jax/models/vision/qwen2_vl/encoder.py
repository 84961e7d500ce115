"""Qwen2-VL's vision tower: a transformer over the patches of pictures of any size, without a class token.

Shapes in comments: B rows, N patches of a row, P prompts, E the tower's width, d a head's width, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sqa_jax.models.decoder_config import Rope
from sqa_jax.models.layers.attention import apply_rope, rope_sin_cos
from sqa_jax.models.layers.blockwise_attention import blockwise_attention
from sqa_jax.models.layers.linear import Linear, constrain_batch_sharding, scan_layers
from sqa_jax.models.segments import GLOBAL_SEGMENT
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.image_input import ImagePatches
from sqa_jax.models.vision.qwen2_vl.config import Qwen2VLVision


class AttentionContext(NamedTuple):
    """What all layers share of the patches that are read.

    Attributes:
      sin, cos: [B, P + N, d/2]; prompts are not turned.
      visible: [B, N, P + N].
    """

    sin: jax.Array
    cos: jax.Array
    visible: jax.Array


class PatchEmbedding(nn.Module):
    """[B, N, numbers of a patch] → [B, N, E]: a convolution of patches that do not overlap is a matrix product."""

    vision: Qwen2VLVision
    dtype: Any

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        E = self.vision.embed_dim
        kernel = self.param("kernel", nn.initializers.normal(0.02), (E, *self.vision.patch_shape))
        return patches.astype(self.dtype) @ kernel.reshape(E, -1).T.astype(self.dtype)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` wants: (carry, this layer's inputs, what all layers share)."""

    vision: Qwen2VLVision
    how: ComputeConfig

    @nn.compact
    def __call__(self, x, adaptation: VisionAdapter, around: AttentionContext):
        v, lora, prompts, (dtype, _, dropout, _) = self.vision, adaptation.lora or {}, adaptation.prompts, self.how
        x, (B, N, E) = constrain_batch_sharding(x, self.how.rows), x.shape

        def linear(name, y):
            _, _, features = v.linear_shapes()[name]
            return Linear(features, True, dtype, dropout, name=name)(y, lora.get(name))

        seen = x
        if prompts is not None:  # what a layer makes of them is dropped, so they are only seen
            prompts = jnp.broadcast_to(prompts.astype(x.dtype), (B, *prompts.shape))
            seen = jnp.concatenate([prompts, x], axis=1)
        heads = linear("qkv", _norm(dtype, "norm1")(seen)).reshape(B, -1, 3, v.num_heads, v.head_dim)
        query, key = (apply_rope(heads[:, :, part], around.sin, around.cos) for part in (0, 1))
        out = blockwise_attention(query[:, -N:], key, heads[:, :, 2], around.visible, causal=False)
        x += linear("proj", out.reshape(B, N, E))
        y = linear("fc1", _norm(dtype, "norm2")(x))
        # The quick form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2).
        return x + linear("fc2", y * nn.sigmoid(1.702 * y)), None


class Merger(nn.Module):
    """Squares of patches as features: [B, N, E] → [B, N / merge², D]."""

    vision: Qwen2VLVision
    how: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array, adaptation: VisionAdapter) -> jax.Array:
        B, N, E = x.shape
        count = self.vision.merge**2

        def linear(name, features, y):
            layer = Linear(features, True, self.how.dtype, self.how.lora_dropout, name=name)
            return layer(y, adaptation.connects(f"merger.{name}"))

        x = _norm(self.how.dtype, "norm")(x).reshape(B, N // count, count * E)
        x = nn.gelu(linear("fc1", count * E, x), approximate=False)
        return linear("fc2", self.vision.width, x)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    """Mean and variance are float32; the fast formula for the variance loses digits where the mean is large."""
    return nn.LayerNorm(1e-6, dtype=dtype, use_fast_variance=False, name=name)


class Qwen2VLVisionEncoder(nn.Module):
    """Vision tower and merger, with the parameters at "vision"; `how` is how they compute."""

    vision: Qwen2VLVision
    how: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        patches: jax.Array,
        coordinates: jax.Array,
        segments: jax.Array,
        adaptation: VisionAdapter = NO_VISION_ADAPTER,
    ) -> jax.Array:
        """The features of rows of patches, each row of one or several pictures and padding.

        Patches see those of their own picture, in both directions.

        Args:
          patches: [B, N, numbers of a patch], in the order of `Picture.pieces`; N is a multiple of merge².
          coordinates: [B, N, 2] row and column of each patch in its picture.
          segments: [B, N], 1, 2, … for the pictures of a row, 0 for padding.
          adaptation: its prompts have no position, and the patches of every picture see them.

        Returns:
          [B, N / merge², D] in `dtype`; those of padding mean nothing.
        """
        v = self.vision
        P = 0 if adaptation.prompts is None else adaptation.prompts.shape[1]
        # Half of a head's pairs turn by the row, the others by the column.
        sides = (rope_sin_cos(coordinates[..., axis], v.head_dim // 2, Rope(v.rope_theta)) for axis in (0, 1))
        sin, cos = (jnp.concatenate(parts, axis=-1) for parts in zip(*sides, strict=True))
        before = ((0, 0), (P, 0), (0, 0))
        keys = jnp.pad(segments, before[:2], constant_values=GLOBAL_SEGMENT)[:, None]
        visible = (keys == segments[:, :, None]) | (keys == GLOBAL_SEGMENT)
        around = AttentionContext(jnp.pad(sin, before), jnp.pad(cos, before, constant_values=1), visible)
        x = PatchEmbedding(v, self.how.dtype, name="patch_embed")(patches)
        layers = scan_layers(Block, v.depth, self.how.remat)(v, self.how, name="blocks")
        x, _ = layers(x, adaptation._replace(connector=None), around)
        return Merger(v, self.how, name="merger")(x, adaptation)


def encode_images(
    vision: Qwen2VLVision,
    params: Any,
    inputs: ImagePatches,
    how: ComputeConfig,
    adaptation: VisionAdapter,
    dropout: jax.Array | None,
) -> jax.Array:
    """The features of a batch's rows: see `sqa_jax.models.vision.encode.encode_images`.

    Args:
      inputs: patches of a batch's rows.
    """
    B, n, squares, *patch = inputs.pixels.shape
    colours = jnp.moveaxis(vision.pixels.normalised(jnp.moveaxis(inputs.pixels, 3, -1)), -1, 3)
    frames = colours.reshape(B, n * squares, patch[0], 1, -1).repeat(vision.temporal_patch_size, axis=3)
    tower = Qwen2VLVisionEncoder(vision, how)
    return tower.apply(
        {"params": params}, frames.reshape(B, n * squares, -1), inputs.coordinates, inputs.image_ids, adaptation,
        rngs=None if dropout is None else {"dropout": dropout},
    )  # fmt: skip
