"""Evaluation: questions are answered once, predictions are bound to their identity, renamed settings change none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from sqa_jax.batches.config_data import load_config_problems
from sqa_jax.config import default
from sqa_jax.evaluation.evaluate import answer_and_score
from sqa_jax.evaluation.student import AdaptedStudent
from sqa_jax.files import sha256_json
from tests.support.verbs import run_verb


@pytest.fixture(scope="module")
def problem_set():
    return load_config_problems(default())


class Answerer:
    """Answers every question with its first option, and fails after a number of them."""

    def __init__(self, fail_after: int = 10**6):
        self.asked: list[str] = []
        self._fail_after = fail_after

    def __call__(self, missing):
        for problem in reversed(missing):
            if len(self.asked) == self._fail_after:
                raise KeyboardInterrupt
            self.asked.append(problem.pid)
            yield {"pid": problem.pid, "answer": 0, "written": 2}


def details(rows):
    return {"tokens_written": sum(row["written"] for row in rows)}


def test_a_stopped_evaluation_continues_with_the_missing_questions(tmp_path, problem_set):
    problems, folder = problem_set.split("test")[:7], tmp_path / "test"
    stopped, continued, again = Answerer(fail_after=3), Answerer(), Answerer()
    with pytest.raises(KeyboardInterrupt):
        answer_and_score(folder, problems, {"seed": 0}, stopped, details)
    (partial,) = folder.iterdir()
    assert partial.name == f"partial-{sha256_json({'seed': 0})[:16]}.jsonl"
    with partial.open("a") as file:
        file.write('{"pid": "cut o')  # a kill in the middle of a write
    metrics = answer_and_score(folder, problems, {"seed": 0}, continued, details)
    assert sorted(stopped.asked + continued.asked) == sorted(p.pid for p in problems)
    assert metrics["tokens_written"] == 14 and metrics["n"]["AVG"] == 7
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["pid"] for row in rows] == [p.pid for p in problems] and not partial.exists()
    assert answer_and_score(folder, problems, {"seed": 0}, again, details) == metrics and not again.asked


def test_predictions_of_another_identity_are_archived(tmp_path, problem_set):
    problems, folder = problem_set.split("test")[:2], tmp_path / "test"
    first = answer_and_score(folder, problems, {"seed": 0}, Answerer(), details)
    second = Answerer()
    answer_and_score(folder, problems, {"seed": 1}, second, details)
    assert len(second.asked) == 2
    (archived,) = tmp_path.glob(f"test.{first['fingerprint'][:8]}-*")
    assert json.loads((archived / "metrics.json").read_text()) == first


def test_renamed_settings_keep_the_identity(problem_set):
    """What identified predictions before settings were renamed still does."""
    config = default()
    config.adapter.lora.vision_encoder = True
    runtime = SimpleNamespace(student=SimpleNamespace(fingerprint="weights"))
    student = AdaptedStudent(config, runtime, {"lora": {}}, {}, 3, "peft")
    identity = student.identity(problem_set, problem_set.split("test")[:2])
    assert set(identity) == {"recipe", "adapter", "student", "problems", "data", "seed", "peft"}
    assert identity["adapter"]["lora"]["tower"] is True and "vision_encoder" not in identity["adapter"]["lora"]
    assert "behind_picture" in identity["adapter"]["prompt"]
    bare = student._replace(adapter={}, peft=None).identity(problem_set, [])
    assert bare["adapter"] is None and "peft" not in bare


def test_the_verb_says_what_is_missing(tmp_path):
    config = ["--config", "configs/quickstart.py", "--config.student.path=random:tiny"]
    for flags, message in (
        ([], "--workdir is needed"),
        (["--workdir", tmp_path], "has no checkpoints"),
        (["--workdir", tmp_path, "--config.eval.checkpoint=newest"], "choose best, last or none"),
        (["--workdir", tmp_path, "--config.eval.checkpoint=none", "--config.eval.mode=guess"], "choose one of auto"),
    ):
        done = run_verb("evaluate", *config, *flags)
        assert done.returncode == 2 and message in done.stderr
