"""SigLIP's vision encoder (Zhai et al. 2023, arXiv:2303.15343) in Flax Linen, and the connectors of PaliGemma and SmolVLM.

A vision transformer without a class token.

Shapes in comments: N tiles of S × S pixels, T patches of a tile, P deep prompts, D the encoder's width, L layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sqa_jax.models.layers.linear import Linear, constrain_batch_sharding, scan_layers
from sqa_jax.models.vision.adapter import NO_VISION_ADAPTER, ComputeConfig, VisionAdapter
from sqa_jax.models.vision.image_input import ImageTiles
from sqa_jax.models.vision.paligemma import PaliGemmaVision
from sqa_jax.models.vision.siglip_config import SiglipConfig
from sqa_jax.models.vision.smolvlm import SmolVLMVision


class PatchEmbedding(nn.Module):
    """Patch embedding: [N, S, S, 3] pixels → [N, T, D], row by row."""

    config: SiglipConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N T D"]:
        c, side = self.config, self.config.patches_per_side
        # Files have a convolution (D, 3, rows, columns); ours is its transpose, so a patch is laid out by columns.
        shape = (c.patch_size, c.patch_size, 3, c.hidden_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (c.hidden_size,)).astype(self.dtype)
        used = side * c.patch_size  # pixels beyond the last whole patch are cut off
        patches = pixels[:, :used, :used].astype(self.dtype).reshape(-1, side, c.patch_size, side, c.patch_size, 3)
        patches = patches.transpose(0, 1, 3, 4, 2, 5).reshape(len(pixels), side**2, -1)
        return patches @ kernel.reshape(-1, c.hidden_size) + bias


class Attention(nn.Module):
    """Full attention of the patches [N, T, D] to prompts and patches [N, P + T, D], softmax in float32."""

    config: SiglipConfig
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(
        self, queries: Float[Array, "N T D"], keys: Float[Array, "N S D"], lora: dict[str, Any]
    ) -> Float[Array, "N T D"]:
        H, D = self.config.num_heads, self.config.hidden_size

        def linear(name, y):
            return Linear(D, True, self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        def heads(name, y):
            return linear(name, y).reshape(*y.shape[:2], H, D // H)

        out = jax.nn.dot_product_attention(heads("q_proj", queries), heads("k_proj", keys), heads("v_proj", keys))
        return linear("out_proj", out.reshape(queries.shape))


class MLP(nn.Module):
    config: SiglipConfig
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"], lora: dict[str, Any]) -> Float[Array, "N T D"]:
        def linear(name, features, y):
            return Linear(features, True, self.dtype, self.lora_dropout, name=name)(y, lora.get(name))

        y = nn.gelu(linear("fc1", self.config.intermediate_size, x), approximate=True)
        return linear("fc2", self.config.hidden_size, y)


class Block(nn.Module):
    """One pre-norm layer, in the form that `nn.scan` wants: (carry, this layer's inputs, inputs of all layers: none)."""

    config: SiglipConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x, adapter: VisionAdapter, _):
        lora, prompts, dtype, dropout = (
            adapter.lora or {},
            adapter.prompts,
            self.compute.dtype,
            self.compute.lora_dropout,
        )
        x = constrain_batch_sharding(x, self.compute.batch_sharding)
        norm = _norm(self.config, dtype, "layer_norm1")
        y = keys = norm(x)
        if prompts is not None:  # a layer's outputs for them are dropped, so they are only attended to
            prompts = norm(prompts.astype(dtype))
            keys = jnp.concatenate([jnp.broadcast_to(prompts, (len(x), *prompts.shape)), y], axis=1)
        x += Attention(self.config, dtype, dropout, name="self_attn")(y, keys, lora)
        y = _norm(self.config, dtype, "layer_norm2")(x)
        return x + MLP(self.config, dtype, dropout, name="mlp")(y, lora), None


def _norm(config: SiglipConfig, dtype: Any, name: str) -> nn.LayerNorm:
    """Mean and variance are float32; the fast formula for the variance loses digits where the mean is large."""
    return nn.LayerNorm(config.norm_epsilon, dtype=dtype, use_fast_variance=False, name=name)


