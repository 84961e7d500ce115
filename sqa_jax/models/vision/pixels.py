"""From a picture to the numbers that a vision tower reads, as transformers' image processors have them.

Written with PIL and NumPy alone: the pixels of a data set must not depend on whether torchvision is installed (whose
resampling differs), nor on the release of transformers (which treat transparency differently).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sqa_jax.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class PixelTransform:
    """How colours become numbers.

    Attributes:
      resample: PIL's number of the filter for resizing.
      rescale: colours of 0 to 255 are multiplied by it.
      mean, std: of the three channels: they are then shifted and divided.
    """

    resample: int
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The picture in another size, whatever that does to its proportions."""
        return image.resize((width, height), self.resample)

    def normalised(self, colours: jax.Array) -> jax.Array:
        """Colours [..., 3] of 0 to 255 as a tower reads them, float32."""
        values = colours.astype(np.float32) * np.float32(self.rescale)
        return (values - np.float32(self.mean)) / np.float32(self.std)


def image_processor_settings(processor: dict[str, Any]) -> dict[str, Any]:
    """The image processor's part of `preprocessor_config.json`, or of `processor_config.json`, where it is nested."""
    return processor.get("image_processor", processor)


def from_hf(processor: dict[str, Any], where: str, resample: Image.Resampling) -> PixelTransform:
    """How colours become numbers, from an image processor's settings.

    Args:
      resample: where they name no filter.

    Raises:
      UserError: a step is switched off that the towers need, or a number is impossible.
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


def to_hf(pixels: PixelTransform) -> dict[str, Any]:
    """What an image processor's settings say of it."""
    return {
        "do_convert_rgb": True, "do_resize": True, "resample": pixels.resample, "do_rescale": True,
        "rescale_factor": pixels.rescale, "do_normalize": True, "image_mean": [*pixels.mean], "image_std": [*pixels.std],
    }  # fmt: skip
