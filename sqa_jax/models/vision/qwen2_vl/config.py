"""Vision configuration of Qwen2-VL, and the parameter table of its vision encoder."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from PIL import Image

from sqa_jax.errors import UserError
from sqa_jax.models.param_spec import ParamSpec
from sqa_jax.models.validation import check_numbers
from sqa_jax.models.vision import pixels
from sqa_jax.models.vision.names import TensorNames
from sqa_jax.models.vision.pixels import PixelTransform

_MODEL_TYPES = ("qwen2_vl", "qwen2_vl_vision")  # of the vision encoder, before transformers 5 and since
SPECIAL_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")  # that a tokenizer must have
_ENCODER_PREFIX, _ACTIVATION = "visual.", "quick_gelu"
TENSOR_NAMES = TensorNames(
    (("model.", "model.", "model.language_model."), (_ENCODER_PREFIX, _ENCODER_PREFIX, "model.visual."))
)
_CLIP = PixelTransform(
    int(Image.Resampling.BICUBIC),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


@dataclasses.dataclass(frozen=True)
class Qwen2VLVision:
    """Vision configuration of a checkpoint. Every published Qwen2-VL has the defaults but for the last one.

    Attributes:
      width: D of the language model, width of a feature.
      embed_dim: E, width of the vision encoder's residual stream.
      depth: L, layers of the vision encoder.
      num_heads: H of the vision encoder; each has its own keys and values.
      mlp_ratio: width of the vision encoder's MLPs, in `embed_dim`s.
      patch_size: pixels along a patch's side.
      temporal_patch_size: frames of a patch; an image is repeated in all of them.
      merge: patches along the side of the square that becomes one feature.
      rope_theta: base of the vision encoder's rotary frequencies.
      image_token: id of the image token, one for each feature.
      vision_start, vision_end: ids around an image's features.
      pixels: resampling and normalization; CLIP's.
      min_pixels, max_pixels: of an image after resizing. The default is transformers' own; the published files
        allow 12,845,056, which are 16,384 features.
    """

    width: int
    embed_dim: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_ratio: int = 4
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge: int = 2
    rope_theta: float = 10000.0
    image_token: int = 151655
    vision_start: int = 151652
    vision_end: int = 151653
    pixels: PixelTransform = _CLIP
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    uses_mrope: ClassVar[bool] = True  # features have positions in three dimensions
    features_per_piece: ClassVar[int] = 1  # of one square of patches
    placeholder: ClassVar[str] = "<|vision_start|><|image_pad|><|vision_end|>"  # of an image in a chat template

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """Layers and width of the vision encoder, and pixels along a patch's side."""
        return self.depth, self.embed_dim, self.patch_size

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Channels, frames, rows and columns of a patch."""
        return (3, self.temporal_patch_size, self.patch_size, self.patch_size)

    def linear_shapes(self) -> dict[str, tuple[str, int, int]]:
        """{linear layer of a block: (module in files, input width, output width)}."""
        E, inner = self.embed_dim, self.mlp_ratio * self.embed_dim
        attention = {"qkv": ("attn", E, 3 * E), "proj": ("attn", E, E)}
        return {**attention, "fc1": ("mlp", E, inner), "fc2": ("mlp", inner, E)}


def from_hf(raw: dict[str, Any], processor: dict[str, Any], where: str) -> Qwen2VLVision:
    """The vision configuration of `config.json` and `preprocessor_config.json` ({} for transformers' defaults).

    In older files the language model's options are not in a `text_config` but beside the others.

    Raises:
      UserError: the encoder or an option is not supported, a key is missing, or sizes contradict each other.
    """
    given, processor = raw.get("vision_config") or {}, pixels.image_processor_settings(processor)
    kind = given.get("model_type", raw.get("model_type"))
    if kind not in _MODEL_TYPES:
        raise UserError(f"{where}: vision encoder {kind!r} is not supported; supported: {', '.join(_MODEL_TYPES)}")
    if (activation := given.get("hidden_act", _ACTIVATION)) != _ACTIVATION:
        raise UserError(
            f"{where}: activation {activation!r} of the vision encoder is not supported; supported: {_ACTIVATION}"
        )
    defaults = Qwen2VLVision
    size = processor.get("size") or {"shortest_edge": defaults.min_pixels, "longest_edge": defaults.max_pixels}
    try:
        vision = Qwen2VLVision(
            width=given["hidden_size"],
            embed_dim=given["embed_dim"],
            depth=given["depth"],
            num_heads=given["num_heads"],
            mlp_ratio=given.get("mlp_ratio", defaults.mlp_ratio),
            patch_size=given.get("patch_size", defaults.patch_size),
            temporal_patch_size=given.get("temporal_patch_size", defaults.temporal_patch_size),
            merge=given.get("spatial_merge_size", defaults.merge),
            rope_theta=(given.get("rope_parameters") or {}).get("rope_theta", defaults.rope_theta),
            image_token=raw.get("image_token_id", defaults.image_token),
            vision_start=raw.get("vision_start_token_id", defaults.vision_start),
            vision_end=raw.get("vision_end_token_id", defaults.vision_end),
            pixels=pixels.from_hf({**pixels.to_hf(_CLIP), **processor}, where, Image.Resampling.BICUBIC),
            # As in transformers, the older name goes first.
            min_pixels=processor.get("min_pixels") or size["shortest_edge"],
            max_pixels=processor.get("max_pixels") or size["longest_edge"],
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; fetch the model again") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: a value is not of its kind ({error}); fetch the model again") from None
    check_numbers(vision, where, ("image_token", "vision_start", "vision_end"))
    _check_sizes(vision, raw, processor, where)
    return vision


def _check_sizes(vision: Qwen2VLVision, raw: dict[str, Any], processor: dict[str, Any], where: str) -> None:
    v = vision
    if v.embed_dim % (4 * v.num_heads):
        raise UserError(
            f"{where}: a vision encoder of width {v.embed_dim} has no {v.num_heads} heads whose width is a multiple of 4, as "
            "rotary positions of rows and columns need; fetch the model again"
        )
    if (hidden := (raw.get("text_config") or raw).get("hidden_size")) != v.width:
        raise UserError(
            f"{where}: features of width {v.width} do not fit a language model of {hidden}; fetch the model again"
        )
    if (channels := raw["vision_config"].get("in_channels", 3)) != 3:
        raise UserError(f"{where}: images of {channels} channels are not supported; supported: 3")
    if v.min_pixels > v.max_pixels:
        raise UserError(f"{where}: min_pixels {v.min_pixels} is more than max_pixels {v.max_pixels}; set them anew")
    expected = {"patch_size": v.patch_size, "temporal_patch_size": v.temporal_patch_size, "merge_size": v.merge}
    for key, value in expected.items():
        if (found := processor.get(key, value)) != value:
            raise UserError(
                f"{where}: the preprocessor's {key} is {found}, the vision encoder's is {value}; fetch both again"
            )


def with_max_image_tokens(vision: Qwen2VLVision, count: int) -> Qwen2VLVision:
    """The configuration with at most so many features of an image.

    Raises:
      UserError: they are none.
    """
    if count < 1:
        raise UserError(f"config.student.max_image_tokens is {count}; Qwen2-VL needs one at least")
    max_pixels = min(vision.max_pixels, count * (vision.merge * vision.patch_size) ** 2)
    return dataclasses.replace(vision, max_pixels=max_pixels, min_pixels=min(vision.min_pixels, max_pixels))


def to_hf(vision: Qwen2VLVision) -> dict[str, Any]:
    """The contents of `config.json` but for the `text_config`."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": vision.image_token,
        "vision_start_token_id": vision.vision_start,
        "vision_end_token_id": vision.vision_end,
        "vision_config": {
            "model_type": _MODEL_TYPES[1],
            "hidden_size": vision.width,
            "embed_dim": vision.embed_dim,
            "depth": vision.depth,
            "num_heads": vision.num_heads,
            "mlp_ratio": vision.mlp_ratio,
            "in_channels": 3,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge,
            "hidden_act": _ACTIVATION,
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
        },
    }


