"""Distillation datasets: recipes, fingerprints, reuse, interruption, faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sqa_jax import files
from sqa_jax.batches.config_data import encoder_for
from sqa_jax.batches.dataset import build_or_reuse
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.data import sample
from sqa_jax.data.problem import LETTERS, Problem
from sqa_jax.data.sources import load_problems
from sqa_jax.data.teacher_records import TeacherRecord, load_records, make_records, write_records
from sqa_jax.errors import UserError
from sqa_jax.prompts.formats import Format
from sqa_jax.prompts.recipes import ARMS, Unusable, arm_format, examples

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def problems():
    return load_problems("sample")


@pytest.fixture
def config(tmp_path):
    config = default()
    config.data.cache = str(tmp_path / "datasets")
    config.data.train_limit = 40
    config.recipe.max_prompt = config.recipe.max_target = 2000
    return config


def test_rows_are_what_the_recipe_says(config, problems):
    config.recipe.format = "QCM-AE"
    dataset, reused = build_or_reuse(config, TOKENIZER, problems)
    tokens, prompt_lengths, _, pids = dataset.columns()
    assert not reused and len(tokens) == dataset.manifest["rows"] == 40
    for ids, length, pid in zip(tokens, prompt_lengths, pids, strict=True):
        problem = problems.all()[pid]
        target = TOKENIZER.decode(ids[length:])
        assert target == f"The answer is {problem.letter}. BECAUSE: {problem.solution}<|im_end|>"
        assert TOKENIZER.decode(ids[:length]).endswith("<|im_start|>assistant\n")
    assert dataset.manifest["tokens"]["total"] == sum(map(len, tokens))
    assert dataset.manifest["target_tokens"]["max"] == max(
        len(t) - n for t, n in zip(tokens, prompt_lengths, strict=True)
    )


def test_each_arm_takes_its_targets_from_its_sources(config, problems):
    problem = problems.split("train")[0]
    records = {
        "solution": [
            TeacherRecord(
                problem.pid,
                "m",
                "QTCHL",
                "",
                (problem.answer + 1) % len(problem.choices),
                solution="the teacher's solution",
            )
        ],
        "reasoning": [TeacherRecord(problem.pid, "m", "QTCH", "", problem.answer, reasoning="step by step")],
    }
    targets = {}
    for arm in ARMS:
        config.recipe.arm, config.recipe.format = arm, "QCM-AE"
        made = examples(problem, records, config.recipe)
        targets[arm] = [e.target for e in made]
        assert ("L" in arm_format(config.recipe).inputs) == ARMS[arm].lecture
    gold = f"The answer is {problem.letter}."
    assert targets["golden"] == [f"{gold} BECAUSE: {problem.solution}"]
    assert targets["golden_answer_only"] == [gold]
    assert targets["teacher_and_golden"] == targets["golden"] + targets["teacher_answer"]
    assert "the teacher's solution" in targets["teacher_answer"][0] and gold not in targets["teacher_answer"][0]
    assert targets["teacher_cot"] == [f"step by step\n{gold}"]
    wrong = f"First attempt: {LETTERS[records['solution'][0].answer]}. the teacher's solution\nThis is wrong."
    assert targets["mistakes"] == [f"{wrong}\n{problem.solution}\n{gold}"]
    assert targets["domain_text"] == [problem.lecture]
    config.recipe.arm = "teacher_answer"
    assert examples(problem, {}, config.recipe) == [Unusable(problem.pid, "teacher's solution: no record")]


def teacher(problem, answers, **fields):
    return {
        "reasoning": [TeacherRecord("1", "m", "QTCH", "", a, f"because {k}", **fields) for k, a in enumerate(answers)]
    }


def test_filters_of_replies(config, problems):
    """Rejection sampling, several samples, majority votes: against a count by hand."""
    problem = next(p for p in problems.split("train") if len(p.choices) > 2)
    right, wrong, other = problem.answer, *[k for k in range(len(problem.choices)) if k != problem.answer][:2]
    records = teacher(problem, [wrong, right, other, right])
    config.recipe.arm, recipe = "teacher_cot", config.recipe

    def answers():
        return [int(e.target.split()[1]) for e in examples(problem, records, recipe)]

    assert answers() == [0]
    recipe.samples = 0
    assert answers() == [0, 1, 2, 3]
    recipe.vote = True
    assert answers() == [1, 3]
    recipe.samples = 1
    assert answers() == [1]
    recipe.vote, recipe.teacher_right_only = False, True
    assert answers() == [1]
    (nothing,) = examples(problem, teacher(problem, [wrong]), recipe)
    assert "answer is wrong" in nothing.reason
    recipe.teacher_right_only, recipe.require = False, ("solution",)
    assert examples(problem, records, recipe) == [Unusable(problem.pid, "config.recipe.require: no usable solution")]
    recipe.require = ()
    (nothing,) = examples(problem, {"reasoning": [TeacherRecord("1", "m", "QTCH", "(1)", 1)]}, recipe)
    assert nothing.reason == "teacher's reasoning: only an answer"


def test_a_lecture_arm_prefers_replies_that_saw_the_lecture(config, problems):
    problem = problems.split("train")[0]
    records = {"solution": [TeacherRecord("1", "m", s, "", 0, solution=s) for s in ("QTCH", "QTCHL")]}
    for arm, setting in (("teacher_answer", "QTCH"), ("teacher_lecture", "QTCHL"), ("mistakes", "QTCHL")):
        config.recipe.arm, config.recipe.format = arm, "QCM-AE"
        assert f"{setting}\n" in examples(problem, records, config.recipe)[0].target + "\n"


def test_domain_text_is_every_lecture_once_and_whole(config, problems):
    config.recipe.arm, config.recipe.max_target = "domain_text", 64
    dataset, _ = build_or_reuse(config, TOKENIZER, problems)
    tokens, prompt_lengths, *_ = dataset.columns()
    chosen = {problems.all()[pid].lecture for pid in dataset.columns().pids}
    assert set(prompt_lengths) == {1} and max(len(t) for t in tokens) <= 65
    text = TOKENIZER.decode([token for ids in tokens for token in ids[1:]])
    lectures = text.split("<|im_end|>")[:-1]
    assert len(lectures) == len(set(lectures)) and set(lectures) == chosen
    assert len(lectures) < 40, "many of the forty questions share a lecture"


@pytest.mark.parametrize("arm", ["teacher_answer", "teacher_cot", "mistakes"])
def test_an_arm_without_teacher_records_says_what_to_do(config, problems, arm):
    config.recipe.arm = arm
    with pytest.raises(UserError, match=r"needs a teacher's (solution|reasoning); name files .*config\.data\.teacher"):
        build_or_reuse(config, TOKENIZER, problems)


def test_subjects_and_unknown_subjects(config, problems):
    config.data.subjects, config.data.train_limit = ("language science",), 0
    dataset, _ = build_or_reuse(config, TOKENIZER, problems)
    assert {problems.all()[pid].subject for pid in dataset.columns().pids} == {"language science"}
    config.data.subjects = ("alchemy",)
    with pytest.raises(UserError, match="alchemy not in split 'train'; it has language science"):
        build_or_reuse(config, TOKENIZER, problems)


def test_same_config_is_reused_and_any_other_is_not(config, problems, tmp_path):
    first, _ = build_or_reuse(config, TOKENIZER, problems)
    same, reused = build_or_reuse(config, TOKENIZER, problems)
    assert reused and same.path == first.path
    config.optimizer.learning_rate = 7.0
    config.eval.limit = 3
    assert build_or_reuse(config, TOKENIZER, problems)[1], "settings that do not touch the rows must not rebuild them"
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "bot")
    places = {first.path}
    for change in [
        lambda c: c.recipe.__setattr__("format", "QCM-AE"),
        lambda c: c.recipe.__setattr__("answer", "text"),
        lambda c: c.data.__setattr__("train_limit", 41),
        lambda c: c.__setattr__("seed", 1),
    ]:
        changed = config.copy_and_resolve_references()
        change(changed)
        places.add(build_or_reuse(changed, TOKENIZER, problems)[0].path)
    places.add(build_or_reuse(config, other, problems)[0].path)
    assert len(places) == 6


def test_teacher_records_round_trip_and_count(config, problems, tmp_path):
    config.data.teacher, config.recipe.arm, config.recipe.format = ("sample",), "teacher_and_golden", "QCM-AE"
    config.data.train_limit = 400
    dataset, _ = build_or_reuse(config, TOKENIZER, problems)
    m = dataset.manifest
    dropped = sum(entry["rows"] for entry in m["dropped"].values())
    assert m["rows"] + dropped == 2 * 400 and dropped > 5
    assert set(m["dropped"]) <= {
        "teacher's solution: empty",
        "teacher's solution: malformed",
        "teacher's solution: unparsed",
    }
    records = make_records(sample.teacher_replies(sample.generate()), problems.all())
    write_records(tmp_path / "r.jsonl", records)
    assert load_records([tmp_path / "r.jsonl"], problems.all()) == records


def test_too_long_is_counted(config, problems):
    config.recipe.format, config.recipe.max_prompt, config.recipe.max_target = "QCML-AE", 420, 100
    dataset, _ = build_or_reuse(config, TOKENIZER, problems)
    tokens, prompt_lengths, *_ = dataset.columns()
    assert max(prompt_lengths) <= 420 and max(len(t) - n for t, n in zip(tokens, prompt_lengths, strict=True)) <= 100
    m = dataset.manifest
    assert m["shortened"]["lecture"]["rows"] > 0 and m["dropped"]["target longer than max_target"]["rows"] > 0
    assert m["rows"] + sum(d["rows"] for d in m["dropped"].values()) == 40


def test_damage_is_found_and_the_remedy_named(config, problems):
    dataset, _ = build_or_reuse(config, TOKENIZER, problems)
    arrow = next((dataset.path / "rows").glob("*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="remove this folder"):
        build_or_reuse(config, TOKENIZER, problems)[0].columns()
    (dataset.path / "manifest.json").unlink()
    with pytest.raises(UserError, match="remove this folder"):
        build_or_reuse(config, TOKENIZER, problems)


def test_full_disk_leaves_nothing_half_written(config, problems, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="the disk is full"):
        build_or_reuse(config, TOKENIZER, problems)
    monkeypatch.undo()
    assert list(Path(config.data.cache).iterdir()) == []
    assert not build_or_reuse(config, TOKENIZER, problems)[1]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("recipe.arm", "goldn", "choose one of golden"),
        ("recipe.format", "QCM-B", "write inputs, a dash, targets"),
        ("recipe.answer", "word", "letter, text, both"),
        ("data.teacher", ("nowhere.jsonl",), "nowhere.jsonl not found"),
        ("data.train_split", "tran", "it has test, train, val"),
        ("recipe.max_prompt", 3, "makes no training row"),
    ],
)
def test_unusable_settings_are_named(config, problems, key, value, words):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=words):
        build_or_reuse(config, TOKENIZER, problems)


def test_bad_teacher_file_names_the_line(config, problems, tmp_path):
    file = tmp_path / "replies.jsonl"
    config.recipe.arm, config.data.teacher = "teacher_answer", (str(file),)
    file.write_text('{"pid": "1", "model": "m", "setting": "QTCH", "raw": "x"}\n{"pid": "2", "mod')
    with pytest.raises(UserError, match="replies.jsonl:2"):
        build_or_reuse(config, TOKENIZER, problems)
    file.write_text('{"pid": "1", "model": "m", "setting": "QTCH"}\n')
    with pytest.raises(UserError, match="reply 1 has no text in 'raw'"):
        build_or_reuse(config, TOKENIZER, problems)


KILLED_BUILD = """
import os, signal, sys
from sqa_jax import files
from sqa_jax.batches import dataset
from sqa_jax.batches.config_data import load_config_problems
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.prompts.encode import Encoder