class SiglipEncoder(nn.Module):
    """The vision transformer: layer-normed hidden states of all patches."""

    config: SiglipConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self, tiles: Float[Array, "N S S 3"], adapter: VisionAdapter = NO_VISION_ADAPTER
    ) -> Float[Array, "N T D"]:
        """Normalized pixels → hidden states, patches row by row."""
        c, dtype = self.config, self.compute.dtype
        x = PatchEmbedding(c, dtype, name="patch_embedding")(tiles)
        # Idefics 3 and SmolVLM compute a patch's position from its share of the height and width; of a whole tile, the
        # only kind that their processors make, that is its position in the grid (but for rounding at unusual sizes).
        positions = nn.Embed(c.patches_per_side**2, c.hidden_size, dtype=dtype, name="position_embedding")
        x += positions(jnp.arange(c.patches_per_side**2))
        layers = scan_layers(Block, c.num_layers, self.compute.remat)(c, self.compute, name="layers")
        x, _ = layers(x, adapter._replace(connector=None), None)
        return _norm(c, dtype, "post_layernorm")(x)


class PaliGemmaVisionEncoder(nn.Module):
    """SigLIP encoder and linear projector of PaliGemma; their parameters are at "vision"."""

    vision: PaliGemmaVision
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self, tiles: Shaped[Array, "N S S 3"], adapter: VisionAdapter = NO_VISION_ADAPTER
    ) -> Float[Array, "N F W"]:
        """Pixels of 0 to 255 → features_per_piece features of each tile, as wide as the language model."""
        # "tower" is its name in parameter trees on disk.
        encoder = SiglipEncoder(self.vision.encoder, self.compute, name="tower")
        x = encoder(self.vision.pixels.normalize(tiles), adapter)
        projector = Linear(self.vision.width, True, self.compute.dtype, self.compute.lora_dropout, name="projector")
        return projector(x, adapter.connector_lora("projector"))


class SmolVLMVisionEncoder(nn.Module):
    """SigLIP encoder, pixel shuffle and linear projector of SmolVLM; their parameters are at "vision"."""

    vision: SmolVLMVision
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self, tiles: Shaped[Array, "N S S 3"], adapter: VisionAdapter = NO_VISION_ADAPTER
    ) -> Float[Array, "N F W"]:
        """Pixels of 0 to 255 → features_per_piece features of each tile, as wide as the language model."""
        f = self.vision.shuffle
        encoder = SiglipEncoder(self.vision.encoder, self.compute, name="tower")
        x = encoder(self.vision.pixels.normalize(tiles), adapter)
        side = self.vision.encoder.patches_per_side // f
        squares = x.reshape(len(x), side, f, side, f, -1).swapaxes(2, 3)
        shuffled = squares.reshape(len(x), self.vision.features_per_piece, -1)
        projector = Linear(self.vision.width, False, self.compute.dtype, self.compute.lora_dropout, name="projector")
        return projector(shuffled, adapter.connector_lora("projector"))


def encode_images(
    vision: PaliGemmaVision | SmolVLMVision,
    params: Any,
    inputs: ImageTiles,
    compute: ComputeConfig,
    adapter: VisionAdapter,
    dropout: jax.Array | None,
) -> Float[Array, "B F W"]:
    """The features of a batch's rows: see `sqa_jax.models.vision.encode.encode_images`."""
    if isinstance(vision, PaliGemmaVision):
        encoder = PaliGemmaVisionEncoder(vision, compute)
    else:
        encoder = SmolVLMVisionEncoder(vision, compute)
    B, n, *tile = inputs.pixels.shape
    rngs = None if dropout is None else {"dropout": dropout}
    pixels = inputs.pixels.reshape(B * n, *tile)
    features = encoder.apply({"params": params}, pixels, adapter, rngs=rngs)
    assert isinstance(features, jax.Array)
    return features.reshape(B, -1, features.shape[-1])
