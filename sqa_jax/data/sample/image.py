"""The sample's images: what each caption says, as a small drawing."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

SIZE = (320, 240)
_INK = (30, 30, 30)


def draw_image(drawing: Mapping[str, Any]) -> bytes:
    """PNG of a drawing's description (see `skill.Draft.drawing`), the same bytes each time."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=14)
    {
        "magnets": _magnets,
        "thermometer": _thermometer,
        "chain": _chain,
        "map": _map,
        "bars": _bars,
        "timeline": _timeline,
    }[drawing["kind"]](pen, drawing)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _magnets(pen, drawing) -> None:
    for k, poles in enumerate(drawing["poles"]):
        for j, pole in enumerate(poles):
            x = 20 + k * 150 + j * 65
            pen.rectangle([x, 90, x + 65, 150], fill=(215, 70, 70) if pole == "N" else (80, 120, 215), outline=_INK)
            pen.text((x + 32, 120), pole, fill="white", anchor="mm", font_size=26)


def _thermometer(pen, drawing) -> None:
    def height(value: float) -> float:
        return 190 - (value + 15) * 2.6

    pen.rounded_rectangle([145, 15, 165, 200], 10, outline=_INK, width=2)
    pen.ellipse([135, 190, 175, 230], fill=(210, 40, 40), outline=_INK, width=2)
    pen.rectangle([150, height(drawing["value"]), 160, 205], fill=(210, 40, 40))
    for value in range(-15, 50, 5):
        pen.line([165, height(value), 173 if value % 10 else 180, height(value)], fill=_INK)
        if value % 10 == 0:
            pen.text((186, height(value)), f"{value}°C", fill=_INK, anchor="lm")


def _chain(pen, drawing) -> None:
    links = drawing["links"]
    for k, link in enumerate(links):
        y = 30 + k * 58
        pen.rounded_rectangle([80, y - 17, 240, y + 17], 8, outline=_INK, width=2, fill=(235, 245, 230))
        pen.text((160, y), link, fill=_INK, anchor="mm")
        if k + 1 < len(links):
            pen.line([160, y + 17, 160, y + 38], fill=_INK, width=2)
            pen.polygon([(154, y + 32), (166, y + 32), (160, y + 40)], fill=_INK)


def _map(pen, drawing) -> None:
    pen.rectangle([10, 10, 250, 230], fill=(232, 243, 222), outline=_INK)
    for name, column, row in drawing["towns"]:
        x, y = 45 + column * 42, 205 - row * 42
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=(190, 40, 40))
        pen.text((x, y - 12), name, fill=_INK, anchor="mm")
    for label, angle in zip("NESW", (-90, 0, 90, 180), strict=True):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        pen.line([285, 60, 285 + 18 * dx, 60 + 18 * dy], fill=_INK, width=2)
        pen.text((285 + 27 * dx, 60 + 27 * dy), label, fill=_INK, anchor="mm")


def _bars(pen, drawing) -> None:
    pen.line([40, 200, 310, 200], fill=_INK, width=2)
    pen.line([40, 20, 40, 200], fill=_INK, width=2)
    for value in range(0, 13, 2):
        pen.text((34, 200 - value * 14), str(value), fill=_INK, anchor="rm")
        pen.line([40, 200 - value * 14, 310, 200 - value * 14], fill=(225, 225, 225))
    for k, (name, count) in enumerate(drawing["bars"]):
        x = 65 + k * 85
        pen.rectangle([x, 200 - count * 14, x + 50, 200], fill=(90, 140, 200), outline=_INK)
        pen.text((x + 25, 215), name, fill=_INK, anchor="mm")


def _timeline(pen, drawing) -> None:
    pen.line([40, 20, 40, 220], fill=_INK, width=3)
    for k, (year, event) in enumerate(drawing["events"]):
        y = 45 + k * 75
        pen.ellipse([34, y - 6, 46, y + 6], fill=(60, 110, 180), outline=_INK)
        pen.text((58, y - 9), str(year), fill=_INK, anchor="lm", font_size=16)
        pen.text((58, y + 10), event, fill=_INK, anchor="lm")
