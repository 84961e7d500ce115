"""Prompts and targets in ScienceQA's formats: one function builds both, for training and for inference.

The notation is that of the paper (Lu et al., NeurIPS 2022, section 4.2): inputs, a dash, targets.

    QCM-A      question, context, multiple choice → answer
    QCM-ALE    … → answer, then lecture and explanation
    QCM-LEA    … → lecture, explanation, then the answer: a chain of thought
    QCML-AE    … with the lecture given; QCMLE-A with lecture and solution given

    Q question   C context (hint and image caption)   M the choices   L lecture   E solution ("explanation")

and, before the dash, for the four benchmark settings QTCH, QTCHL, QTCHLS, QTCHS:

    Q question   T task   C the choices   H hint and image caption   L lecture   S solution
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from sqa_jax.data.problem import LETTERS, Problem
from sqa_jax.errors import UserError

_INPUTS = re.compile(r"(?=.*Q)(?=.*M)[QCMLE]{2,5}")
SETTINGS = ("QTCH", "QTCHL", "QTCHLS", "QTCHS")
_TARGETS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA")
ANSWER_IS = "The answer is"
ANSWER_STYLES = ("letter", "text", "both")


@dataclasses.dataclass(frozen=True)
class Format:
    """A parsed format: the parts of the prompt and of the target, in order."""

    inputs: str
    targets: str

    @classmethod
    def parse(cls, text: str) -> Format:
        """Parses "QCM-ALE"; "->" or "→" may stand for the dash.

        Raises:
          UserError: not a format; the options are listed.
        """
        inputs, _, targets = re.sub(r"→|->", "-", text).partition("-")
        known = inputs in SETTINGS or (_INPUTS.fullmatch(inputs) and len(set(inputs)) == len(inputs))
        if not known or targets not in _TARGETS:
            raise UserError(
                f"format {text!r}: write inputs, a dash, targets, such as QCM-A or QCML-AE; inputs are Q and M with any of "
                f"C, L, E in any order, or one of {', '.join(SETTINGS)}; targets are one of {', '.join(_TARGETS)}"
            )
        return cls(inputs, targets)

    @property
    def answer_first(self) -> bool:
        """Whether the target begins with the answer, so that options can be scored directly."""
        return self.targets.startswith("A")


def answer_text(choices: tuple[str, ...], index: int, style: str) -> str:
    """An answer in one of `ANSWER_STYLES`: "B", the option's text, or "(B) the option's text".

    Raises:
      UserError: the style is not known.
    """
    if style not in ANSWER_STYLES:
        raise UserError(f"config.recipe.answer is {style!r}; choose one of {', '.join(ANSWER_STYLES)}")
    letter = LETTERS[index]
    return {"letter": letter, "text": choices[index], "both": f"({letter}) {choices[index]}"}[style]


def answer_sentence(choices: tuple[str, ...], index: int, style: str) -> str:
    """ "The answer is B." """
    answer = answer_text(choices, index, style)
    return f"{ANSWER_IS} {answer}" + ("" if answer.endswith((".", "!", "?")) else ".")


def sections(problem: Problem, fmt: Format, caption: bool, marks: str = LETTERS) -> list[tuple[str, str, str]]:
    """The parts of a prompt as (kind, label, text); kind is "lecture", "hint", or "" for a part that is never truncated.

    Args:
      caption: whether the context includes the image caption.
      marks: the characters that number the options, in brackets.
    """
    options = " ".join(f"({marks[i]}) {choice}" for i, choice in enumerate(problem.choices))
    image = f"Image: {problem.caption}" if caption and problem.caption else ""
    context = " ".join(text for text in (problem.hint, image) if text) or "N/A"
    if fmt.inputs in SETTINGS:
        parts = {
            "Q": ("", "Question: ", problem.question),
            "T": ("", "Task: ", problem.task or "closed choice"),
            "C": ("", "Choices: ", options),
            "H": ("hint", "Hint: ", context),
            "L": ("lecture", "Lecture: ", problem.lecture),
            "S": ("", "Solution: ", problem.solution),
        }
    else:
        parts = {
            "Q": ("", "Question: ", problem.question),
            "C": ("hint", "Context: ", context),
            "M": ("", "Options: ", options),
            "L": ("lecture", "Lecture: ", problem.lecture),
            "E": ("", "Solution: ", problem.solution),
        }
    return [parts[letter] for letter in fmt.inputs if parts[letter][2]]


def render_target(fmt: Format, choices: tuple[str, ...], answer: int, lecture: str, solution: str, style: str) -> str:
    """The text of the target, without parts that are empty."""
    before, _, after = fmt.targets.partition("A")
    texts = {"L": lecture.strip(), "E": solution.strip()}
    reason = " ".join(texts[letter] for letter in before if texts[letter])
    because = " ".join(texts[letter] for letter in after if texts[letter])
    sentence = answer_sentence(choices, answer, style)
    return f"{reason}\n{sentence}".lstrip() + (f" BECAUSE: {because}" if because else "")


def option_targets(problem: Problem, reason: str, style: str) -> list[str]:
    """The target of each option, up to and including the answer: what scoring by log-likelihood compares.

    Args:
      reason: the text before the answer; "" where the answer comes first.
    """
    fmt = Format("QM", "EA" if reason else "A")
    return [render_target(fmt, problem.choices, i, "", reason, style) for i in range(len(problem.choices))]


class Template:
    """The text around a prompt and its target.

    With a chat template, the prompt is the user's turn and the target the assistant's. Without one, the target follows
    "Answer: " on a line of its own. The encoder of an encoder–decoder gets the prompt and an EOS token, and its decoder
    generates the target after its start token. In each case the target ends with the EOS token. An image is where the
    chat template puts it; without a template it comes first.

    Attributes:
      before, after: the text before the prompt, and between prompt and target, special tokens included.
      around_image: for a prompt with an image, the text before the image, and between image and prompt in place of
        `before`.

    Args:
      chat: use the tokenizer's chat template if it has one.
      vision: the vision config of a vision-language model (`sqa_jax.models.vision`), else None.
    """

    def __init__(self, tokenizer: Any, chat: bool, vision: Any = None):
        bos = tokenizer.bos_token if getattr(tokenizer, "add_bos_token", False) else ""
        self.before, self.after = bos or "", "\nAnswer: "
        if start := getattr(tokenizer, "decoder_start_token", None):
            self.before, self.after = "", tokenizer.eos_token + start
        elif vision is not None and not vision.placeholder:
            self.after = vision.prompt_end
        elif chat and tokenizer.chat_template:
            self.before, self.after, self.around_image = _chat_turn(tokenizer, vision)
            return
        self.around_image = "", self.before


def _chat_turn(tokenizer: Any, vision: Any) -> tuple[str, str, tuple[str, str]]:
    """`before`, `after` and `around_image` of `Template`, by the tokenizer's chat template."""
    # Rendered once around a mark: rendering is slow, and user text must not pass through the template, or a question
    # that spells a special token would become one.
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"

    def around_mark(content: Any) -> tuple[str, str]:
        turn = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(mark)
        if not found or mark in after:
            raise UserError(
                "the student's chat template does not show the user's text exactly once; set --config.recipe.chat=False"
            )
        return before, after

    if vision is None:
        before, after = around_mark(mark)
        return before, after, ("", before)
    text = {"type": "text", "text": mark}
    before, after = around_mark([text])
    with_image, _ = around_mark([{"type": "image"}, text])
    before_image, found, between = with_image.partition(vision.placeholder)
    if not found or vision.placeholder in between:
        raise UserError(
            f"the student's chat template does not show an image as {vision.placeholder} exactly once; set --config.recipe.chat=False"
        )
    return before, after, (before_image, between)