def processor_to_hf(vision: Qwen2VLVision) -> dict[str, Any]:
    """The contents of `preprocessor_config.json`."""
    return {
        "processor_class": "Qwen2VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge,
        **pixels.to_hf(vision.pixels),
    }


def param_specs(vision: Qwen2VLVision) -> list[ParamSpec]:
    """Every parameter of vision encoder and merger, under the published names; see `TENSOR_NAMES` for others.

    The patch embedding is as in the file: [E, channels, frames, rows, columns].
    """
    E, merged = vision.embed_dim, vision.merge**2 * vision.embed_dim

    def single(keys: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        return ParamSpec(("vision", *keys), shape, (_ENCODER_PREFIX + name,), False, transposed)

    def layered(keys: tuple[str, ...], name: str, shape: tuple[int, ...], transposed: bool = False) -> ParamSpec:
        names = tuple(f"{_ENCODER_PREFIX}blocks.{i}.{name}" for i in range(vision.depth))
        return ParamSpec(("vision", "blocks", *keys), (vision.depth, *shape), names, True, transposed)

    table = [
        single(("patch_embed", "kernel"), "patch_embed.proj.weight", (E, *vision.patch_shape)),
        single(("merger", "norm", "scale"), "merger.ln_q.weight", (E,)),
        single(("merger", "norm", "bias"), "merger.ln_q.bias", (E,)),
        single(("merger", "fc1", "kernel"), "merger.mlp.0.weight", (merged, merged), True),
        single(("merger", "fc1", "bias"), "merger.mlp.0.bias", (merged,)),
        single(("merger", "fc2", "kernel"), "merger.mlp.2.weight", (merged, vision.width), True),
        single(("merger", "fc2", "bias"), "merger.mlp.2.bias", (vision.width,)),
    ]
    for norm in ("norm1", "norm2"):
        table.append(layered((norm, "scale"), f"{norm}.weight", (E,)))
        table.append(layered((norm, "bias"), f"{norm}.bias", (E,)))
    for layer, (module, width_in, width_out) in vision.linear_shapes().items():
        table.append(layered((layer, "kernel"), f"{module}.{layer}.weight", (width_in, width_out), True))
        table.append(layered((layer, "bias"), f"{module}.{layer}.bias", (width_out,)))
    return table
