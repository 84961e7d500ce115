"""Image input of PaliGemma (Beyer et al. 2024, arXiv:2407.07726) and PaliGemma 2 (Steiner et al. 2024, arXiv:2412.03555).

An image is one tile, whatever its aspect ratio, and each of its patches is a feature. Features replace the embeddings of
the prompt's image tokens *after* Gemma's scaling of embeddings by √D, themselves unscaled. A prompt is the image, the
beginning-of-sequence token, the text, and a newline, with bidirectional attention among all of these (a prefix LM).
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

_MODEL_TYPE, _IMAGE = "siglip_vision_model", "<image>"
_ENCODER_PREFIX, _PROJECTOR_PREFIX = "vision_tower.vision_model.", "multi_modal_projector."
SPECIAL_TOKENS = (_IMAGE,)  # that a tokenizer must have
TENSOR_NAMES = TensorNames(
    (
        ("model.", "language_model.model.", "model.language_model."),
        ("lm_head.", "language_model.lm_head.", "lm_head."),
        (_ENCODER_PREFIX, _ENCODER_PREFIX, "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."),
        (_PROJECTOR_PREFIX, _PROJECTOR_PREFIX, "model.multi_modal_projector."),
    )
)


@dataclasses.dataclass(frozen=True)
class PaliGemmaVision:
    """Vision configuration of a checkpoint.

    Attributes:
      encoder: shape of the vision encoder.
      width: of a feature, which is that of the language model.
      image_token: id of the image token, one for each feature; it may be beyond the embedding table.
      pixels: resampling and normalization.
    """

    encoder: SiglipConfig
    width: int
    image_token: int
    pixels: PixelTransform

    uses_mrope: ClassVar[bool] = False  # features have positions in a row, as text tokens do
    placeholder: ClassVar[str] = ""  # of an image in a chat template; there is none
    prompt_end: ClassVar[str] = "\n"  # text between prompt and answer

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """Layers and width of the vision encoder, and pixels along a patch's side."""
        return self.encoder.shape

    @property
    def features_per_piece(self) -> int:
        """Features of one tile."""
        return self.encoder.patches_per_side**2


def from_hf(raw: dict[str, Any], processor: dict[str, Any], where: str) -> PaliGemmaVision:
    """The vision configuration of `config.json` and `preprocessor_config.json` ({} for the published settings).

    Raises:
      UserError: the encoder or an option is not supported, a key is missing, or sizes contradict each other.
    """
    processor = pixels.image_processor_settings(processor)
    encoder = siglip_config.from_hf(raw.get("vision_config") or {}, (_MODEL_TYPE,), where)
    width, text = raw.get("projection_dim", 2048), (raw.get("text_config") or {}).get("hidden_size")
    if not isinstance(width, int) or width != (text or width):
        raise UserError(
            f"{where}: features of width {width} (projection_dim) do not fit a language model of {text}; "
            "fetch the model again"
        )
    token = raw.get("image_token_index", raw.get("image_token_id"))
    if not isinstance(token, int):
        raise UserError(f"{where}: image_token_index is {token!r}, not a token's id; fetch config.json again")
    expected = {"height": encoder.image_size, "width": encoder.image_size}
    if (size := processor.get("size", expected)) != expected:
        raise UserError(
            f"{where}: the preprocessor makes images of {size}, the vision encoder takes {encoder.image_size} pixels a side; "
            "fetch both again"
        )
    return PaliGemmaVision(encoder, width, token, pixels.from_hf(processor, where, Image.Resampling.BICUBIC))


def with_max_image_tokens(vision: PaliGemmaVision, count: int) -> PaliGemmaVision:
    """The same configuration: every image is one tile.

    Raises:
      UserError: a tile has another number of features.
    """
    if count != vision.features_per_piece:
        raise UserError(
            f"config.student.max_image_tokens is {count}; this student encodes every image as "
            f"{vision.features_per_piece}: leave it at 0"
        )
    return vision


def to_hf(vision: PaliGemmaVision) -> dict[str, Any]:
    """The contents of `config.json` but for the `text_config`."""
    options = {"projection_dim": vision.width, "vision_use_head": False}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "vision_config": {**siglip_config.to_hf(vision.encoder, _MODEL_TYPE), **options},
        "projection_dim": vision.width,
        "hidden_size": vision.width,
        "image_token_index": vision.image_token,
    }


def processor_to_hf(vision: PaliGemmaVision) -> dict[str, Any]:
    """The contents of `preprocessor_config.json`."""
    side = vision.encoder.image_size
    return {
        "processor_class": "PaliGemmaProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": vision.features_per_piece,
        "size": {"height": side, "width": side},
        **pixels.to_hf(vision.pixels),
    }


def param_specs(vision: PaliGemmaVision) -> list[ParamSpec]:
    """Every parameter of vision encoder and projector, under the published names; see `TENSOR_NAMES` for others."""
    linear = (vision.encoder.hidden_size, vision.width)
    return [
        *siglip_config.param_specs(vision.encoder, ("vision", "tower"), _ENCODER_PREFIX),
        ParamSpec(("vision", "projector", "kernel"), linear, (f"{_PROJECTOR_PREFIX}linear.weight",), False, True),
        ParamSpec(("vision", "projector", "bias"), linear[1:], (f"{_PROJECTOR_PREFIX}linear.bias",), False, False),
    ]


def preprocess_image(vision: PaliGemmaVision, image: Image.Image) -> PreprocessedImage:
    """An RGB image as the one tile that the vision encoder takes."""
    side = vision.encoder.image_size
    return PreprocessedImage(np.asarray(vision.pixels.resize(image, side, side))[None])


def prompt_ids(vision: PaliGemmaVision, rows: int, columns: int, tokenizer: Any) -> list[int]:
    """An image's tokens in a prompt: one for each feature.

    Raises:
      UserError: the tokenizer is not the model's.
    """
    check_token(tokenizer, _IMAGE, vision.image_token)
    return [vision.image_token] * vision.features_per_piece


encoder_inputs = siglip_config.encoder_inputs
