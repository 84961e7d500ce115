"""Questions that only their image answers: count, colour, position, a map, the labels of a diagram.

Every text is balanced: of the questions of a split with the same words and the same options in the same order, each option
is right equally often. A model without the image is therefore at chance (25 %), whatever it learned. All images differ, over
all splits. The shifted variant asks the same in other words and on another background.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

from sqa_jax.data.sample.scenes import LETTERS, SHAPES, SIDE

SIZES = {"train": 20, "val": 1, "test": 3}  # blocks of a split; see `BLOCK`
BLOCK = 64  # questions of each kind in a block: up to 4 texts × 4 orders of the options × 4 answers
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 200, 40)}
LANDS = {"forest": COLOURS["green"], "desert": COLOURS["yellow"], "sea": COLOURS["blue"], "swamp": (150, 100, 160)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
PARTS = ("flower", "leaf", "stem", "root")
_INK = (30, 30, 30)
PAPERS = ((128, 128, 128), (255, 255, 255))  # background, and that of the shifted variant
Marks = list[list[Any]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Questions of one kind.

    Attributes:
      skill, subject, topic, category, grade, lecture: as ScienceQA labels questions.
      texts: the question, with "{thing}", and the same in the words of the shifted variant.
      solution: with "{thing}" and "{answer}".
      things: what a question names.
      options: what can be right.
      marks: draws an image of a thing for which an option is right.
    """

    skill: str
    subject: str
    topic: str
    category: str
    grade: int
    lecture: str
    texts: tuple[str, str]
    solution: str
    things: tuple[str, ...]
    options: tuple[str, ...]
    marks: Callable[[random.Random, str, str], Marks]


