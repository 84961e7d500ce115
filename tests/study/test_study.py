"""The study verb on a random student: complete, stopped, failing, extended, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from configs.study_test import get_config
from sqa_jax.batches.config_data import load_config_problems
from sqa_jax.config_aliases import RENAMED
from sqa_jax.errors import UserError
from sqa_jax.study.execute import Executor, Interrupted
from sqa_jax.study.hypotheses import HYPOTHESES
from sqa_jax.study.matrix import study_runs
from sqa_jax.study.run import run_study
from tests.support.verbs import run_verb

TEST_QUESTIONS = 16
VERDICTS = ("supported", "contradicted", "undecided")


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """A few of the sample's questions in ScienceQA's layout, with the simulated teacher's replies."""
    from sqa_jax.data import sample

    made, root = sample.generate(), tmp_path_factory.mktemp("questions")
    splits = {
        split: made.splits[split][:count] for split, count in (("train", 12), ("val", 2), ("test", TEST_QUESTIONS))
    }
    kept = {pid for pids in splits.values() for pid in pids}
    problems = {pid: {k: v for k, v in made.problems[pid].items() if k not in ("drawing", "image")} for pid in kept}
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps(splits))
    replies = [reply for reply in sample.teacher_replies(made) if reply["pid"] in kept]
    (root / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    return root


@pytest.fixture(scope="module")
def small(questions, tmp_path_factory):
    """Makes the configuration of a small study; the datasets of all are in one place."""
    replies = (str(questions / "replies.jsonl"),)
    shared = {
        "data.source": "dir", "data.path": str(questions), "data.teacher": replies, "study.benchmark": replies,
        "data.cache": str(tmp_path_factory.mktemp("datasets")), "data.train_limit": 0, "train.epochs": 2.0,
        "study.seeds": (0,), "student.remat": "none",
        # So that a study of fewer arms trains on the same questions.
        "study.same_questions": False,
    }  # fmt: skip

    def make(**change):
        config = get_config()
        config.update_from_flattened_dict(shared | {key.replace("__", "."): value for key, value in change.items()})
        return config

    make.flags = [f"--config.{key}={value}" for key, value in shared.items()]
    return make


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """(workdir, configuration, results) of every arm with one seed, as the verb runs it."""
    root = tmp_path_factory.mktemp("whole")
    result = run_verb("study", "--config", "configs/study_test.py", "--workdir", root, *small.flags)
    assert result.returncode == 0, result.stderr
    return root, small(), read_json(root / "results.json")


@pytest.fixture(scope="module")
def grown(whole, small):
    """The same workdir when a second seed of some arms has been added."""
    root, _, _ = whole
    config = small(
        study__arms=("zero_shot", "golden", "teacher_answer"),
        study__seeds=(0, 1),
        study__resample="questions_and_seeds",
    )
    return root, config, run_study(config, str(root), "the command")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_json(path: Path):
    return json.loads(path.read_text())


def system(results, arm):
    (row,) = [row for row in results["systems"] if row["arm"] == arm]
    return row


def tree(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def forbid(*_, **__):
    raise AssertionError("nothing was to be trained or evaluated")


# ---- a whole study


def test_every_arm_and_every_hypothesis(whole):
    """Every arm of configs/study_test.py: what the continuous integration runs."""
    root, config, results = whole
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(arm, 0) for arm in config.study.arms]
    assert all(run["status"] == "finished" for run in results["runs"]), results["runs"]
    assert [row["name"] for row in results["hypotheses"]] == [h.name for h in HYPOTHESES if not h.soft]
    for row in results["hypotheses"]:
        assert row["verdict"] in VERDICTS and row["n"] == TEST_QUESTIONS and row["adjusted_p"] >= row["p"]
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["smallest"] <= 1
    trained = [row for row in results["systems"] if "training" in row]
    tokens = system(results, "golden")["training"]["tokens"]
    step = config.train.row_length * config.train.batch_rows
    assert len(trained) == 8, "all arms see equally many tokens, as near as steps and their filling allow"
    assert all(abs(row["training"]["tokens"] - tokens) < step for row in trained)
    assert system(results, "teacher_and_golden")["rows_by_source"].keys() == {"gold", "solution"}
    assert system(results, "mistakes")["inference"]["tokens_written"] > 0
    assert system(results, "golden")["inference"]["tokens_written"] == 0
    explained = {path.parts[-6] for path in root.glob("runs/*/*/*/*/eval/explanations/predictions.jsonl")}
    assert explained == {row["arm"] for row in trained} - {"golden_answer_only", "domain_text"}
    assert {row["arm"] for row in results["differences"]} == set(config.study.arms) - {"golden"}
    assert results["benchmark"] and results["examples"] and results["explanations"]["rows"]
    for file in ("report.md", "report.html", "plots/accuracy_by_arm.svg", "plots/answer_agreement.svg"):
        text = (root / file).read_text()
        assert file.startswith("plots/") or all(h.statement in text for h in HYPOTHESES if not h.soft)


def test_a_study_grows_by_seeds(whole, grown):
    """Nothing of what is there is made again, and the spread over seeds comes in."""
    _, _, before = whole
    root, _, results = grown
    assert results == read_json(root / "results.json")
    runs = [(run["arm"], run["adapter"], run["seed"], run["status"]) for run in results["runs"]]
    trained = [(arm, "lora", seed, "finished") for seed in (0, 1) for arm in ("golden", "teacher_answer")]
    assert runs == [("zero_shot", "none", 0, "finished"), *trained]
    seconds = {(run["arm"], run["seed"]): run["seconds"] for run in before["runs"]}
    assert all(seconds.get((run["arm"], run["seed"]), run["seconds"]) == run["seconds"] for run in results["runs"])
    for row in results["hypotheses"]:
        if row["name"] == "H3.1":
            assert row["verdict"] in VERDICTS and len(row["by_seed"]) == 2
        else:
            assert row["verdict"] == "not tested" and "is not part of this study" in row["why"]


def test_numbers_are_those_of_the_predictions(grown, questions):
    """Accuracies and differences counted by hand from predictions.jsonl and the right answers."""
    root, _, results = grown
    right = json.loads((questions / "problems.json").read_text())
    order = json.loads((questions / "pid_splits.json").read_text())["test"]

    def answered(*path):
        rows = read(root.joinpath("runs", "random-tiny", *path) / "eval" / "test" / "predictions.jsonl")
        assert [row["pid"] for row in rows] == order
        return [row["answer"] == right[row["pid"]]["answer"] for row in rows]

    share = {
        arm: [sum(answered(arm, "lora", f"seed{seed}")) / TEST_QUESTIONS for seed in (0, 1)]
        for arm in ("golden", "teacher_answer")
    }
    for arm, by_seed in share.items():
        row = system(results, arm)
        assert row["columns"]["AVG"] == pytest.approx(50 * sum(by_seed), abs=0.01)
        assert row["by_seed"] == pytest.approx([100 * x for x in by_seed], abs=0.01)
        assert row["spread"] == pytest.approx(100 * abs(by_seed[0] - by_seed[1]) / 2**0.5)
        assert row["low"] <= row["columns"]["AVG"] + 0.01 and row["columns"]["AVG"] - 0.01 <= row["high"]
    assert system(results, "zero_shot")["columns"]["AVG"] == pytest.approx(
        100 * sum(answered("zero_shot", "none", "seed0")) / TEST_QUESTIONS, abs=0.01
    )
    (row,) = [row for row in results["hypotheses"] if row["name"] == "H3.1"]
    by_seed = [b - a for a, b in zip(share["golden"], share["teacher_answer"], strict=True)]
    assert row["by_seed"] == pytest.approx(by_seed) and row["difference"] == pytest.approx(sum(by_seed) / 2)


def test_what_can_be_shared_is_shared(grown):
    """One evaluation of the untrained student, and one dataset for all seeds of an arm."""
    root, config, _ = grown
    assert len(list(root.glob("runs/*/zero_shot/*/seed*"))) == 1
    made = [read_json(path)["arm"] for path in Path(config.data.cache).glob("*/manifest.json")]
    assert made.count("golden") == made.count("teacher_answer") == 1
    used = {
        read_json(root / "runs" / "random-tiny" / "golden" / "lora" / f"seed{seed}" / "config.json")["dataset"]
        for seed in (0, 1)
    }
    assert len(used) == 1


def test_the_same_command_only_makes_the_report(grown, monkeypatch):
    root, config, results = grown
    before, report = tree(root / "runs"), (root / "report.md").read_text()
    (root / "report.md").unlink()
    monkeypatch.setattr("sqa_jax.training.loop.train", forbid)
    monkeypatch.setattr("sqa_jax.evaluation.evaluate.evaluate", forbid)
    assert run_study(config, str(root), "the command") == results
    assert tree(root / "runs") == before and (root / "report.md").read_text() == report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer__learning_rate": 0.5}, r"optimizer.learning_rate was 0.001 and is 0.5"),
        ({"recipe__answer": "text"}, r"recipe.answer was 'letter' and is 'text'"),
        ({"eval__limit": 7}, r"eval.limit was 24 and is 7"),
        ({"data__teacher": ("sample",)}, r"replies was \['\w{64}'\] and is \['sample'\]"),
        ({"study__same_questions": True}, r"recipe.require was \[\] and is \['solution', 'reasoning'\]"),
        ({"study__overrides": ("golden train.epochs=3.0",)}, r"golden's train.epochs was 2.0 and is 3.0"),
        ({"study__equal": "epochs"}, r"study.equal was 'tokens' and is 'epochs'"),
    ],
)
def test_other_settings_in_the_same_place_are_refused(whole, small, monkeypatch, change, words):
    root, _, _ = whole
    before = tree(root)
    monkeypatch.setattr("sqa_jax.training.loop.train", forbid)
    with pytest.raises(UserError, match=rf"was made with other settings \({words}.*choose another --workdir") as caught:
        run_study(small(**change), str(root))
    assert "\n" not in str(caught.value) and tree(root) == before


