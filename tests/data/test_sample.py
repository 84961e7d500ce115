"""The embedded sample: large, varied, unambiguous in form, and not solved by a bag of words."""

from __future__ import annotations

import collections
import io
import random

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from sqa_jax.data import sample
from sqa_jax.data.sample import banks
from sqa_jax.data.sources import load_problems
from sqa_jax.data.teacher_records import make_records
from sqa_jax.metrics.bag_of_words import predict
from sqa_jax.metrics.leaderboard import COLUMNS, score


@pytest.fixture(scope="module")
def problems():
    return load_problems("sample")


def test_has_every_kind_of_question(problems):
    everything = problems.all().values()
    assert len(everything) >= 1200
    assert len({p.skill for p in everything}) >= 24
    assert {p.subject for p in everything} == {"natural science", "social science", "language science"}
    assert {p.grade for p in everything} == {f"grade{k}" for k in range(1, 13)}
    assert all(p.lecture and p.solution and p.topic and p.category for p in everything)
    assert all(bool(p.caption) == (p.image is not None) for p in everything)
    counts = score(problems.split("test"), {})["n"]
    assert all(counts[column] >= 30 for column in COLUMNS), counts


def test_no_question_is_a_repeat(problems):
    keys = collections.Counter((p.question, p.hint, p.caption, *sorted(p.choices)) for p in problems.all().values())
    assert max(keys.values()) == 1


def test_held_out_questions_ask_about_other_entities():
    """Where knowing an entity is what is asked, no training question mentions a held-out one."""
    made = sample.generate()

    def mentioned(split):
        rows = [made.problems[pid] for pid in made.splits[split] if made.problems[pid]["category"] == "Classification"]
        return {word for row in rows for word in row["choices"]} | {
            row["question"].split()[-1].rstrip("?") for row in rows
        }

    held = {animal for animals in banks.ANIMALS.values() for animal in banks.split_entries(animals, held_out=True)}
    assert not held & mentioned("train")
    assert len(held & mentioned("test")) > 10


def test_is_the_same_each_time():
    assert sample.generate.__wrapped__(0) == sample.generate(0)
    assert sample.generate(1).problems != sample.generate(0).problems


def test_positions_of_the_right_option_are_uniform(problems):
    for size in (2, 3):
        positions = [p.answer for p in problems.all().values() if len(p.choices) == size]
        assert chisquare(np.bincount(positions, minlength=size)).pvalue > 0.001


def test_a_bag_of_words_does_not_solve_it(problems):
    chance = 100 * np.mean([1 / len(p.choices) for p in problems.split("test")])
    found = score(problems.split("test"), predict(problems.split("train"), problems.split("test")))["AVG"]
    assert chance < found < 60


def test_images_open_and_differ(problems):
    drawn = random.Random(0).sample([p for p in problems.all().values() if p.image], 25)
    images = [p.image.open() for p in drawn]
    assert all(image.size == (320, 240) for image in images)
    assert len({image.tobytes() for image in images}) >= 20


def test_simulated_teacher_errs_at_its_rate(problems):
    replies = sample.teacher_replies(sample.generate(), error_rate=0.15)
    records = [r for r in make_records(replies, problems.all()) if r.status == "ok"]
    assert {r.model for r in records} == {"simulated-teacher"}
    for setting in ("QTCH", "QTCHL"):
        replies_of = [r for r in records if r.setting == setting]
        wrong = np.mean([r.answer != problems.all()[r.pid].answer for r in replies_of])
        assert abs(wrong - 0.15) < 3 * np.sqrt(0.15 * 0.85 / len(replies_of)) and len(replies_of) > 1450
    statuses = collections.Counter(r.status for r in make_records(replies, problems.all()))
    assert statuses["empty"] > 20 and statuses["malformed"] + statuses["unparsed"] > 20


def test_written_as_files_it_loads_as_scienceqa_does(problems, tmp_path):
    sample.write(tmp_path / "sample")
    loaded = load_problems("dir", str(tmp_path / "sample"), images="check")
    assert loaded.fingerprint == problems.fingerprint
    pid = next(p.pid for p in loaded.split("test") if p.image)
    encoded = (tmp_path / "sample" / "images" / "test" / pid / "image.png").read_bytes()
    assert Image.open(io.BytesIO(encoded)).size == (320, 240)
