"""Teacher prompts, and the request hash over everything that determines the reply."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sqa_jax.data.image import ImageFile
from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.errors import UserError
from sqa_jax.files import sha256_json
from sqa_jax.prompts.formats import SETTINGS, Format, sections
from sqa_jax.teach.teacher import Request

REPLIES = ("json", "text")
_NUMBERS = "0123456789"  # options are numbered (0), (1), … as in the recorded replies of the benchmark

_INSTRUCTIONS = {
    "json": (
        "Answer this multiple-choice science question. Think step by step first, then decide. Reply with one JSON "
        "object and nothing else:\n"
        '{"reasoning": "your step-by-step reasoning that leads to the answer", "answer": the number of the right '
        'option, "solution": "a short explanation of why that option is right, as a teacher gives it to a student"}'
    ),
    "text": (
        "Answer this multiple-choice science question. Think step by step, then end with one line that says "
        '"The answer is (N).", N being the right option\'s number.'
    ),
}


def teacher_prompt(problem: Problem, setting: str, reply: str, caption: bool) -> str:
    """The text prompt of one question.

    Args:
      setting: fields included: QTCH, QTCHL, QTCHLS or QTCHS.
      reply: "json" asks for reasoning, answer and solution; "text" for reasoning, then the answer.
      caption: include the image's caption.
    """
    parts = sections(problem, Format(setting, "A"), caption, _NUMBERS)
    return "\n".join([_INSTRUCTIONS[reply], "", *(label + text for _, label, text in parts)])


def make_requests(problems: Sequence[Problem], settings: Any, identity: Mapping[str, Any]) -> list[Request]:
    """The requests for all questions and samples, question by question.

    Every image is read once, so that a missing one is found before anything is paid.

    Args:
      settings: `config.teach`.
      identity: `Teacher.identity`.

    Raises:
      UserError: the setting or the reply format is unknown, or an image is missing or corrupt.
    """
    if settings.setting not in SETTINGS:
        raise UserError(f"config.teach.setting is {settings.setting!r}; choose one of {', '.join(SETTINGS)}")
    if settings.reply not in REPLIES:
        raise UserError(f"config.teach.reply is {settings.reply!r}; choose json or text")
    requests = []
    for problem in problems:
        text = teacher_prompt(problem, settings.setting, settings.reply, settings.caption)
        image = problem.image if settings.image else None
        hashed = {
            "prompt": text, "temperature": settings.temperature, "json": settings.reply == "json",
            "image": hashlib.sha256(encoded_image(image)[1]).hexdigest() if image else None, **identity,
        }  # fmt: skip
        # Without config.teach.max_output_tokens: a complete reply is the same under a higher limit, and a truncated one
        # is selected by its status. Raising the limit must not pay for everything twice.
        for sample in range(settings.samples):
            requests.append(
                Request(sha256_json({**hashed, "pid": problem.pid, "sample": sample}), problem.pid, sample, text, image)
            )
    return requests


def encoded_image(image: ImageFile) -> tuple[str, bytes]:
    """(MIME type, bytes) of an image in a format that every service accepts; others are converted to PNG.

    Raises:
      UserError: the file is missing or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = image.read()
        with Image.open(io.BytesIO(content)) as opened:
            kind = opened.format
    except FileNotFoundError:
        raise UserError(
            f"{image.name}: image not found; fetch the images, or ask without them: --config.teach.image=False"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{image.name}: not a readable image ({error}); fetch this file again") from None
    if kind in ("PNG", "JPEG", "WEBP"):
        return f"image/{kind.lower()}", content
    converted = io.BytesIO()
    image.open().save(converted, "PNG")
    return "image/png", converted.getvalue()


def prompt_of_record(problem: Problem, record: TeacherRecord) -> str:
    """The approximate prompt of a recorded reply, for estimating its tokens if none were counted."""
    return teacher_prompt(
        problem,
        record.setting if record.setting.startswith("QTCH") else "QTCH",
        "json" if record.solution else "text",
        True,
    )
