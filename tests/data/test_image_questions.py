"""The image questions: balanced so that text alone is at chance, answered by the images, and learned by a vision-language model."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json

import numpy as np
import pytest
from scipy import ndimage

from configs.image_questions import get_config
from sqa_jax.data.sample import image_questions, scenes
from sqa_jax.data.sources import load_problems
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.metrics.bag_of_words import predict
from sqa_jax.metrics.intervals import mcnemar
from sqa_jax.metrics.leaderboard import read_predictions, score
from sqa_jax.runtime import build_runtime
from sqa_jax.training.loop import train

SOURCES = ("image-questions", "image-questions-shifted")


@pytest.fixture(scope="module", params=SOURCES)
def problems(request):
    return load_problems(request.param)


def test_text_alone_is_at_chance(problems):
    """Of the questions with the same text and options in the same order, each option is right equally often."""
    for split in problems.splits.values():
        answers = collections.defaultdict(collections.Counter)
        for p in split:
            assert not p.hint and not p.caption and p.image is not None and len(set(p.choices)) == 4
            answers[p.question, p.choices][p.answer] += 1
        for counts in answers.values():
            assert len(counts) == 4 and len(set(counts.values())) == 1
        assert len(set(collections.Counter(p.skill for p in split).values())) == 1  # and kinds are in equal parts
    test = problems.split("test")
    assert score(test, predict(problems.split("train")[::8], test))["AVG"] == 25


def test_all_images_differ():
    everything = [p for source in SOURCES for p in load_problems(source).all().values()]
    # One encoder writes all of them, so that other files are other pixels.
    hashes = {hashlib.sha256(p.image.content()).digest() for p in everything}
    assert len(hashes) == len(everything)


def nearest(pixels, colours):
    """The name of the colour that most of [n, 3] pixels are nearest to."""
    distances = np.abs(pixels[:, None] - np.array(list(colours.values()))).sum(-1)
    return list(colours)[np.bincount(distances.argmin(1), minlength=len(colours)).argmax()]


def read_answer(problem):
    """The answer as plain image processing finds it."""
    image = np.asarray(problem.image.open()).astype(int)
    dark = image.max(-1) < 60
    drawn = (image != image[0, -1]).any(-1)
    if "map" in problem.skill:
        around = ndimage.binary_dilation(dark, iterations=2) & ~dark
        return nearest(image[around], image_questions.LANDS)
    if "diagram" in problem.skill:
        part = next(k for k, name in enumerate(image_questions.PARTS) if name in problem.question)
        letters, _ = ndimage.label(dark, np.ones((3, 3)))
        rows, columns = ndimage.find_objects(letters)[part]
        box = dark[rows, columns]
        middle = len(box) // 2
        top, bottom, across = box[0].mean() > 0.9, box[-1].mean() > 0.9, box[middle].mean() > 0.9
        return {(1, 1, 1): "E", (1, 0, 0): "T", (0, 1, 0): "L", (0, 0, 0): "X"}[top, bottom, across]
    if "Count" in problem.skill:
        return str(ndimage.label(drawn, np.ones((3, 3)))[1])
    if "colour" in problem.skill:
        return nearest(image[drawn], image_questions.COLOURS)
    below, right = np.argwhere(drawn).mean(0) > scenes.SIDE / 2
    return image_questions.PLACES[2 * below + right]


def test_images_show_the_answer(problems):
    wrong = [p.pid for p in problems.split("test") if read_answer(p) != p.choices[p.answer]]
    assert not wrong


def test_are_the_same_each_time():
    assert image_questions.generate.__wrapped__() == image_questions.generate()
    assert image_questions.generate(seed=1) != image_questions.generate()


def test_dropped_images_leave_the_rest():
    whole, blind = (load_problems("image-questions", images=images) for images in ("ignore", "drop"))
    assert [dataclasses.replace(p, image=None) for p in whole.split("test")] == list(blind.split("test"))
    assert whole.fingerprint != blind.fingerprint
    with pytest.raises(UserError, match="ignore, check or drop"):
        load_problems("image-questions", images="hide")


@pytest.fixture(scope="module")
def circles(tmp_path_factory):
    """The questions about the colour of circles, drawn large, so that they are learned in seconds; in ScienceQA's layout."""
    directory = tmp_path_factory.mktemp("circles")
    rows, splits = image_questions.generate()
    chosen = {pid: row for pid, row in rows.items() if "colour" in row["skill"] and "circle" in row["question"]}
    for pid, row in chosen.items():
        folder = directory / "images" / row["split"] / pid
        folder.mkdir(parents=True)
        ((shape, colour, x, y, _),) = row["scene"]["marks"]
        (folder / row["image"]).write_bytes(scenes.draw_scene({**row["scene"], "marks": [[shape, colour, x, y, 18]]}))
    (directory / "problems.json").write_text(json.dumps(chosen))
    splits = {split: [pid for pid in pids if pid in chosen] for split, pids in splits.items()}
    (directory / "pid_splits.json").write_text(json.dumps(splits))
    return directory


def test_a_vision_language_model_learns_what_its_blind_twin_cannot(circles, tmp_path):
    """In small: one kind, one shape, and 60 steps of eight questions. The whole of it is in RESULTS.md."""
    config = get_config()
    config.update_from_flattened_dict(
        {
            "student.path": "random:paligemma-tiny", "data.source": "dir", "data.path": str(circles),
            "data.cache": str(tmp_path / "cache"), "optimizer.learning_rate": 4e-3, "train.steps": 60,
            "train.row_length": 256, "train.batch_rows": 4, "train.eval_every": 0, "train.save_every": 0,
            "eval.val_limit": 8, "eval.row_length": 256, "eval.batch_rows": 8,
        }
    )  # fmt: skip
    runtime = build_runtime(config)
    right = {}
    for images in ("ignore", "drop"):
        config.data.images = images
        train(config, str(tmp_path / images), runtime)
        evaluate(config, str(tmp_path / images), runtime)
        test = load_problems("dir", str(circles)).split("test")
        answers = read_predictions(tmp_path / images / "eval" / "test" / "predictions.jsonl")
        right[images] = [answers[p.pid] == p.answer for p in test]
    sighted, blind = (np.mean(right[images]) for images in ("ignore", "drop"))
    assert sighted > blind + 0.4 and mcnemar(right["drop"], right["ignore"]) < 1e-6
    assert abs(blind - 0.25) < 0.1
