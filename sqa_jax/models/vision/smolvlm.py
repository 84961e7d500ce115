"""Pictures of SmolVLM (Marafioti et al. 2025, arXiv:2504.05299) and Idefics 3 (Laurençon et al. 2024, arXiv:2408.12637).

A picture is cut into tiles, row by row, and shown once more as a whole; pixel shuffle makes one feature of f × f patches.
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
_KINDS = ("smolvlm_vision", "idefics3_vision", "idefics3", "siglip_vision_model")  # as published files have them
_IMAGE, _AROUND, _WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
_TOWER, _CONNECTOR = "model.vision_model.", "model.connector."
# What a tokenizer must have as tokens: published ones number up to six rows and columns.
WORDS = (_IMAGE, _AROUND, _WHOLE, *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)))
NAMES = TensorNames((("model.", "model.text_model."), (_TOWER, _TOWER), (_CONNECTOR, _CONNECTOR)))
_LONGEST = 4096  # pixels beyond which transformers resizes a second time


@dataclasses.dataclass(frozen=True)
class SmolVLMVision:
    """What a checkpoint's files say of pictures.

    Attributes:
      tower: shape of the vision tower; a tile is as large as its pictures.
      width: of a feature, which is the language half's.
      image_token: id that holds a feature's place in a prompt.
      pixels: how colours become numbers.
      shuffle: f, patches along the side of a square that becomes one feature.
      longest_edge: pixels to which a picture's longer side is brought before it is cut.
      splits: whether pictures are cut at all.
      family: the architecture's name in Hugging Face's `model_type`.
    """

    tower: SiglipConfig
    width: int
    image_token: int
    pixels: PixelTransform
    shuffle: int
    longest_edge: int
    splits: bool = True
    family: str = "smolvlm"

    uses_mrope: ClassVar[bool] = False  # features stand in a row, as words do
    placeholder: ClassVar[str] = _IMAGE  # what stands for a picture in a chat template

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """Layers and width of the tower, and pixels of a patch's side."""
        return self.tower.shape

    @property
    def features_per_piece(self) -> int:
        """Features that one tile becomes."""
        return (self.tower.side // self.shuffle) ** 2


def from_hf(raw: dict[str, Any], processor: dict[str, Any], where: str) -> SmolVLMVision:
    """What is said of pictures in `config.json` and in `preprocessor_config.json` ({} for the published settings).

    Raises:
      UserError: the tower or an option is not supported, a key is missing, or sizes contradict each other.
    """
    processor = pixels.image_processor_settings(processor)
    tower = siglip_config.from_hf(raw.get("vision_config") or {}, _KINDS, where)
    family, width = raw.get("model_type"), (raw.get("text_config") or {}).get("hidden_size")
    shuffle, token = raw.get("scale_factor", 2), raw.get("image_token_id")
    size = processor.get("size", {"longest_edge": 4 * tower.image_size})
    longest = size.get("longest_edge") if isinstance(size, dict) else size
    if family not in _FAMILIES:
        raise UserError(f"{where}: architecture {family!r} is not supported; supported: {', '.join(_FAMILIES)}")
    numbers = {"text_config.hidden_size": width, "image_token_id": token, "scale_factor": shuffle, "size": longest}
    for key, value in numbers.items():
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{where}: {key} is {value!r}, which is not a positive number; fetch the model again")
    if tower.side % shuffle:
        raise UserError(
            f"{where}: a tile of {tower.side} × {tower.side} patches cannot be divided into squares of {shuffle}; "
            "fetch the model again"
        )
    read = {"longest_edge": tower.image_size}
    if (tile := processor.get("max_image_size", read)) != read or longest > _LONGEST:
        raise UserError(
            f"{where}: the preprocessor makes tiles of {tile} from pictures of {longest} pixels; supported: tiles of "
            f"{tower.image_size}, which the tower reads, from at most {_LONGEST}; fetch both again"
        )
    return SmolVLMVision(
        tower=tower,
        width=width,
        image_token=token,
        pixels=pixels.from_hf(processor, where, Image.Resampling.LANCZOS),
        shuffle=shuffle,
        longest_edge=longest,
        splits=processor.get("do_image_splitting") is not False,
        family=family,
    )


def with_max_image_tokens(vision: SmolVLMVision, features: int) -> SmolVLMVision:
    """The same, but of a picture at most so many features are made: a square one becomes fewer tiles, or one.

    Raises:
      UserError: they are fewer than a tile's.
    """
    tiles = features // vision.features_per_piece
    if tiles < 1:
        raise UserError(
            f"config.student.max_image_tokens is {features}; this student needs {vision.features_per_piece} at least, which "
            "are one tile's"
        )
    side = math.isqrt(max(1, tiles - 1))  # one tile shows the whole picture
    longest = min(vision.longest_edge, side * vision.encoder.image_size)
    return dataclasses.replace(vision, longest_edge=longest, splits=vision.splits and side > 1)


def to_hf(vision: SmolVLMVision) -> dict[str, Any]:
    """What `config.json` says of pictures, besides the `text_config`."""
    return {
        "architectures": [f"{_FAMILIES[vision.family]}ForConditionalGeneration"],
        "model_type": vision.family,
        "vision_config": siglip_config.to_hf(vision.encoder, f"{vision.family}_vision"),
        "scale_factor": vision.shuffle,
        "image_token_id": vision.image_token,
    }


def processor_to_hf(vision: SmolVLMVision) -> dict[str, Any]:
    """The `preprocessor_config.json`; transformers reads `image_seq_len` from `processor_config.json` alone."""
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
    """Every parameter of tower and connector, under the published names."""
    linear = (vision.encoder.hidden_size * vision.shuffle**2, vision.width)
    name = f"{_CONNECTOR}modality_projection.proj.weight"
    return [
        *siglip_config.param_specs(vision.encoder, ("vision", "tower"), _TOWER),
        ParamSpec(("vision", "projector", "kernel"), linear, (name,), False, True),
    ]


def picture(vision: SmolVLMVision, image: Image.Image) -> PreprocessedImage:
    """The picture, in RGB, as the tiles that the tower reads."""
    side, resized = vision.encoder.image_size, vision.pixels.resized
    image = resized(image, *_brought(vision, *image.size))
    rows, cols = _grid(vision, *image.size)
    if (rows, cols) == (1, 1):
        return PreprocessedImage(np.asarray(resized(image, side, side))[None])
    image = resized(image, cols * side, rows * side)
    whole = np.asarray(resized(image, side, side))[None]
    cut = np.asarray(image).reshape(rows, side, cols, side, 3).swapaxes(1, 2)
    return PreprocessedImage(np.concatenate([cut.reshape(-1, side, side, 3), whole]), rows, cols)


def _brought(vision: SmolVLMVision, width: int, height: int) -> tuple[int, int]:
    """Width and height with the longer side as long as the model has it, the other even."""
    ratio, longest = width / height, vision.longest_edge
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def _grid(vision: SmolVLMVision, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles that a picture of this size is stretched to fill."""
    if not vision.splits:
        return 1, 1
    ratio, side = width / height, vision.encoder.image_size
    if width >= height:
        cols = math.ceil(width / side)
        return math.ceil(int(cols * side / ratio) / side), cols
    rows = math.ceil(height / side)
    return rows, math.ceil(int(rows * side * ratio) / side)


def prompt_ids(vision: SmolVLMVision, rows: int, columns: int, tokenizer: Any) -> list[int]:
    """What stands for the picture in a prompt: a token for each feature, and around each tile what says where it was.

    Raises:
      UserError: the tokenizer is not the model's.
    """
    check_token(tokenizer, _IMAGE, vision.image_token)
    tile, text = _IMAGE * vision.features_per_piece, ""
    for row in range(rows):
        text += "".join(f"{_AROUND}<row_{row + 1}_col_{col + 1}>{tile}" for col in range(columns)) + "\n"
    text += "\n" * bool(rows) + _AROUND + _WHOLE + tile + _AROUND
    return tokenizer(text, add_special_tokens=False)["input_ids"]


row_arrays = siglip_config.row_arrays  # a row's tiles
