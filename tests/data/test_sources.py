"""Questions from directories and hub copies, valid and damaged."""

from __future__ import annotations

import gc
import json
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pytest

from sqa_jax.data import sample
from sqa_jax.data.sources import load_problems
from sqa_jax.errors import UserError

ROW = {
    "question": "Which is a mammal?", "choices": ["trout", "whale"], "answer": 1, "hint": "", "image": None, "task": "closed choice",
    "grade": "grade3", "subject": "natural science", "topic": "biology", "category": "c", "skill": "s", "lecture": "l", "solution": "e", "split": "test",
}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps({"1": ROW, "2": {**ROW, "image": "image.png"}}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "2"], "minitest": ["2"]}))
    (tmp_path / "captions.json").write_text(json.dumps({"captions": {"2": "a whale"}}))
    return tmp_path


def load(directory, **kwargs):
    return load_problems("dir", str(directory), **kwargs)


def test_directory(directory):
    loaded = load(directory)
    assert [p.pid for p in loaded.split("test")] == ["1", "2"]
    assert loaded.split("minitest")[0].caption == "a whale" and loaded.split("minitest")[0].image is not None
    assert loaded.split("test")[0].letter == "B"


def edit(directory, **change):
    (directory / "problems.json").write_text(json.dumps({"1": ROW, "2": {**ROW, **change}}))


FAULTS = {
    "no problems": (lambda d: (d / "problems.json").unlink(), "problems.json: not found"),
    "truncated": (
        lambda d: (d / "problems.json").write_text((d / "problems.json").read_text()[:-40]),
        "problems.json: not valid JSON",
    ),
    "empty": (lambda d: (d / "problems.json").write_text("{}"), "holds no questions"),
    "no splits": (lambda d: (d / "pid_splits.json").unlink(), "pid_splits.json: not found"),
    "pid in splits only": (lambda d: (d / "pid_splits.json").write_text('{"test": ["1", "7"]}'), "question 7"),
    "pid twice": (lambda d: (d / "pid_splits.json").write_text('{"test": ["1", "1"]}'), "question 1 twice"),
    "answer outside": (lambda d: edit(d, answer=2), "question 2: answer index 2 is outside its 2 choices"),
    "negative answer": (lambda d: edit(d, answer=-1), "question 2: answer index -1"),
    "answer a text": (lambda d: edit(d, answer="B"), "question 2: answer 'B'"),
    "no choices": (lambda d: edit(d, choices=[]), "question 2: has no choices"),
    "no question": (lambda d: edit(d, question=" "), "question 2: has no question"),
    "lecture a list": (lambda d: edit(d, lecture=["x"]), "question 2: lecture"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_file_and_question(directory, fault, message):
    fault(directory)
    with pytest.raises(UserError, match="(?s).*" + message) as caught:
        load(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


def test_images_are_checked_where_asked(directory):
    with pytest.raises(UserError, match="images/test/2/image.png: image not found"):
        load(directory, images="check")
    file = directory / "images" / "test" / "2" / "image.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a picture")
    with pytest.raises(UserError, match="image.png: not a readable image"):
        load(directory, images="check")
    made = sample.generate()
    pid = next(pid for pid, row in made.problems.items() if row["drawing"])
    png = sample.draw(pid, made.problems[pid])
    file.write_bytes(png[: len(png) // 2])
    with pytest.raises(UserError, match="not a readable image"):
        load(directory, images="check")
    file.write_bytes(png)
    assert load(directory, images="check").split("test")[1].image.open().size == (320, 240)


def test_unknown_split_and_source_are_named(directory):
    with pytest.raises(UserError, match="no split 'tset'; it has minitest, test"):
        load(directory).split("tset")
    with pytest.raises(UserError, match="config.data.source"):
        load_problems("file")
    with pytest.raises(UserError, match="config.data.path is empty"):
        load_problems("dir")


def test_local_copy_of_the_hub_dataset(tmp_path):
    made = sample.generate()
    features = datasets.Features(
        {"image": datasets.Image(), "choices": datasets.List(datasets.Value("string")), "answer": datasets.Value("int8")}
        | {k: datasets.Value("string") for k in ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")}
    )  # fmt: skip
    pids = {"train": made.splits["train"][:20], "validation": made.splits["val"][:3], "test": made.splits["test"][:4]}
    for split, own in pids.items():
        rows = [made.problems[pid] for pid in own]
        columns = {name: [row[name] for row in rows] for name in features if name != "image"}
        columns["image"] = [
            {"bytes": sample.draw(pid, row), "path": None} if row["drawing"] else None
            for pid, row in zip(own, rows, strict=True)
        ]
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    loaded = load_problems("hub", str(tmp_path), images="check")
    assert {name: len(problems) for name, problems in loaded.splits.items()} == {"train": 20, "val": 3, "test": 4}
    for pid, problem in zip(pids["train"], loaded.split("train"), strict=True):
        row = made.problems[pid]
        assert (problem.question, list(problem.choices), problem.answer) == (
            row["question"],
            row["choices"],
            row["answer"],
        )
        assert (problem.image is None) == (row["image"] is None)


def test_images_of_the_hub_stay_on_disk(tmp_path):
    """Less than one image of ten is in memory, and each is loaded when it is needed."""
    size, count = 1 << 20, 10
    contents = [np.random.default_rng(k).bytes(size) for k in range(count)]
    features = datasets.Features(
        {"image": datasets.Image(), "choices": datasets.List(datasets.Value("string")), "answer": datasets.Value("int8")}
        | {"question": datasets.Value("string")}
    )  # fmt: skip
    columns = {
        "image": [None, *({"bytes": content, "path": None} for content in contents)],
        "question": ["Which?"] * (count + 1), "choices": [["a", "b"]] * (count + 1), "answer": [0] * (count + 1),
    }  # fmt: skip
    datasets.Dataset.from_dict(columns, features=features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    load_problems("hub", str(tmp_path))  # the parquet file becomes an Arrow file
    gc.collect()
    arrow = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    problems = load_problems("hub", str(tmp_path)).split("train")
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size and pyarrow.total_allocated_bytes() - arrow < size, current
    assert problems[0].image is None
    assert [problem.image.read() for problem in problems[1:]] == contents


def test_hub_out_of_reach_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded from the hub or as a local copy"):
        load_problems("hub", str(tmp_path / "nothing"))
