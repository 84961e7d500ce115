"""The embedded sample: science questions by a seeded generator, so that nothing has to be downloaded.

The questions have ScienceQA's form, not its content: 36 skills over its three subjects, with hints, lectures,
solutions, captions and drawn images. Held-out questions ask about entities (animals, countries, words, …) that
no training question mentions, and the same options occur with different questions, so a bag of words does not
answer them; a pretrained language model's knowledge does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqa_jax.data.sample import language, natural, social, teacher
from sqa_jax.data.sample.image import draw_image
from sqa_jax.data.sample.skill import Draft, Skill, SplitSampler
from sqa_jax.files import atomic_directory, write_json

SIZES = {"train": 1400, "val": 200, "test": 500}
SKILLS: list[Skill] = [*natural.SKILLS, *social.SKILLS, *language.SKILLS]


@dataclasses.dataclass(frozen=True)
class Sample:
    """The questions in ScienceQA's format.

    Attributes:
      problems: {pid: row}; a row with an image also has "drawing", from which `draw` draws it.
      splits: {split: [pid]}.
      captions: {pid: caption}.
    """

    problems: dict[str, dict[str, Any]]
    splits: dict[str, list[str]]
    captions: dict[str, str]


@functools.lru_cache(maxsize=2)
def generate(seed: int = 0) -> Sample:
    """The sample of a seed, the same on every machine. No two questions are equal, over all splits."""
    used: set[tuple] = set()
    made: list[tuple[str, Skill, Draft]] = []
    for split, size in SIZES.items():
        # One random generator for each split and skill: changing one skill leaves the others unchanged.
        rngs = [random.Random(f"{seed}/{split}/{skill.name}") for skill in SKILLS]
        for number in range(size):
            skill, rng = SKILLS[number % len(SKILLS)], rngs[number % len(SKILLS)]
            made.append((split, skill, _new(skill, SplitSampler(rng, held_out=split != "train"), used)))
    rng = random.Random(f"{seed}/order")
    rng.shuffle(made)
    problems, splits, captions = {}, {name: [] for name in SIZES}, {}
    for number, (split, skill, draft) in enumerate(made, start=1):
        pid = str(number)
        choices = [draft.right, *draft.wrong]
        rng.shuffle(choices)
        problems[pid] = {
            "question": draft.question,
            "choices": choices,
            "answer": choices.index(draft.right),
            "hint": draft.hint,
            "image": "image.png" if draft.drawing else None,
            "task": "closed choice",
            "grade": f"grade{rng.randint(*skill.grades)}",
            "subject": skill.subject,
            "topic": skill.topic,
            "category": skill.category,
            "skill": skill.name,
            "lecture": skill.lecture,
            "solution": draft.solution,
            "split": split,
            "drawing": draft.drawing,
        }
        splits[split].append(pid)
        if draft.caption:
            captions[pid] = draft.caption
    return Sample(problems, splits, captions)


def _new(skill: Skill, sampler: SplitSampler, used: set[tuple]) -> Draft:
    """A draft that differs from all before it by more than the order of its options."""
    for _ in range(2000):
        draft = skill.draft(sampler)
        key = (draft.question, draft.hint, draft.caption, *sorted((draft.right, *draft.wrong)))
        if len(set(key[3:])) == 1 + len(draft.wrong) and key not in used:
            used.add(key)
            return draft
    raise RuntimeError(f"skill {skill.name!r} has run out of new questions; widen its banks")


def draw(pid: str, row: Mapping[str, Any]) -> bytes:
    """PNG of a question's image. `row` is the question's row as `generate` made it."""
    if not row.get("drawing"):
        raise ValueError(f"question {pid} has no image")
    return draw_image(row["drawing"])


def teacher_replies(sample: Sample, seed: int = 0, error_rate: float = 0.15) -> list[dict[str, str]]:
    """Replies of a simulated teacher (see `sqa_jax.data.sample.teacher`) to all training and validation questions."""
    replies = []
    for setting in ("QTCH", "QTCHL"):
        rng = random.Random(f"{seed}/{setting}")
        for pid in [*sample.splits["train"], *sample.splits["val"]]:
            raw = teacher.reply(rng, sample.problems[pid], setting, error_rate)
            replies.append({"pid": pid, "model": teacher.MODEL, "setting": setting, "raw": raw})
    return replies


def write(directory: str | Path, seed: int = 0) -> None:
    """Writes the sample in ScienceQA's directory layout, images and teacher replies included.

    Raises:
      UserError: the directory exists, or the disk is full.
    """
    sample = generate(seed)
    with atomic_directory(directory) as beside:
        rows = {pid: {k: v for k, v in row.items() if k != "drawing"} for pid, row in sample.problems.items()}
        write_json(beside / "problems.json", rows)
        write_json(beside / "pid_splits.json", sample.splits)
        write_json(beside / "captions.json", {"captions": sample.captions})
        for pid, row in sample.problems.items():
            if row["drawing"]:
                folder = beside / "images" / row["split"] / pid
                folder.mkdir(parents=True)
                (folder / "image.png").write_bytes(draw(pid, row))
        (beside / "teacher").mkdir()
        with open(beside / "teacher" / f"{teacher.MODEL}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(reply, ensure_ascii=False) + "\n" for reply in teacher_replies(sample, seed))