def test_settings_that_change_no_result_are_free(whole, small, questions, monkeypatch, tmp_path):
    """Where files lie, how often is saved, which machine, and replies of the same content under another name."""
    root, _, results = whole
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((questions / "replies.jsonl").read_bytes())
    monkeypatch.setattr("sqa_jax.training.loop.train", forbid)
    monkeypatch.setattr("sqa_jax.evaluation.evaluate.evaluate", forbid)
    config = small(data__teacher=(str(copy),), data__cache=str(tmp_path), train__save_every=7, train__stop_after=3)
    assert run_study(config, str(root), "the command")["systems"] == results["systems"]


def test_a_run_from_before_settings_were_renamed_is_finished(small, tmp_path):
    """Its run.json has the settings' old names; a different value is still found."""
    config = small()
    executor, run = Executor(config, tmp_path, load_config_problems(config)), study_runs(config)[1]
    settings = executor.settings(run)
    old = {key: name for name, key in RENAMED.items()}
    record = {"status": "finished", "settings": {old.get(key, key): value for key, value in settings.items()}}
    assert record["settings"].keys() != settings.keys()
    file = run.folder(tmp_path) / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record))
    assert executor.finished_record(run) == record
    record["settings"]["student.picture_tokens"] = 7
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="student.max_image_tokens was 7 and is 0"):
        executor.finished_record(run)