def _quadrant(rng: random.Random, place: int) -> tuple[int, int]:
    """A random centre in a quadrant of the image; the quadrant by its index in `PLACES`."""
    half = SIDE // 2
    return half * (place % 2) + rng.randint(7, half - 7), half * (place // 2) + rng.randint(7, half - 7)


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice(list(COLOURS.values()))


def _count(rng: random.Random, thing: str, answer: str) -> Marks:
    """So many of a shape, in distinct cells of a grid."""
    cells = rng.sample(range(9), int(answer))
    centres = [(8 + 16 * (cell % 3) + rng.randint(-2, 2), 8 + 16 * (cell // 3) + rng.randint(-2, 2)) for cell in cells]
    return [[thing, _colour(rng), x, y, 5] for x, y in centres]


def _coloured(rng: random.Random, thing: str, answer: str) -> Marks:
    return [[thing, COLOURS[answer], *_quadrant(rng, rng.randrange(4)), 6]]


def _placed(rng: random.Random, thing: str, answer: str) -> Marks:
    return [[thing, _colour(rng), *_quadrant(rng, PLACES.index(answer)), 6]]


def _map(rng: random.Random, thing: str, answer: str) -> Marks:
    """Four lands that meet at a point, and a town in one of them."""
    x, y = rng.randint(19, 29), rng.randint(19, 29)
    lands = rng.sample(list(LANDS), 4)
    left, top = (0, x, 0, x), (0, 0, y, y)
    right, bottom = (x - 1, SIDE, x - 1, SIDE), (y - 1, y - 1, SIDE, SIDE)
    boxes = list(zip(left, top, right, bottom, strict=True))
    town = boxes[lands.index(answer)]
    centre = rng.randint(town[0] + 5, town[2] - 5), rng.randint(town[1] + 5, town[3] - 5)
    return [*(["box", LANDS[land], *box] for land, box in zip(lands, boxes, strict=True)), ["circle", _INK, *centre, 2]]


def _labelled(rng: random.Random, thing: str, answer: str) -> Marks:
    """A plant whose parts have letters beside them."""
    x, y, beside = rng.randint(10, 16), rng.randint(-1, 1), rng.randint(36, 39)
    letters = [letter for letter in LETTERS if letter != answer]
    rng.shuffle(letters)
    letters.insert(PARTS.index(thing), answer)
    green, flower = COLOURS["green"], rng.choice([COLOURS["red"], COLOURS["yellow"], COLOURS["blue"]])
    plant: Marks = [
        ["line", green, x, 8 + y, x, 36 + y], ["oval", green, x, 15 + y, x + 10, 21 + y], ["circle", flower, x, 7 + y, 5],
        *(["line", (130, 90, 50), x, 35 + y, x + dx, 44 + y] for dx in (-6, 0, 6)),
    ]  # fmt: skip
    return plant + [[letter, _INK, beside, 6 + 12 * k + y, 4] for k, letter in enumerate(letters)]


KINDS = (
    Kind(
        "Count what a picture shows", "natural science", "units-and-measurement", "Observation", 1,
        "To count, look at each thing once.",
        ("How many {thing}s are there?", "Say the number of {thing}s."),
        "There: {answer} of them.", SHAPES, ("1", "2", "3", "4"), _count,
    ),
    Kind(
        "Name the colour of a shape", "natural science", "physics", "Observation", 1,
        "Things differ in shape and in colour.",
        ("What colour is the {thing}?", "Name the hue of the {thing}."),
        "The {thing} is {answer}.", SHAPES, tuple(COLOURS), _coloured,
    ),
    Kind(
        "Find a place in a picture", "natural science", "physics", "Position", 2,
        "Where something is can be said by top and bottom, left and right.",
        ("Where is the {thing}?", "Find the {thing}."),
        "The {thing} is at the {answer}.", SHAPES, PLACES, _placed,
    ),
    Kind(
        "Read a map of lands", "social science", "geography", "Maps", 3,
        "On this map forests are green, deserts yellow, seas blue and swamps violet. A black dot is a town.",
        ("What is around the {thing}?", "Which land has the {thing}?"),
        "The {thing} lies in a {answer}.", ("town",), tuple(LANDS), _map,
    ),
    Kind(
        "Read the labels of a diagram", "natural science", "biology", "Plants", 4,
        "From top to bottom a plant has a flower, leaves, a stem and roots.",
        ("Which letter marks the {thing}?", "The {thing} has what label?"),
        "The letter beside the {thing} is {answer}.", PARTS, LETTERS, _labelled,
    ),
)  # fmt: skip


@functools.lru_cache(maxsize=4)
def generate(shifted: bool = False, seed: int = 0) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Makes the questions: the same for a seed on every machine.

    Returns:
      {pid: row in ScienceQA's own form, with "scene", from which `scenes.draw_scene` draws the image}, {split: [pid]}.
    """
    drawn: set[str] = set()
    rows: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {}
    for split, blocks in SIZES.items():
        rng = random.Random(f"{seed}/{'shifted/' * shifted}{split}")
        questions = [row for kind in KINDS for row in _balanced(rng, kind, blocks, shifted, split, drawn)]
        rng.shuffle(questions)
        splits[split] = [str(len(rows) + k) for k in range(1, len(questions) + 1)]
        rows |= zip(splits[split], questions, strict=True)
    return rows, splits


def _balanced(rng: random.Random, kind: Kind, blocks: int, shifted: bool, split: str, drawn: set[str]):
    """A kind's questions: each text with each order of the options, of which each is right equally often."""
    orders = [(*kind.options[k:], *kind.options[:k]) for k in range(4)]
    cells = list(itertools.product(kind.things, orders, kind.options))
    for thing, choices, answer in cells * (blocks * BLOCK // len(cells)):
        marks = _new_marks(rng, kind, thing, answer, drawn)
        yield {
            "question": kind.texts[shifted].format(thing=thing),
            "choices": list(choices),
            "answer": choices.index(answer),
            "hint": "",
            "image": "image.png",
            "task": "closed choice",
            "grade": f"grade{kind.grade}",
            "subject": kind.subject,
            "topic": kind.topic,
            "category": kind.category,
            "skill": kind.skill,
            "lecture": kind.lecture,
            "solution": kind.solution.format(thing=thing, answer=answer),
            "split": split,
            "scene": {"paper": PAPERS[shifted], "marks": marks},
        }


def _new_marks(rng: random.Random, kind: Kind, thing: str, answer: str, drawn: set[str]) -> Marks:
    """Marks unlike all before them, in whatever order they are drawn."""
    while True:
        marks = kind.marks(rng, thing, answer)
        key = json.dumps(sorted(map(json.dumps, marks)))
        if key not in drawn:
            drawn.add(key)
            return marks
