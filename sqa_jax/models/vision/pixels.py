"""Image preprocessing: resizing, rescaling and normalization, as in transformers' image processors.

Written with PIL and NumPy alone: pixels must not depend on whether torchvision is installed (whose resampling differs),
nor on the release of transformers (which treat transparency differently).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from sqa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PixelTransform:
    """Resampling filter and normalization of pixels.

    Attributes:
      resample: PIL's number of the resampling filter.
      rescale: factor of values of 0 to 255.
      mean, std: of the three channels, for normalization after rescaling.
    """

    resample: int
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The image in another size, without regard to its aspect ratio."""
        return image.resize((width, height), Image.Resampling(self.resample))

    def normalize(self, values: Shaped[Any, "*dims 3"]) -> Float[Any, "*dims 3"]:
        """Values of 0 to 255, NumPy's or JAX's, as the encoder's float32 input."""
        rescaled = values.astype(np.float32) * np.float32(self.rescale)
        return (rescaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def image_processor_settings(processor: dict[str, Any]) -> dict[str, Any]:
    """The image processor's part of `preprocessor_config.json`, or of `processor_config.json`, where it is nested."""
    return processor.get("image_processor", processor)


def from_hf(processor: dict[str, Any], where: str, resample: Image.Resampling) -> PixelTransform:
    """The transform of an image processor's settings.

    Args:
      resample: where they name no filter.

    Raises:
      UserError: a step that the encoders need is switched off, or a number is impossible.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(step) is False:
            raise UserError(f"{where}: {step} is false, which is not supported; fetch the model's preprocessor again")
    default = PixelTransform(resample)
    try:
        return PixelTransform(
            int(Image.Resampling(processor.get("resample", resample))),
            float(processor.get("rescale_factor", default.rescale)),
            _channels(processor.get("image_mean", default.mean)),
            _channels(processor.get("image_std", default.std), positive=True),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}, in the preprocessor's settings; fetch the model again") from None


def _channels(values: Any, positive: bool = False) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or (positive and min(numbers) <= 0):
        raise ValueError(f"{values} are not {'positive ' * positive}numbers of three channels")
    return numbers


def to_hf(transform: PixelTransform) -> dict[str, Any]:
    """The transform as an image processor's settings."""
    return {
        "do_convert_rgb": True, "do_resize": True, "resample": transform.resample, "do_rescale": True,
        "rescale_factor": transform.rescale, "do_normalize": True, "image_mean": [*transform.mean],
        "image_std": [*transform.std],
    }  # fmt: skip