# ---- mishaps


def term_at(step):
    """A `Reporter.step` that sends SIGTERM after the report of a step."""
    from sqa_jax.training.reporter import Reporter

    def report(self, number, *rest, report=Reporter.step):
        report(self, number, *rest)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def losses(folder):
    return [(row["step"], row["loss"]) for row in read(folder / "metrics.jsonl") if "loss" in row]


def test_stopped_and_failing_a_study_ends_as_if_nothing_had_been(whole, small, tmp_path, monkeypatch):
    """SIGTERM in training, a kill in evaluation, an error in another evaluation: nothing is repeated or lost."""
    import sqa_jax.evaluation.evaluate
    from sqa_jax.inference.answer import make_answerer
    from sqa_jax.training.reporter import Reporter

    beside, _, expected = whole
    config = small(study__arms=("golden", "teacher_answer"), study__explanations=0)
    golden, teacher = (tmp_path / "runs" / "random-tiny" / arm / "lora" / "seed0" for arm in config.study.arms)
    steps = system(expected, "golden")["training"]["steps"]

    # SIGTERM, once in the middle of training and once in its last step.
    handler = signal.getsignal(signal.SIGTERM)
    for step, done in ((1, False), (steps, True)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Reporter, "step", term_at(step))
            run_study(config, str(tmp_path))
        assert signal.getsignal(signal.SIGTERM) is handler
        assert (golden / "train.json").exists() == done and (golden / "checkpoints" / "last").is_dir()
        assert not (golden / "eval").exists() and not teacher.exists() and not (tmp_path / "results.json").exists()
    trained = (golden / "metrics.jsonl").read_text()

    with pytest.raises(UserError, match="was made with other settings .optimizer.b1 was 0.9 and is 0.8"):
        run_study(small(study__arms=("golden",), study__explanations=0, optimizer__b1=0.8), str(tmp_path))

    # Killed after five answers.
    def killed(config, runtime, images, make=make_answerer):
        def some(*arguments):
            for count, one in enumerate(make(config, runtime, images)(*arguments)):
                if count == 5:
                    raise KeyboardInterrupt
                yield one

        return some

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sqa_jax.evaluation.evaluate, "make_answerer", killed)
        run_study(config, str(tmp_path))
    (partial,) = (golden / "eval" / "test").glob("partial-*.jsonl")
    assert len(read(partial)) == 5

    # Another run's evaluation fails: it is reported, and its hypothesis is not tested.
    def broken(config, workdir, runtime, evaluate=sqa_jax.evaluation.evaluate.evaluate):
        if "teacher_answer" in workdir:
            raise RuntimeError("the device is\non fire")
        return evaluate(config, workdir, runtime)

    with monkeypatch.context() as patch:
        patch.setattr(sqa_jax.evaluation.evaluate, "evaluate", broken)
        results = run_study(config, str(tmp_path))
    assert (golden / "metrics.jsonl").read_text() == trained, "what was trained is not trained again"
    assert [run["status"] for run in results["runs"]] == ["finished", "failed"]
    assert results["runs"][1]["error"] == "RuntimeError: the device is on fire"
    assert "in broken" in (teacher / "error.txt").read_text()
    row = results["hypotheses"][0]
    assert (row["verdict"], row["why"]) == (
        "not tested",
        "arm teacher_answer failed: RuntimeError: the device is on fire",
    )

    # Started again, it ends with the uninterrupted study's numbers.
    trained = (teacher / "metrics.jsonl").read_text()
    results = run_study(config, str(tmp_path))
    assert (teacher / "metrics.jsonl").read_text() == trained
    assert [run["status"] for run in results["runs"]] == ["finished"] * 2 and not (teacher / "error.txt").exists()
    for folder in (golden, teacher):
        same = beside / folder.relative_to(tmp_path)
        (steps_here, here), (steps_there, there) = (zip(*losses(each), strict=True) for each in (folder, same))
        assert steps_here == steps_there and here == pytest.approx(there, rel=1e-5)
        answers = [
            [(row["pid"], row["answer"]) for row in read(each / "eval" / "test" / "predictions.jsonl")]
            for each in (folder, same)
        ]
        assert answers[0] == answers[1]
    rows = [[row for row in each["hypotheses"] if row["name"] == "H3.1"][0] for each in (results, expected)]
    assert {name: rows[0][name] for name in ("difference", "low", "high", "p", "smallest")} == {
        name: rows[1][name] for name in ("difference", "low", "high", "p", "smallest")
    }


