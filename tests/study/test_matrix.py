"""From a study's configuration to its runs: which there are, with which settings, and what is refused before any."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from configs.study_test import get_config
from sqa_jax.data.sources import load_problems
from sqa_jax.errors import UserError
from sqa_jax.study.check import check_study
from sqa_jax.study.matrix import StudyRun, config_of_run, student_name, study_runs
from sqa_jax.teach.recorded_models import existing_models
from tests.support.verbs import run_verb


@pytest.fixture(scope="module")
def problems():
    return load_problems("sample")


def configuration(**change):
    config = get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in change.items()})
    return config


# ---- which runs


def test_every_cell_is_one_run():
    config = configuration(
        study__students=("random:tiny", "a/b.gguf"), study__arms=("zero_shot", "golden", "zero_shot_lecture", "mistakes"),
        study__adapters=("lora", "prefix", "lora+prompt", "full"), study__seeds=(3, 1),
    )  # fmt: skip
    runs = study_runs(config)
    assert len(set(runs)) == len(runs) == 2 * (2 + 2 * 4 * 2)
    bare = [run for run in runs if not run.trained]
    assert {(run.arm, run.adapter, run.seed) for run in bare} == {
        ("zero_shot", "none", 3),
        ("zero_shot_lecture", "none", 3),
    }, "once a student, whatever the adapters and seeds"
    assert runs[: len(bare)] == bare, "what is cheap is known first"
    trained = [run for run in runs if run.trained and run.student == "random:tiny"]
    assert [run.seed for run in trained] == [3] * 8 + [1] * 8, "a whole first seed before the second"
    assert len({run.folder(Path("w")) for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("weights/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("HuggingFaceTB/SmolLM2-135M/", "SmolLM2-135M"),
        ("random:tiny", "random-tiny"),
    ],
)
def test_a_students_name(path, name):
    assert student_name(path) == name


def test_settings_of_a_run():
    config = configuration(
        study__adapters=("lora", "lora+prompt"), study__arms=("zero_shot", "golden", "teacher_answer", "teacher_cot"),
        study__overrides=("teacher_cot train.epochs=2.5", "lora+prompt optimizer.learning_rate=3e-3", "random-tiny recipe.answer=text"),
    )  # fmt: skip
    own = config_of_run(config, StudyRun("random:tiny", "teacher_cot", "lora+prompt", 7))
    assert (own.recipe.arm, own.seed, own.student.path, own.adapter.methods) == (
        "teacher_cot", 7, "random:tiny", ("lora", "prompt"),
    )  # fmt: skip
    assert (own.train.epochs, own.optimizer.learning_rate, own.recipe.answer) == (2.5, 3e-3, "text")
    other = config_of_run(config, StudyRun("random:tiny", "golden", "lora", 7))
    assert (other.train.epochs, other.optimizer.learning_rate) == (config.train.epochs, config.optimizer.learning_rate)
    assert own.recipe.require == other.recipe.require == ("solution", "reasoning"), "all arms, the same questions"
    bare = config_of_run(config, StudyRun("random:tiny", "zero_shot", "none", 0))
    assert (bare.eval.checkpoint, bare.recipe.arm, bare.recipe.require) == ("none", "golden_answer_only", ())
    config.study.same_questions = False
    assert config_of_run(config, StudyRun("random:tiny", "golden", "lora", 7)).recipe.require == ()
    assert config.recipe.arm == "golden" and config.seed == 0, "the study's own settings stay as they are"


def test_overrides_may_use_the_old_name_of_a_setting():
    config = configuration(study__overrides=("lora adapter.lora.tower=True",))
    assert config_of_run(config, StudyRun("random:tiny", "golden", "lora", 0)).adapter.lora.vision_encoder is True
    assert config_of_run(config, StudyRun("random:tiny", "zero_shot", "none", 0)).adapter.lora.vision_encoder is False


# ---- what is refused


FAULTS = [
    ({"study__arms": ("golden", "goldn")}, "config.study.arms names 'goldn'; choose of zero_shot, "),
    ({"study__arms": ("golden", "golden")}, "config.study.arms is ('golden', 'golden'); name one or more, each once"),
    ({"study__arms": ()}, "config.study.arms is ()"),
    ({"study__arms": ("zero_shot",)}, "config.study.arms trains nothing"),
    ({"study__adapters": ("lora", "lra")}, "config.adapter.methods is ('lra',); name one or more of lora, "),
    ({"study__adapters": ("full+lora",)}, "full fine-tuning"),
    ({"study__seeds": (1, 1)}, "config.study.seeds is (1, 1); name one or more, each once"),
    ({"study__seeds": ()}, "config.study.seeds is ()"),
    (
        {"study__resample": "questions_and_seeds", "study__seeds": (4,)},
        "needs pairs of two or more seeds, and config.study.seeds is (4,); name more seeds, or set --config.study.resample=",
    ),
    ({"study__resample": "seeds"}, "config.study.resample is 'seeds'; choose questions or questions_and_seeds"),
    ({"study__equal": "steps"}, "config.study.equal is 'steps'; choose tokens or epochs"),
    ({"study__arms": ("teacher_answer",)}, "config.study.reference is 'golden', which is no trained arm of config.study.arms"),
    ({"study__reference": "zero_shot"}, "config.study.reference is 'zero_shot'"),
    ({"study__students": ("a/x.gguf", "b/x.gguf")}, "gives the names ['x', 'x']; each must be different"),
    ({"student__path": ""}, "config.study.students (or config.student.path)"),
    ({"study__students": ("random:tiny", "no/such/place")}, "no/such/place: no such model directory"),
    ({"eval__folder": "mine"}, "a study names the folders itself"),
    ({"eval__checkpoint": "none"}, "evaluates the best or the last checkpoint"),
    ({"eval__split": "tset"}, "has no split 'tset'; it has test, train, val"),
    ({"data__train_split": "val"}, "split 'val' shares 200 questions"),
    ({"eval__mode": "likelihood"}, "reasons before it answers; use --config.eval.mode=reason"),
    ({"recipe__format": "QCM"}, "format 'QCM'"),
    ({"data__teacher": ()}, "config.study.arms: mistakes, teacher_and_golden, teacher_answer, teacher_cot, teacher_lecture learn from"),
    ({"data__teacher": ("nowhere.jsonl",)}, "nowhere.jsonl"),
    ({"study__overrides": ("golden",)}, 'write "which key=value"'),
    ({"study__overrides": ("goldn train.epochs=2",)}, "no arm, adapter or student is called goldn"),
    ({"study__overrides": ("golden train.epoch=2",)}, "golden train.epoch=2"),
    ({"study__overrides": ("golden train.epochs=many",)}, "golden train.epochs='many'"),
    ({"study__overrides": ("golden train={'epochs': 2}",)}, "name one setting, such as train.epochs"),
    ({"study__overrides": ("golden eval.split=val",)}, "eval.split is the same for all runs or set by the study itself"),
    ({"study__overrides": ("golden seed=3",)}, "seed is the same for all runs"),
    ({"study__overrides": ("golden data.train_split=test",)}, "split 'test' shares 500 questions"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FAULTS)
def test_what_cannot_be_studied_is_refused_in_one_line(problems, change, words):
    config = configuration(**change)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        check_study(config, study_runs(config), problems)
    assert "\n" not in str(caught.value)


def reply(pid, **change):
    row = {"pid": pid, "model": "m", "setting": "QTCH", "raw": '{"answer": 0, "solution": "Because."}'}
    return {**row, **change}


def replies_in(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def test_replies_are_checked_before_anything_runs(problems, tmp_path, capsys):
    first, second = [p.pid for p in problems.split("train")[:2]]
    config = configuration(study__arms=("golden", "teacher_answer"), data__train_limit=0, study__benchmark=())
    runs = study_runs(config)
    config.data.teacher = replies_in(tmp_path / "twice.jsonl", [reply(first), reply(second), reply(first)])
    with pytest.raises(UserError, match=rf"twice.jsonl: replies 1 and 3 are both for question {first} .*remove one"):
        check_study(config, runs, problems)
    config.data.teacher = replies_in(tmp_path / "strange.jsonl", [reply("x1"), reply("x2")])
    with pytest.raises(
        UserError, match=r"strange.jsonl: its 2 replies are for questions that are not in the data \(first x1\)"
    ):
        check_study(config, runs, problems)
    config.data.teacher = replies_in(tmp_path / "some.jsonl", [reply(first), reply("x1"), reply(second)])
    assert check_study(config, runs, problems) == {"golden": 2, "teacher_answer": 2}
    assert "some.jsonl: 1 of 3 replies are for questions that are not in the data (first x1)" in capsys.readouterr().out
    config.study.benchmark = (str(tmp_path / "strange.jsonl"),)
    with pytest.raises(UserError, match="strange.jsonl"):
        existing_models(config, problems)


def test_an_arm_without_usable_replies_says_what_it_lacks(problems, tmp_path):
    first, second = [p.pid for p in problems.split("train")[:2]]
    config = configuration(study__arms=("golden", "teacher_answer"), data__train_limit=0, study__same_questions=False)
    config.data.teacher = replies_in(
        tmp_path / "bad.jsonl", [reply(first, raw=""), reply(second, raw='{"answer": 0, "s')]
    )
    words = r"arm teacher_answer has no training example \(.*teacher's solution: empty: 1; .*: malformed: 1|: malformed: 1.*: empty: 1"
    with pytest.raises(UserError, match=words):
        check_study(config, study_runs(config), problems)


def test_an_arm_may_have_a_teacher_of_its_own(problems, tmp_path):
    first = problems.split("train")[0].pid
    own = replies_in(tmp_path / "own.jsonl", [reply(first)])
    config = configuration(
        study__arms=("golden", "teacher_answer"), study__same_questions=False, data__train_limit=0, data__teacher=(),
        study__overrides=(f"teacher_answer data.teacher={own!r}",),
    )  # fmt: skip
    assert check_study(config, study_runs(config), problems) == {"golden": 1400, "teacher_answer": 1}


def test_only_questions_that_all_can_use_are_counted(problems):
    config = configuration(study__arms=("golden", "teacher_answer", "teacher_cot", "mistakes"), data__train_limit=200)
    used = check_study(config, study_runs(config), problems)
    assert len(set(used.values())) == 1 and 100 < used["golden"] < 200
    config.study.same_questions = False
    loose = check_study(config, study_runs(config), problems)
    assert loose["golden"] == 200 and loose["teacher_cot"] > used["teacher_cot"]


def test_a_question_may_not_be_in_two_splits_that_are_used(problems):
    train, test = problems.split("train"), problems.split("test")
    mixed = dataclasses.replace(problems, splits={**problems.splits, "test": (*test[:5], train[3])})
    config = configuration()
    with pytest.raises(UserError, match=rf"split 'train' shares 1 questions \(first {train[3].pid}\) with 'test'"):
        check_study(config, study_runs(config), mixed)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.study.arms=('golden','goldn')", "config.study.arms names 'goldn'"),
        ("--config.study.overrides=('golden train.epoch=2',)", "train.epoch"),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path, flag, words):
    result = run_verb("study", "--config", "configs/study_test.py", "--workdir", tmp_path / "w", flag)
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "w").exists()


def test_help_tells_what_is_read_and_written():
    result = run_verb("study", "--help")
    assert result.returncode == 0
    assert all(word in result.stdout for word in ("Reads:", "Writes:", "Example", "--config", "--workdir"))
