"""The shape and parameters of SigLIP's vision tower (Zhai et al. 2023, arXiv:2303.15343), and what it reads."""

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
    """Shape of a tower.

    Attributes:
      hidden_size: D.
      intermediate_size: width of the MLPs.
      num_layers: L.
      num_heads: each has its own keys and values.
      image_size: S, pixels of a tile's side.
      patch_size: pixels of a patch's side; pixels beyond the last whole patch are not seen.
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
    def side(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, width, and pixels of a patch's side."""
        return self.num_layers, self.hidden_size, self.patch_size

    def linear_shapes(self) -> dict[str, tuple[str, int, int]]:
        """Of each linear layer of a block: its module, input width and output width."""
        D, inner = self.hidden_size, self.intermediate_size
        attention = {name: ("self_attn", D, D) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        return {**attention, "fc1": ("mlp", D, inner), "fc2": ("mlp", inner, D)}


def from_hf(raw: dict[str, Any], kinds: Collection[str], where: str) -> SiglipConfig:
    """A tower's shape from the `vision_config` of a `config.json`.

    Args:
      kinds: what its model_type may be.

    Raises:
      UserError: it is another tower, an option is not supported, a key is missing, or a size is impossible.
    """
    kind, activation = raw.get("model_type"), raw.get("hidden_act", _ACTIVATION)
    if kind not in kinds:
        raise UserError(f"{where}: vision tower {kind!r} is not supported; supported: {', '.join(kinds)}")
    if activation != _ACTIVATION or raw.get("num_channels", 3) != 3:
        raise UserError(
            f"{where}: the tower's activation is {activation!r} and its channels are {raw.get('num_channels', 3)}; "
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
        raise UserError(f"{where}: key {error} of the vision tower is missing; fetch config.json again") from None
    check_numbers(config, where, ())
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"{where}: the tower's {config.num_heads} heads cannot share its width of {config.hidden_size} evenly; "
            "fetch the model again"
        )
    if not config.side:
        raise UserError(
            f"{where}: a patch of {config.patch_size} pixels does not fit a tile of {config.image_size}; "
            "fetch the model again"
        )
    return config


def to_hf(config: SiglipConfig, kind: str) -> dict[str, Any]:
    """The `vision_config` that transformers reads as the same tower, of the given model_type."""
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
    """Every parameter of a tower that lies at `path` in our tree and behind `prefix` in files."""
    D, L, P = config.hidden_size, config.num_layers, config.patch_size

    def single(own: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        return ParamSpec((*path, *own), shape, (prefix + name,), False, transposed)

    def layered(own: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        names = tuple(f"{prefix}encoder.layers.{i}.{name}" for i in range(L))
        return ParamSpec((*path, "layers", *own), (L, *shape), names, True, transposed)

    positions = (config.side**2, D)
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


def row_arrays(vision: Any, pieces: Sequence[np.ndarray], sizes: Sequence[Any], room: int) -> ImageTiles:
    """Input of the encoder for a row of a batch: `room` tiles, black after the row's last.

    Args:
      vision: of the family.
      pieces: the tiles of each of its pictures.
    """
    side = vision.encoder.image_size
    tiles = np.zeros((room, side, side, 3), np.uint8)
    if pieces:
        own = np.concatenate(pieces)
        tiles[: len(own)] = own
    return ImageTiles(tiles)