def test_a_failing_arm_is_reported_and_tried_again(whole, small, tmp_path, monkeypatch):
    """An arm whose learning rate blows up: the rest is neither run again nor lost, and its hypothesis says why."""
    import sqa_jax.training.loop

    root, _, before = whole
    shutil.copytree(root, tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "runs" / "random-tiny" / "mistakes")
    config = small(
        study__arms=("golden", "teacher_lecture", "mistakes"),
        study__overrides=("mistakes optimizer.learning_rate=1e30", "mistakes optimizer.clip_norm=1e30"),
    )
    asked = []

    def counted(config, workdir, runtime, train=sqa_jax.training.loop.train):
        asked.append(config.recipe.arm)
        return train(config, workdir, runtime)

    monkeypatch.setattr("sqa_jax.training.loop.train", counted)
    for start in (1, 2):
        results = run_study(config, str(tmp_path / "study"))
        assert asked == ["mistakes"] * start
        assert [run["status"] for run in results["runs"]] == ["finished", "finished", "failed"]
        error = results["runs"][2]["error"]
        assert "loss nan" in error and "\n" not in error
    row = system(results, "mistakes")
    assert row["seeds"] == 0 and row["failed"] == [[0, error]]
    assert system(results, "golden") == system(before, "golden")
    (row,) = [row for row in results["hypotheses"] if row["name"] == "H3.5"]
    assert (row["verdict"], row["why"]) == ("not tested", f"arm mistakes failed: {error}")
    for report in ("report.md", "report.html"):
        assert "loss nan" in (tmp_path / "study" / report).read_text()


def test_a_study_of_which_everything_fails_has_a_report(small, tmp_path):
    config = small(student__path="random:huge", study__arms=("zero_shot", "golden", "teacher_answer"))
    results = run_study(config, str(tmp_path))
    assert {(run["status"], "random:huge: choose one of" in run["error"]) for run in results["runs"]} == {
        ("failed", True)
    }
    assert {row["verdict"] for row in results["hypotheses"]} == {"not tested"}
    for report in ("report.md", "report.html"):
        assert "random:huge: choose one of" in (tmp_path / report).read_text()
