"""One ScienceQA question, whatever source it came from."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

from sqa_jax.errors import UserError

LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A question's image, read only when somebody looks at it.

    Attributes:
      name: where it comes from, as an error message should say it (usually the file's path).
      read: returns the encoded bytes; may raise `OSError`.
    """

    name: str
    read: Callable[[], bytes] = dataclasses.field(repr=False, compare=False)

    def open(self):
        """Decodes to a `PIL.Image.Image` in RGB.

        Raises:
          UserError: the file is missing or is not an image.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.read())) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise UserError(
                f"{self.name}: image not found; fetch the images or use --config.data.images=ignore"
            ) from None
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"{self.name}: not a readable image ({error}); fetch this file again") from None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A multiple-choice science question (ScienceQA, Lu et al., NeurIPS 2022, arXiv:2209.09513).

    Fields carry ScienceQA's own names; a text that the source lacks is "".

    Attributes:
      pid: the dataset's own id of the question, a string.
      choices: two to ten options, in the order they are lettered (A), (B), …
      answer: index of the right option, 0-based.
      hint: textual context, "" if none.
      caption: a machine-made description of the image, "" if none.
      image: the question's image, or None.
      grade: "grade1" … "grade12", or "" where unknown.
      lecture: background knowledge that the question rests on.
      solution: explanation of the right answer.
    """

    pid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    caption: str = ""
    image: ImageFile | None = None
    task: str = ""
    grade: str = ""
    subject: str = ""
    topic: str = ""
    category: str = ""
    skill: str = ""
    lecture: str = ""
    solution: str = ""
    split: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise UserError(f"question {self.pid}: has no question text; mend or remove the row")
        if not 1 <= len(self.choices) <= len(LETTERS):
            raise UserError(
                f"question {self.pid}: has {len(self.choices)} choices, expected 1 to {len(LETTERS)}; mend or remove the row"
            )
        if not 0 <= self.answer < len(self.choices):
            raise UserError(
                f"question {self.pid}: answer index {self.answer} is outside its {len(self.choices)} choices; mend or remove the row"
            )

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return LETTERS[self.answer]
