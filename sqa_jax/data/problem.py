"""A multiple-choice question in ScienceQA's fields, whatever its source."""

from __future__ import annotations

import dataclasses

from sqa_jax.data.image import ImageFile
from sqa_jax.errors import UserError

LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A multiple-choice science question (ScienceQA, Lu et al., NeurIPS 2022, arXiv:2209.09513).

    Fields have ScienceQA's names; a text that the source lacks is "".

    Attributes:
      pid: id of the question in its dataset.
      choices: two to ten options, in the order they are lettered (A), (B), …
      answer: index of the right option, 0-based.
      hint: context as text, "" if none.
      caption: a generated description of the image, "" if none.
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
            raise UserError(f"question {self.pid}: has no question text; correct or remove the row")
        if not 1 <= len(self.choices) <= len(LETTERS):
            raise UserError(
                f"question {self.pid}: has {len(self.choices)} choices, expected 1 to {len(LETTERS)}; correct or remove the row"
            )
        if not 0 <= self.answer < len(self.choices):
            raise UserError(
                f"question {self.pid}: answer index {self.answer} is outside its {len(self.choices)} choices; correct or remove the row"
            )

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return LETTERS[self.answer]
