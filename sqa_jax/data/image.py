"""A question's image: read when somebody looks at it, and decoded in one way whatever form it has."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sqa_jax.errors import UnusableImage

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 89_478_485  # of an image; PIL's own limit, which it only warns of: more are an attack, or a mistake


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A question's image.

    Attributes:
      name: where it comes from, as an error message should say it (usually the file's path).
      read: returns the encoded bytes; may raise `OSError`.
    """

    name: str
    read: Callable[[], bytes] = dataclasses.field(repr=False, compare=False)

    def content(self) -> bytes:
        """The encoded bytes.

        Raises:
          UnusableImage: there is none, or it cannot be read.
        """
        try:
            content = self.read()
        except FileNotFoundError:
            remedy = "fetch the images or use --config.data.images=ignore"
            raise UnusableImage(self.name, "image not found", remedy) from None
        except OSError as error:
            raise UnusableImage(
                self.name, "image cannot be read", "look at this file", error.strerror or str(error)
            ) from None
        if not content:
            raise UnusableImage(self.name, "image file is empty", "fetch this file again")
        return content

    def open(self) -> Image:
        """Decodes it, see `rgb`.

        Raises:
          UnusableImage: as `content`, or it is not an image, damaged or of more than `MOST_PIXELS`.
        """
        from PIL import Image, UnidentifiedImageError

        content = self.content()
        large = UnusableImage(self.name, f"image of more than {MOST_PIXELS:,} pixels", "make it smaller")
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise large
                return rgb(image)
        except (UnusableImage, Image.DecompressionBombError):
            raise large from None
        except MemoryError:  # says nothing of the image
            raise
        except Exception as error:  # of a damaged file decoders raise whatever they stumble over
            detail = "of no known kind" if isinstance(error, UnidentifiedImageError) else str(error)
            raise UnusableImage(self.name, "not a readable image", "fetch this file again", detail) from None


def rgb(image: Image) -> Image:
    """The image in RGB: transparency on white, of an animation the frame it stands at, the first where just opened.

    Raises:
      Exception: whatever PIL raises where the file that it is read from is damaged.
    """
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):  # which PIL would cut at 255, so that nearly all of it were white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
