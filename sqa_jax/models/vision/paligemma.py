"""Pictures of PaliGemma (Beyer et al. 2024, arXiv:2407.07726) and PaliGemma 2 (Steiner et al. 2024, arXiv:2412.03555).

A picture is one tile, whatever its proportions, and each of its patches is a feature. Features take the places of the
prompt's image tokens *behind* Gemma's scaling of embeddings by √D, themselves unscaled. In a prompt, pictures go first,
then the beginning-of-sequence token, the text, and a newline; all of these see each other.
"""

from __future__ import annotations

import dataclasses
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

_KIND, _IMAGE = "siglip_vision_model", "<image>"
_TOWER, _PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
WORDS = (_IMAGE,)  # what a tokenizer must have as tokens
NAMES = TensorNames(
    (
        ("model.", "language_model.model.", "model.language_model."),
        ("lm_head.", "language_model.lm_head.", "lm_head."),
        (_TOWER, _TOWER, "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."),
        (_PROJECTOR, _PROJECTOR, "model.multi_modal_projector."),
    )
)


@dataclasses.dataclass(frozen=True)
class PaliGemmaVision:
    """What a checkpoint's files say of pictures.

    Attributes:
      tower: shape of the vision tower.
      width: of a feature, which is the language half's.
      image_token: id that holds a feature's place in a prompt; it may lie behind the embedding table.
      pixels: how colours become numbers.
    """

    tower: SiglipConfig
    width: int
    image_token: int
    pixels: PixelTransform

    uses_mrope: ClassVar[bool] = False  # features stand in a row, as words do
    placeholder: ClassVar[str] = ""  # there is no chat template
    prompt_end: ClassVar[str] = "\n"  # text between prompt and answer

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """Layers and width of the tower, and pixels of a patch's side."""
        return self.tower.shape

    @property
    def features_per_piece(self) -> int:
        """Features that one tile becomes."""
        return self.tower.side**2


def from_hf(raw: dict[str, Any], processor: dict[str, Any], where: str) -> PaliGemmaVision:
    """What is said of pictures in `config.json` and in `preprocessor_config.json` ({} for the published settings).

    Raises:
      UserError: the tower or an option is not supported, a key is missing, or sizes contradict each other.
    """
    processor = pixels.image_processor_settings(processor)
    tower = siglip_config.from_hf(raw.get("vision_config") or {}, (_KIND,), where)
    width, text = raw.get("projection_dim", 2048), (raw.get("text_config") or {}).get("hidden_size")
    if not isinstance(width, int) or width != (text or width):
        raise UserError(
            f"{where}: features of width {width} (projection_dim) do not fit a language half of {text}; "
            "fetch the model again"
        )
    token = raw.get("image_token_index", raw.get("image_token_id"))
    if not isinstance(token, int):
        raise UserError(f"{where}: image_token_index is {token!r}, not a token's id; fetch config.json again")
    read = {"height": tower.image_size, "width": tower.image_size}
    if (size := processor.get("size", read)) != read:
        raise UserError(
            f"{where}: the preprocessor makes pictures of {size}, the tower reads {tower.image_size} pixels a side; "
            "fetch both again"
        )
    return PaliGemmaVision(tower, width, token, pixels.from_hf(processor, where, Image.Resampling.BICUBIC))


def with_max_image_tokens(vision: PaliGemmaVision, features: int) -> PaliGemmaVision:
    """The same: each picture is one tile.

    Raises:
      UserError: that has another number of features.
    """
    if features != vision.features_per_piece:
        raise UserError(
            f"config.student.max_image_tokens is {features}; this student shows every picture as "
            f"{vision.features_per_piece}: leave it at 0"
        )
    return vision


def to_hf(vision: PaliGemmaVision) -> dict[str, Any]:
    """What `config.json` says of pictures, besides the `text_config`."""
    own = {"projection_dim": vision.width, "vision_use_head": False}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "vision_config": {**siglip_config.to_hf(vision.encoder, _KIND), **own},
        "projection_dim": vision.width,
        "hidden_size": vision.width,
        "image_token_index": vision.image_token,
    }


def processor_to_hf(vision: PaliGemmaVision) -> dict[str, Any]:
    """The `preprocessor_config.json`."""
    side = vision.encoder.image_size
    return {
        "processor_class": "PaliGemmaProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": vision.features_per_piece,
        "size": {"height": side, "width": side},
        **pixels.to_hf(vision.pixels),
    }


def param_specs(vision: PaliGemmaVision) -> list[ParamSpec]:
    """Every parameter of tower and connector, under the published names; see `NAMES` for others."""
    linear = (vision.encoder.hidden_size, vision.width)
    return [
        *siglip_config.param_specs(vision.encoder, ("vision", "tower"), _TOWER),
        ParamSpec(("vision", "projector", "kernel"), linear, (f"{_PROJECTOR}linear.weight",), False, True),
        ParamSpec(("vision", "projector", "bias"), linear[1:], (f"{_PROJECTOR}linear.bias",), False, False),
    ]


def picture(vision: PaliGemmaVision, image: Image.Image) -> PreprocessedImage:
    """The picture, in RGB, as the one tile that the tower reads."""
    side = vision.encoder.image_size
    return PreprocessedImage(np.asarray(vision.pixels.resized(image, side, side))[None])


def prompt_ids(vision: PaliGemmaVision, rows: int, columns: int, tokenizer: Any) -> list[int]:
    """What stands for the picture in a prompt: a token for each feature.

    Raises:
      UserError: the tokenizer is not the model's.
    """
    check_token(tokenizer, _IMAGE, vision.image_token)
    return [vision.image_token] * vision.features_per_piece


row_arrays = siglip_config.row_arrays  # a row's tiles
