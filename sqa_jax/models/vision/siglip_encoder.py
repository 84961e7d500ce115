"""SigLIP's vision tower (Zhai et al. 2023, arXiv:2303.15343) in Flax Linen, and the connectors of PaliGemma and SmolVLM.

A vision transformer without a class token.

Shapes in comments: N tiles of S × S pixels, T patches of a tile, P prompts, D the tower's width, L layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sqa_jax.models.layers.linear import Linear, constrain_batch_sharding, scan_layers
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.image_input import ImageTiles
from sqa_jax.models.vision.paligemma import PaliGemmaVision
from sqa_jax.models.vision.siglip_config import SiglipConfig
from sqa_jax.models.vision.smolvlm import SmolVLMVision


class PatchEmbedding(nn.Module):
    """The patches of [N, S, S, 3] pixels as [N, T, D], row by row."""

    config: SiglipConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        # Files have a convolution (D, 3, rows, columns); ours is its transpose, so a patch is laid out by columns.
        shape = (c.patch_size, c.patch_size, 3, c.hidden_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (c.hidden_size,)).astype(self.dtype)
        seen = c.side * c.patch_size
        patches = pixels[:, :seen, :seen].astype(self.dtype).reshape(-1, c.side, c.patch_size, c.side, c.patch_size, 3)
        patches = patches.transpose(0, 1, 3, 4, 2, 5).reshape(len(pixels), c.side**2, -1)
        return patches @ kernel.reshape(-1, c.hidden_size) + bias


class Attention(nn.Module):
    """Attention of the patches [N, T, D] to all of `seen` [N, P + T, D], softmax in float32."""

    config: SiglipConfig
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array, lora: dict[str, Any]) -> jax.Array:
        H, D = self.config.num_heads, self.config.hidden_size

        def linear(name, y):
            return Linear(D, True, self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        def heads(name, y):
            return linear(name, y).reshape(*y.shape[:2], H, D // H)

        out = jax.nn.dot_product_attention(heads("q_proj", x), heads("k_proj", seen), heads("v_proj", seen))
        return linear("out_proj", out.reshape(x.shape))


class MLP(nn.Module):
    config: SiglipConfig
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, lora: dict[str, Any]) -> jax.Array:
        def linear(name, features, y):
            return Linear(features, True, self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        y = nn.gelu(linear("fc1", self.config.intermediate_size, x), approximate=True)
        return linear("fc2", self.config.hidden_size, y)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` wants: (carry, this layer's inputs, what all layers share: nothing)."""

    config: SiglipConfig
    how: ComputeConfig

    @nn.compact
    def __call__(self, x, adaptation: VisionAdapter, _):
        lora, prompts, (dtype, _, dropout, _) = adaptation.lora or {}, adaptation.prompts, self.how
        x = constrain_batch_sharding(x, self.how.rows)
        norm = _norm(self.config, dtype, "layer_norm1")
        y = seen = norm(x)
        if prompts is not None:  # what a layer makes of them is dropped, so they are only seen
            prompts = norm(prompts.astype(dtype))
            seen = jnp.concatenate([jnp.broadcast_to(prompts, (len(x), *prompts.shape)), y], axis=1)
        x += Attention(self.config, dtype, dropout, name="self_attn")(y, seen, lora)
        y = _norm(self.config, dtype, "layer_norm2")(x)
        return x + MLP(self.config, dtype, dropout, name="mlp")(y, lora), None


def _norm(config: SiglipConfig, dtype: Any, name: str) -> nn.LayerNorm:
    """Mean and variance are float32; the fast formula for the variance loses digits where the mean is large."""
    return nn.LayerNorm(config.norm_epsilon, dtype=dtype, use_fast_variance=False, name=name)


class SiglipEncoder(nn.Module):
    """The tower: normed hidden states of all patches."""

    config: SiglipConfig
    how: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, tiles: jax.Array, adaptation: VisionAdapter = NO_VISION_ADAPTER) -> jax.Array:
        """[N, S, S, 3] normalised pixels → [N, T, D], patches row by row."""
        c, dtype = self.config, self.how.dtype
        x = PatchEmbedding(c, dtype, name="patch_embedding")(tiles)
        # Idefics 3 and SmolVLM find a patch's place from its share of the height and width: of a whole tile, which is
        # all that their processors make, that is its place in the grid (but for rounding at sides that nobody uses).
        positions = nn.Embed(c.side**2, c.hidden_size, dtype=dtype, name="position_embedding")
        x += positions(jnp.arange(c.side**2))
        layers = scan_layers(Block, c.num_layers, self.how.remat)(c, self.how, name="layers")
        x, _ = layers(x, adaptation._replace(connector=None), None)
        return _norm(c, dtype, "post_layernorm")(x)


class PaliGemmaVisionEncoder(nn.Module):
    """Vision tower and connector, with the parameters at "vision"; `how` is how they compute."""

    vision: PaliGemmaVision
    how: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, tiles: jax.Array, adaptation: VisionAdapter = NO_VISION_ADAPTER) -> jax.Array:
        """[N, S, S, 3] colours, 0 to 255 → features [N, features_per_piece, width]."""
        x = SiglipEncoder(self.vision.encoder, self.how, name="tower")(self.vision.pixels.normalised(tiles), adaptation)
        projector = Linear(self.vision.width, True, self.how.dtype, self.how.lora_dropout, name="projector")
        return projector(x, adaptation.connects("projector"))


class SmolVLMVisionEncoder(nn.Module):
    """Vision tower and connector, with the parameters at "vision"; `how` is how they compute."""

    vision: SmolVLMVision
    how: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, tiles: jax.Array, adaptation: VisionAdapter = NO_VISION_ADAPTER) -> jax.Array:
        """[N, S, S, 3] colours, 0 to 255 → features [N, features_per_piece, width]."""
        tower, f = self.vision.encoder, self.vision.shuffle
        x = SiglipEncoder(tower, self.how, name="tower")(self.vision.pixels.normalised(tiles), adaptation)
        squares = x.reshape(len(x), tower.side // f, f, tower.side // f, f, -1).swapaxes(2, 3)
        shuffled = squares.reshape(len(x), self.vision.features_per_piece, -1)
        projector = Linear(self.vision.width, False, self.how.dtype, self.how.lora_dropout, name="projector")
        return projector(shuffled, adaptation.connects("projector"))


def encode_images(
    vision: PaliGemmaVision | SmolVLMVision,
    params: Any,
    inputs: ImageTiles,
    how: ComputeConfig,
    adaptation: VisionAdapter,
    dropout: jax.Array | None,
) -> jax.Array:
    """The features of a batch's rows: see `sqa_jax.models.vision.encode.encode_images`.

    Args:
      inputs: tiles of a batch's rows.
    """
    tower = (PaliGemmaVisionEncoder if isinstance(vision, PaliGemmaVision) else SmolVLMVisionEncoder)(vision, how)
    B, n, *tile = inputs.pixels.shape
    rngs = None if dropout is None else {"dropout": dropout}
    found = tower.apply({"params": params}, inputs.pixels.reshape(B * n, *tile), adaptation, rngs=rngs)
    return found.reshape(B, -1, found.shape[-1])