cache, moment = sys.argv[1:]
owner, name = {"tokenizing": (Encoder, "encode"), "manifest": (dataset, "write_json"), "rename": (files.os, "replace")}[moment]
setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
config = default()
config.data.cache, config.data.train_limit = cache, 40
dataset.build_or_reuse(config, byte_tokenizer(), load_config_problems(config))
"""


@pytest.mark.parametrize("moment", ["tokenizing", "manifest", "rename"])
def test_a_killed_build_leaves_no_dataset(config, problems, moment):
    """kill -9 while tokenizing, between rows and manifest, and before the rename."""
    cache = Path(config.data.cache)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, str(cache), moment], env=environment)
    assert killed.returncode == -signal.SIGKILL
    left = list(cache.iterdir()) if cache.exists() else []
    assert all(path.name.startswith(".") for path in left) and bool(left) == (moment != "tokenizing")
    dataset, reused = build_or_reuse(config, TOKENIZER, problems)
    assert not reused and len(dataset.columns().tokens) == dataset.manifest["rows"] == 40


def test_leftovers_of_a_day_ago_are_removed(tmp_path):
    old, new = tmp_path / ".place.old", tmp_path / ".place.new"
    old.mkdir(), new.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    with files.atomic_directory(tmp_path / "place") as beside:
        (beside / "x").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".place.new", "place"]


def test_tokenizing_is_fast_enough(config):
    """21,208 questions of ScienceQA's size take less than a minute of one core: a tenth of them, a tenth of that."""
    rng = np.random.default_rng(0)
    words = ["photosynthesis", "the", "of", "river", "animal", "which", "because", "temperature", "and", "is"]

    def text(count):
        return " ".join(rng.choice(words, count))

    questions = [
        Problem(str(k), text(25), (text(5), text(5)), 0, hint=text(30), lecture=text(120), solution=text(45))
        for k in range(2120)
    ]
    encoder, fmt = encoder_for(config, TOKENIZER), Format.parse("QCML-AE")
    start = time.process_time()
    encoder.encode(questions, [fmt] * len(questions), [problem.solution for problem in questions])
    assert time.process_time() - start < 6
