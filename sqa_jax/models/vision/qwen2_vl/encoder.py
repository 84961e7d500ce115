"""Qwen2-VL's vision encoder: a transformer over the patches of images of any size, without a class token.

Shapes in comments: B rows, N patches of a row, P deep prompts, E the encoder's width, d a head's width, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sqa_jax.models.layers.blockwise_attention import blockwise_attention
from sqa_jax.models.layers.linear import Linear, constrain_batch_sharding, scan_layers
from sqa_jax.models.layers.rope import apply_rope, rope_sin_cos
from sqa_jax.models.rope_frequencies import Rope
from sqa_jax.models.segments import GLOBAL_SEGMENT
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.image_input import ImagePatches
from sqa_jax.models.vision.qwen2_vl.config import Qwen2VLVision


class AttentionContext(NamedTuple):
    """Rotary positions and attention mask, which all layers share.

    Attributes:
      sin, cos: of prompts and patches, S = P + N; prompts have no position.
      mask: which keys each patch attends to.
    """

    sin: Float[Array, "B S half_head"]
    cos: Float[Array, "B S half_head"]
    mask: Bool[Array, "B N S"]


class PatchEmbedding(nn.Module):
    """Patch embedding: a convolution of patches that do not overlap is a matrix product."""

    vision: Qwen2VLVision
    dtype: Any

    @nn.compact
    def __call__(self, patches: Float[Array, "B N values"]) -> Float[Array, "B N E"]:
        E = self.vision.embed_dim
        kernel = self.param("kernel", nn.initializers.normal(0.02), (E, *self.vision.patch_shape))
        return patches.astype(self.dtype) @ kernel.reshape(E, -1).T.astype(self.dtype)


class Block(nn.Module):
    """One pre-norm layer, in the form that `nn.scan` wants: (carry, this layer's inputs, inputs of all layers)."""

    vision: Qwen2VLVision
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x, adapter: VisionAdapter, context: AttentionContext):
        v, lora, prompts = self.vision, adapter.lora or {}, adapter.prompts
        dtype, dropout = self.compute.dtype, self.compute.lora_dropout
        x, (B, N, E) = constrain_batch_sharding(x, self.compute.batch_sharding), x.shape

        def linear(name, y):
            _, _, features = v.linear_shapes()[name]
            return Linear(features, True, dtype, dropout, name=name)(y, lora.get(name))

        keys = x
        if prompts is not None:  # a layer's outputs for them are dropped, so they are only attended to
            prompts = jnp.broadcast_to(prompts.astype(x.dtype), (B, *prompts.shape))
            keys = jnp.concatenate([prompts, x], axis=1)
        heads = linear("qkv", _norm(dtype, "norm1")(keys)).reshape(B, -1, 3, v.num_heads, v.head_dim)
        query, key = (apply_rope(heads[:, :, part], context.sin, context.cos) for part in (0, 1))
        out = blockwise_attention(query[:, -N:], key, heads[:, :, 2], context.mask, causal=False)
        x += linear("proj", out.reshape(B, N, E))
        y = linear("fc1", _norm(dtype, "norm2")(x))
        # The quick form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2).
        return x + linear("fc2", y * nn.sigmoid(1.702 * y)), None


class Merger(nn.Module):
    """The connector: each square of patches becomes a feature, [B, N, E] → [B, N / merge², D]."""

    vision: Qwen2VLVision
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"], adapter: VisionAdapter) -> Float[Array, "B F D"]:
        B, N, E = x.shape
        count = self.vision.merge**2

        def linear(name, features, y):
            layer = Linear(features, True, self.compute.dtype, self.compute.lora_dropout, name=name)
            return layer(y, adapter.connector_lora(f"merger.{name}"))

        x = _norm(self.compute.dtype, "norm")(x).reshape(B, N // count, count * E)
        x = nn.gelu(linear("fc1", count * E, x), approximate=False)
        return linear("fc2", self.vision.width, x)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    """Mean and variance are float32; the fast formula for the variance loses digits where the mean is large."""
    return nn.LayerNorm(1e-6, dtype=dtype, use_fast_variance=False, name=name)


class Qwen2VLVisionEncoder(nn.Module):
    """Vision transformer and merger; their parameters are at "vision"."""

    vision: Qwen2VLVision
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B N values"],
        coordinates: Int[Array, "B N 2"],
        image_ids: Int[Array, "B N"],
        adapter: VisionAdapter = NO_VISION_ADAPTER,
    ) -> Float[Array, "B F D"]:
        """The features of packed rows of patches, each row of one or several images and padding.

        Attention is bidirectional among the patches of an image, and masked between images.

        Args:
          patches: normalized values of each, in the order of `PreprocessedImage.pieces`; N is a multiple of merge².
          coordinates: row and column of each patch in its image.
          image_ids: 1, 2, … for the images of a row, 0 for padding.
          adapter: its prompts have no position, and the patches of every image attend to them.

        Returns:
          F = N / merge² features in `dtype`; those of padding are arbitrary.
        """
        v = self.vision
        P = 0 if adapter.prompts is None else adapter.prompts.shape[1]
        # Half of a head's pairs are rotated by the row, the others by the column.
        sides = (rope_sin_cos(coordinates[..., axis], v.head_dim // 2, Rope(v.rope_theta)) for axis in (0, 1))
        sin, cos = (jnp.concatenate(parts, axis=-1) for parts in zip(*sides, strict=True))
        before = ((0, 0), (P, 0), (0, 0))
        keys = jnp.pad(image_ids, before[:2], constant_values=GLOBAL_SEGMENT)[:, None]
        mask = (keys == image_ids[:, :, None]) | (keys == GLOBAL_SEGMENT)
        context = AttentionContext(jnp.pad(sin, before), jnp.pad(cos, before, constant_values=1), mask)
        x = PatchEmbedding(v, self.compute.dtype, name="patch_embed")(patches)
        layers = scan_layers(Block, v.depth, self.compute.remat)(v, self.compute, name="blocks")
        x, _ = layers(x, adapter._replace(connector=None), context)
        return Merger(v, self.compute, name="merger")(x, adapter)


def encode_images(
    vision: Qwen2VLVision,
    params: Any,
    inputs: ImagePatches,
    compute: ComputeConfig,
    adapter: VisionAdapter,
    dropout: jax.Array | None,
) -> Float[Array, "B F D"]:
    """The features of a batch's rows: see `sqa_jax.models.vision.encode.encode_images`."""
    B, n, block, *patch = inputs.pixels.shape
    colours = jnp.moveaxis(vision.pixels.normalize(jnp.moveaxis(inputs.pixels, 3, -1)), -1, 3)
    frames = colours.reshape(B, n * block, patch[0], 1, -1).repeat(vision.temporal_patch_size, axis=3)
    encoder = Qwen2VLVisionEncoder(vision, compute)
    features = encoder.apply(
        {"params": params}, frames.reshape(B, n * block, -1), inputs.coordinates, inputs.image_ids, adapter,
        rngs=None if dropout is None else {"dropout": dropout},
    )  # fmt: skip
    assert isinstance(features, jax.Array)
    return features
