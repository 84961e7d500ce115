"""Image input of SmolVLM (Marafioti et al. 2025, arXiv:2504.05299) and Idefics 3 (Laurençon et al. 2024, arXiv:2408.12637).

An image is split into tiles, row by row, followed by the whole image as one more tile (the global image); pixel shuffle
makes one feature of f × f patches.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from sqa_jax.errors import UserError
from sqa_jax.models.param_spec import ParamSpec
from sqa_jax.models.vision import pixels, siglip_config
from sqa_jax.models.vision.image_input import PreprocessedImage
from sqa_jax.models.vision.image_tokens import check_token
from sqa_jax.models.vision.names import TensorNames
from sqa_jax.models.vision.pixels import PixelTransform
from sqa_jax.models.vision.siglip_config import SiglipConfig

_FAMILIES = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}  # values of model_type, and the names of their classes
_MODEL_TYPES = ("smolvlm_vision", "idefics3_vision", "idefics3", "siglip_vision_model")  # as published files have them
_IMAGE, _AROUND, _GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
_ENCODER_PREFIX, _CONNECTOR_PREFIX = "model.vision_model.", "model.connector."
# That a tokenizer must have; published ones number up to six rows and columns.
SPECIAL_TOKENS = (_IMAGE, _AROUND, _GLOBAL, *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)))
TENSOR_NAMES = TensorNames(
    (("model.", "model.text_model."), (_ENCODER_PREFIX, _ENCODER_PREFIX), (_CONNECTOR_PREFIX, _CONNECTOR_PREFIX))
)
_LONGEST = 4096  # pixels beyond which transformers resizes a second time


@dataclasses.dataclass(frozen=True)
class SmolVLMVision:
    """Vision configuration of a checkpoint.

    Attributes:
      encoder: shape of the vision encoder; a tile has its image size.
      width: of a feature, which is that of the language model.
      image_token: id of the image token, one for each feature.
      pixels: resampling and normalization.
      shuffle: f of the pixel shuffle, patches along the side of a square that becomes one feature.
      longest_edge: pixels that an image's longer side is resized to before it is split.
      splits: whether images are split into tiles.
      family: the architecture's name in Hugging Face's `model_type`.
    """

    encoder: SiglipConfig
    width: int
    image_token: int
    pixels: PixelTransform
    shuffle: int
    longest_edge: int
    splits: bool = True
    family: str = "smolvlm"

    uses_mrope: ClassVar[bool] = False  # features have positions in a row, as text tokens do
    placeholder: ClassVar[str] = _IMAGE  # of an image in a chat template

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """Layers and width of the vision encoder, and pixels along a patch's side."""
        return self.encoder.shape

    @property
    def features_per_piece(self) -> int:
        """Features of one tile."""
        return (self.encoder.patches_per_side // self.shuffle) ** 2


def from_hf(raw: dict[str, Any], processor: dict[str, Any], where: str) -> SmolVLMVision:
    """The vision configuration of `config.json` and `preprocessor_config.json` ({} for the published settings).

    Raises:
      UserError: the encoder or an option is not supported, a key is missing, or sizes contradict each other.
    """
    processor = pixels.image_processor_settings(processor)
    encoder = siglip_config.from_hf(raw.get("vision_config") or {}, _MODEL_TYPES, where)
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{where}: architecture {family!r} is not supported; supported: {', '.join(_FAMILIES)}")
    size = processor.get("size", {"longest_edge": 4 * encoder.image_size})
    width = _positive(where, "text_config.hidden_size", (raw.get("text_config") or {}).get("hidden_size"))
    token = _positive(where, "image_token_id", raw.get("image_token_id"))
    shuffle = _positive(where, "scale_factor", raw.get("scale_factor", 2))
    longest = _positive(where, "size", size.get("longest_edge") if isinstance(size, dict) else size)
    if encoder.patches_per_side % shuffle:
        raise UserError(
            f"{where}: a tile of {encoder.patches_per_side} × {encoder.patches_per_side} patches cannot be divided into "
            f"squares of {shuffle}; fetch the model again"
        )
    expected = {"longest_edge": encoder.image_size}
    if (tile := processor.get("max_image_size", expected)) != expected or longest > _LONGEST:
        raise UserError(
            f"{where}: the preprocessor makes tiles of {tile} from images of {longest} pixels; supported: tiles of "
            f"{encoder.image_size}, which the vision encoder takes, from at most {_LONGEST}; fetch both again"
        )
    return SmolVLMVision(
        encoder=encoder,
        width=width,
        image_token=token,
        pixels=pixels.from_hf(processor, where, Image.Resampling.LANCZOS),
        shuffle=shuffle,
        longest_edge=longest,
        splits=processor.get("do_image_splitting") is not False,
        family=family,
    )


def _positive(where: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{where}: {key} is {value!r}, which is not a positive number; fetch the model again")
    return value


def with_max_image_tokens(vision: SmolVLMVision, count: int) -> SmolVLMVision:
    """The configuration with at most so many features of an image: a square one is split into fewer tiles, or none.

    Raises:
      UserError: they are fewer than those of one tile.
    """
    tiles = count // vision.features_per_piece
    if tiles < 1:
        raise UserError(
            f"config.student.max_image_tokens is {count}; this student needs {vision.features_per_piece} at least, the features "
            "of one tile"
        )
    side = math.isqrt(max(1, tiles - 1))  # one tile is the global image
    longest = min(vision.longest_edge, side * vision.encoder.image_size)
    return dataclasses.replace(vision, longest_edge=longest, splits=vision.splits and side > 1)


def to_hf(vision: SmolVLMVision) -> dict[str, Any]:
    """The contents of `config.json` but for the `text_config`."""
    return {
        "architectures": [f"{_FAMILIES[vision.family]}ForConditionalGeneration"],
        "model_type": vision.family,
        "vision_config": siglip_config.to_hf(vision.encoder, f"{vision.family}_vision"),
        "scale_factor": vision.shuffle,
        "image_token_id": vision.image_token,
    }


def processor_to_hf(vision: SmolVLMVision) -> dict[str, Any]:
    """The contents of `preprocessor_config.json`; transformers reads `image_seq_len` from `processor_config.json` alone."""
    name = _FAMILIES[vision.family]
    return {
        "processor_class": f"{name}Processor",
        "image_processor_type": f"{name}ImageProcessor",
        "image_seq_len": vision.features_per_piece,
        "size": {"longest_edge": vision.longest_edge},
        "max_image_size": {"longest_edge": vision.encoder.image_size},
        "do_image_splitting": vision.splits,
        "do_pad": True,
        **pixels.to_hf(vision.pixels),
    }


def param_specs(vision: SmolVLMVision) -> list[ParamSpec]:
    """Every parameter of vision encoder and projector, under the published names."""
    linear = (vision.encoder.hidden_size * vision.shuffle**2, vision.width)
    name = f"{_CONNECTOR_PREFIX}modality_projection.proj.weight"
    return [
        *siglip_config.param_specs(vision.encoder, ("vision", "tower"), _ENCODER_PREFIX),
        ParamSpec(("vision", "projector", "kernel"), linear, (name,), False, True),
    ]


def preprocess_image(vision: SmolVLMVision, image: Image.Image) -> PreprocessedImage:
    """An RGB image as the tiles that the vision encoder takes."""
    side, resize = vision.encoder.image_size, vision.pixels.resize
    image = resize(image, *_resized_size(vision, *image.size))
    rows, cols = _grid(vision, *image.size)
    if (rows, cols) == (1, 1):
        return PreprocessedImage(np.asarray(resize(image, side, side))[None])
    image = resize(image, cols * side, rows * side)
    global_image = np.asarray(resize(image, side, side))[None]
    tiles = np.asarray(image).reshape(rows, side, cols, side, 3).swapaxes(1, 2)
    return PreprocessedImage(np.concatenate([tiles.reshape(-1, side, side, 3), global_image]), rows, cols)


def _resized_size(vision: SmolVLMVision, width: int, height: int) -> tuple[int, int]:
    """Width and height with the longer side of `longest_edge`, the other even."""
    ratio, longest = width / height, vision.longest_edge
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def _grid(vision: SmolVLMVision, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the tiles that an image of this size is resized to fill."""
    if not vision.splits:
        return 1, 1
    ratio, side = width / height, vision.encoder.image_size
    if width >= height:
        cols = math.ceil(width / side)
        return math.ceil(int(cols * side / ratio) / side), cols
    rows = math.ceil(height / side)
    return rows, math.ceil(int(rows * side * ratio) / side)


def prompt_ids(vision: SmolVLMVision, rows: int, columns: int, tokenizer: Any) -> list[int]:
    """An image's tokens in a prompt: one for each feature, and around each tile those of its row and column.

    Raises:
      UserError: the tokenizer is not the model's.
    """
    check_token(tokenizer, _IMAGE, vision.image_token)
    tile, text = _IMAGE * vision.features_per_piece, ""
    for row in range(rows):
        text += "".join(f"{_AROUND}<row_{row + 1}_col_{col + 1}>{tile}" for col in range(columns)) + "\n"
    text += "\n" * bool(rows) + _AROUND + _GLOBAL + tile + _AROUND
    return tokenizer(text, add_special_tokens=False)["input_ids"]


encoder_inputs = siglip_config.encoder_inputs
