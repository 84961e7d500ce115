"""Configuration, parameter table and input of SigLIP's vision encoder (Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sqa_jax.errors import UserError
from sqa_jax.models.param_spec import ParamSpec
from sqa_jax.models.validation import check_numbers
from sqa_jax.models.vision.image_input import ImageTiles

_ACTIVATION = "gelu_pytorch_tanh"


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Shape of a SigLIP encoder.

    Attributes:
      hidden_size: D.
      intermediate_size: width of the MLPs.
      num_layers: L.
      num_heads: each has its own keys and values.
      image_size: S, pixels along a tile's side.
      patch_size: pixels along a patch's side; pixels beyond the last whole patch are cut off.
      norm_epsilon: of the layer norms.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_epsilon: float = 1e-6

    @property
    def patches_per_side(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, width, and pixels along a patch's side."""
        return self.num_layers, self.hidden_size, self.patch_size

    def linear_shapes(self) -> dict[str, tuple[str, int, int]]:
        """{linear layer of a block: (module, input width, output width)}."""
        D, inner = self.hidden_size, self.intermediate_size
        attention = {name: ("self_attn", D, D) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        return {**attention, "fc1": ("mlp", D, inner), "fc2": ("mlp", inner, D)}


def from_hf(raw: dict[str, Any], kinds: Collection[str], where: str) -> SiglipConfig:
    """An encoder's shape from the `vision_config` of a `config.json`.

    Args:
      kinds: values that its model_type may have.

    Raises:
      UserError: it is another encoder, an option is not supported, a key is missing, or a size is impossible.
    """
    kind, activation = raw.get("model_type"), raw.get("hidden_act", _ACTIVATION)
    if kind not in kinds:
        raise UserError(f"{where}: vision encoder {kind!r} is not supported; supported: {', '.join(kinds)}")
    if activation != _ACTIVATION or raw.get("num_channels", 3) != 3:
        raise UserError(
            f"{where}: the vision encoder's activation is {activation!r} and its channels are {raw.get('num_channels', 3)}; "
            f"supported: {_ACTIVATION} and 3"
        )
    try:
        config = SiglipConfig(
            hidden_size=raw["hidden_size"],
            intermediate_size=raw.get("intermediate_size", 3072),
            num_layers=raw.get("num_hidden_layers", 12),
            num_heads=raw["num_attention_heads"],
            image_size=raw.get("image_size", 224),
            patch_size=raw["patch_size"],
            norm_epsilon=raw.get("layer_norm_eps", 1e-6),
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} of the vision encoder is missing; fetch config.json again") from None
    check_numbers(config, where, ())
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"{where}: the vision encoder's width of {config.hidden_size} cannot be split evenly into its {config.num_heads} heads; "
            "fetch the model again"
        )
    if not config.patches_per_side:
        raise UserError(
            f"{where}: a patch of {config.patch_size} pixels does not fit a tile of {config.image_size}; "
            "fetch the model again"
        )
    return config


def to_hf(config: SiglipConfig, kind: str) -> dict[str, Any]:
    """The `vision_config` of the same encoder for transformers, of the given model_type."""
    return {
        "model_type": kind,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": _ACTIVATION,
    }


def param_specs(config: SiglipConfig, path: tuple[str, ...], prefix: str) -> list[ParamSpec]:
    """Every parameter of an encoder that is at `path` in our tree and after `prefix` in files."""
    D, L, P = config.hidden_size, config.num_layers, config.patch_size

    def single(keys: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        return ParamSpec((*path, *keys), shape, (prefix + name,), False, transposed)

    def layered(keys: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        names = tuple(f"{prefix}encoder.layers.{i}.{name}" for i in range(L))
        return ParamSpec((*path, "layers", *keys), (L, *shape), names, True, transposed)

    positions = (config.patches_per_side**2, D)
    table = [
        single(("patch_embedding", "kernel"), "embeddings.patch_embedding.weight", (P, P, 3, D), True),
        single(("patch_embedding", "bias"), "embeddings.patch_embedding.bias", (D,)),
        single(("position_embedding", "embedding"), "embeddings.position_embedding.weight", positions),
        single(("post_layernorm", "scale"), "post_layernorm.weight", (D,)),
        single(("post_layernorm", "bias"), "post_layernorm.bias", (D,)),
    ]
    for norm in ("layer_norm1", "layer_norm2"):
        table.append(layered((norm, "scale"), f"{norm}.weight", (D,)))
        table.append(layered((norm, "bias"), f"{norm}.bias", (D,)))
    for layer, (module, width_in, width_out) in config.linear_shapes().items():
        table.append(layered((module, layer, "kernel"), f"{module}.{layer}.weight", (width_in, width_out), True))
        table.append(layered((module, layer, "bias"), f"{module}.{layer}.bias", (width_out,)))
    return table


def encoder_inputs(vision: Any, pieces: Sequence[np.ndarray], grids: Sequence[Any], capacity: int) -> ImageTiles:
    """The encoder's input for a packed row: `capacity` tiles, black after the row's last.

    Args:
      vision: of the family.
      pieces: the tiles of each of the row's images.
      grids: not needed.
    """
    side = vision.encoder.image_size
    tiles = np.zeros((capacity, side, side, 3), np.uint8)
    if pieces:
        used = np.concatenate(pieces)
        tiles[: len(used)] = used
    return ImageTiles(tiles)
