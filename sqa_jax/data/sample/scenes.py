"""Small images drawn from a list of marks: shapes, lines and letters without a font, the same pixels on every machine."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

SIDE = 48  # pixels
SHAPES = ("circle", "square", "triangle", "ring")
# Strokes of a letter in a box from (-1, -1) to (1, 1).
_LETTERS = {
    "E": ((1, -1, -1, -1), (-1, -1, -1, 1), (-1, 1, 1, 1), (-1, 0, 1, 0)),
    "T": ((-1, -1, 1, -1), (0, -1, 0, 1)),
    "X": ((-1, -1, 1, 1), (-1, 1, 1, -1)),
    "L": ((-1, -1, -1, 1), (-1, 1, 1, 1)),
}
LETTERS = tuple(_LETTERS)


def draw_scene(scene: Mapping[str, Any]) -> bytes:
    """PNG of a scene, `SIDE` pixels a side.

    Args:
      scene: {"paper": colour, "marks": [[what, colour, x, y, …], …]} with a mark of `SHAPES` or `LETTERS` at its centre
        (x, y), with half its size; "box" and "oval" from (x, y) to (x, y); "line" likewise, two pixels wide.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), tuple(scene["paper"]))
    pen = ImageDraw.Draw(image)
    for what, colour, *numbers in scene["marks"]:
        _mark(pen, what, tuple(colour), numbers)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _mark(pen: Any, what: str, colour: tuple[int, ...], numbers: Sequence[int]) -> None:
    if what == "box":
        pen.rectangle(numbers, fill=colour)
    elif what == "oval":
        pen.ellipse(numbers, fill=colour)
    elif what == "line":
        pen.line(numbers, fill=colour, width=2)
    else:
        x, y, r = numbers
        if what in _LETTERS:
            for stroke in _LETTERS[what]:
                ends = [c + r * part for c, part in zip((x, y, x, y), stroke, strict=True)]
                pen.line(ends, fill=colour, width=2)
        elif what == "circle":
            pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
        elif what == "square":
            pen.rectangle([x - r + 1, y - r + 1, x + r - 1, y + r - 1], fill=colour)
        elif what == "triangle":
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
        else:  # a ring
            pen.ellipse([x - r, y - r, x + r, y + r], outline=colour, width=3)
