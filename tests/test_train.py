"""The train and evaluate verbs on a tiny student: learning, resuming, stopping, refusing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.test import get_config
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.training.loop import train


def tiny_config(tmp_path, **change):
    config = default()
    config.update_from_flattened_dict(
        {
            "student.path": "random:tiny", "data.cache": str(tmp_path / "datasets"), "data.train_limit": 24, "recipe.max_prompt": 700,
            "train.row_length": 1024, "train.batch_rows": 2, "train.steps": 6, "train.eval_every": 3, "train.save_every": 2,
            "eval.val_limit": 4, "eval.limit": 6, "eval.batch_rows": 2, "mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4,
        } | change
    )  # fmt: skip
    return config


def last_adapter(workdir, config):
    """The adapter of the last checkpoint as NumPy arrays, on whichever devices it was, read without the code under test."""
    import jax
    import orbax.checkpoint as ocp

    root = workdir / "checkpoints" / "last"
    step = max(int(p.name) for p in root.iterdir() if p.name.isdigit())
    reader, path = ocp.PyTreeCheckpointer(), root / str(step) / "state"
    leaves = reader.metadata(path).item_metadata.tree
    return step, reader.restore(path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), leaves))


def same(a, b):
    import jax

    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run that several tests look at."""
    root = tmp_path_factory.mktemp("trained")
    config = tiny_config(root)
    return root / "run", config, train(config, str(root / "run"))


def test_a_run_leaves_what_it_says(trained):
    workdir, config, result = trained
    assert result == {**json.loads((workdir / "train.json").read_text()), "stopped": False} and result["finished"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert list((workdir / "tensorboard").glob("events*")) and (workdir / "checkpoints" / "best").is_dir()


def test_tokens_between_lines_are_counted_whatever_is_said_in_between(tmp_path):
    """Written lines are few and validation speaks in between: the lines' sum is still the run's tokens."""
    config = tiny_config(tmp_path, **{"train.log_every": 1})
    train(config, str(tmp_path / "each"))
    config.train.log_every = 4
    train(config, str(tmp_path / "some"))
    each, some = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in ("each", "some")
    )
    assert len(each) == 6 and len(some) == 2
    assert sum(row["tokens"] for row in each) == sum(row["tokens"] for row in some)


def test_a_finished_run_is_not_trained_again(trained):
    workdir, config, result = trained
    before = (workdir / "metrics.jsonl").read_text()
    assert train(config, str(workdir))["step"] == 6
    assert (workdir / "metrics.jsonl").read_text() == before


def test_stopping_and_continuing_is_bit_exact(trained, tmp_path):
    workdir, config, _ = trained
    parts = tiny_config(tmp_path, **{"train.stop_after": 2, "data.cache": config.data.cache})
    for expected in (2, 4, 6):
        assert train(parts, str(tmp_path / "run"))["step"] == expected
    same(last_adapter(workdir, config), last_adapter(tmp_path / "run", config))


def test_evaluation_has_a_row_a_question_and_resumes(trained):
    workdir, config, _ = trained
    metrics = evaluate(config, str(workdir))
    folder = workdir / "eval" / "test"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 == metrics["n"]["AVG"] and metrics["missing"] == metrics["unparsed"] == 0
    from sqa_jax.data.sources import load_problems

    assert [row["pid"] for row in rows] == [p.pid for p in load_problems("sample").split("test")[:6]]
    assert all(row["text"].startswith("The answer is") for row in rows)
    assert metrics["tokens_read"] == sum(row["read"] for row in rows) > 6 * 50 and metrics["tokens_written"] == 0
    # Interrupted half-way: three answers are known, one line is cut off.
    (folder / "predictions.jsonl").unlink()
    partial = folder / f"partial-{metrics['fingerprint'][:16]}.jsonl"
    marked = [{**row, "text": "kept"} for row in rows[:3]]
    partial.write_text("".join(json.dumps(row) + "\n" for row in marked) + '{"pid": "12", "ans')
    evaluate(config, str(workdir))
    again = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["pid"] for row in again] == [row["pid"] for row in rows]
    assert [row["text"] == "kept" for row in again] == [True] * 3 + [False] * 3
    assert not partial.exists()


def test_other_predictions_are_moved_aside_not_overwritten(trained):
    workdir, config, _ = trained
    evaluate(config, str(workdir))
    other = config.copy_and_resolve_references()
    other.eval.mode, other.eval.max_new_tokens, other.eval.limit = "generate", 8, 3
    metrics = evaluate(other, str(workdir))
    assert metrics["mode"] == "generate" and metrics["n"]["AVG"] == 3
    assert len(list((workdir / "eval").glob("test.*/predictions.jsonl"))) >= 1


def test_last_best_and_bare_are_different_systems(trained):
    workdir, config, _ = trained
    steps = {}
    for which in ("last", "best", "none"):
        chosen = config.copy_and_resolve_references()
        chosen.eval.checkpoint = which
        steps[which] = evaluate(chosen, str(workdir))["step"]
    assert steps["last"] == 6 and steps["none"] is None and steps["best"] in (0, 3, 6)


FAULTS = [
    (
        {"optimizer.learning_rate": 0.5},
        "belongs to another configuration .config.optimizer.learning_rate was 0.001 and is 0.5",
    ),
    ({"student.path": "random:small"}, "student"),
    ({"mesh.data": 3}, "does not use exactly the 8 devices"),
    ({"mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1}, "config.train.batch_rows is 2"),
    ({"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8}, "config.mesh.tensor"),
    ({"adapter.methods": ("lora", "full")}, "full fine-tuning"),
    ({"train.row_length": 64}, "config.train.row_length = 64"),
    ({"student.remat": "some"}, "config.student.remat"),
    ({"student.dtype": "float16"}, "config.student.dtype"),
    ({"student.path": "nowhere.gguf"}, "nowhere.gguf: not found"),
    ({"student.path": "/no/such/model"}, "no such model directory"),
    ({"student.path": ""}, "config.student.path is empty"),
]


@pytest.mark.parametrize(("change", "words"), FAULTS)
def test_what_does_not_fit_is_refused_and_nothing_is_lost(trained, change, words):
    workdir, config, _ = trained
    kept = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=words) as caught:
        train(changed, str(workdir))
    assert "\n" not in str(caught.value)
    assert kept == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "change", [{"recipe.answer": "text"}, {"adapter.lora.rank": 4}, {"student.path": "random:small"}]
)
def test_a_run_is_evaluated_as_it_was_trained(trained, change):
    workdir, config, _ = trained
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(change)
    with pytest.raises(UserError, match="belongs to another configuration .*(answer|rank|student)"):
        evaluate(changed, str(workdir))


def test_no_checkpoint_is_no_zero_shot(tmp_path):
    with pytest.raises(UserError, match="config.eval.checkpoint=none"):
        evaluate(tiny_config(tmp_path), str(tmp_path))


def test_a_loss_that_is_not_finite_names_step_and_questions(tmp_path, monkeypatch):
    """A learning rate that blows up: the run stops, says where, and keeps the checkpoint from before."""
    config = tiny_config(
        tmp_path, **{"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30, "train.save_every": 1}
    )
    with pytest.raises(UserError, match=r"step \d+: loss .*nan.*; questions \d+"):
        train(config, str(tmp_path / "run"))
    step, state = last_adapter(tmp_path / "run", config)
    assert step >= 1


def test_validation_questions_that_fit_into_no_row(tmp_path):
    from sqa_jax.data.sources import load_problems
    from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT
    from sqa_jax.runtime import build_runtime
    from sqa_jax.training.validate import Validator

    config = tiny_config(tmp_path, **{"train.row_length": 64})
    with pytest.raises(UserError, match="none of the 4 questions of 'val' fits into a row of 64 tokens.*raise"):
        Validator(config, build_runtime(config), load_problems("sample").split("val")[:4], NO_SOFT_PROMPT)


def command(config, workdir):
    """The verb as a user starts it, with the same settings."""

    def settings(config, name=""):
        for key, value in config.items():
            yield from settings(value, f"{name}.{key}") if isinstance(value, ConfigDict) else [(f"{name}.{key}", value)]

    usual = dict(settings(get_config()))
    overrides = [f"--config{name}={value}" for name, value in settings(config) if value != usual[name]]
    return [sys.executable, "-m", "sqa_jax.train", "--config", "configs/test.py", "--workdir", str(workdir), *overrides]


def wait_for_step(workdir, step, process):
    """True as soon as a step is reported, False if the process ends before."""
    file = workdir / "metrics.jsonl"
    while process.poll() is None:
        lines = file.read_text().splitlines() if file.exists() else []
        if any('"loss"' in line and f'"step": {step},' in line for line in lines):
            return True
        time.sleep(0.01)
    return False


def test_kill_nine_at_random_steps_is_bit_exact(tmp_path):
    """SIGKILL at three random steps; the final adapter is the uninterrupted run's, bit for bit."""
    config = tiny_config(tmp_path, **{"train.steps": 16, "train.save_every": 2, "train.eval_every": 8})
    train(config, str(tmp_path / "whole"))
    for step in sorted(random.Random().sample(range(1, 15), 3)):
        process = subprocess.Popen(
            command(config, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert wait_for_step(tmp_path / "killed", step, process)
        process.kill()
        process.wait()
    result = subprocess.run(command(config, tmp_path / "killed"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    same(last_adapter(tmp_path / "whole", config), last_adapter(tmp_path / "killed", config))
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert steps == list(range(1, 17)), "each step is reported once, whatever was killed"


@pytest.mark.parametrize("died_at", [0, 3])
def test_death_between_best_adapter_and_train_state(tmp_path, monkeypatch, died_at):
    """The best adapter is on disk, the train state of the same step is not: the run goes on from the one before."""
    from sqa_jax.training.checkpoint import Checkpoints

    config = tiny_config(tmp_path, **{"train.save_every": 1 if died_at else 2})
    train(config, str(tmp_path / "whole"))
    save, saved_best = Checkpoints.save, []

    def die(self, step, *rest):
        if step >= died_at and saved_best:
            self.finish()
            raise InterruptedError("died")
        save(self, step, *rest)

    def note(self, step, adapter, save_best=Checkpoints.save_best):
        save_best(self, step, adapter)
        if step == died_at:
            saved_best.append(step)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Checkpoints, "save", die)
        patch.setattr(Checkpoints, "save_best", note)
        train(config, str(tmp_path / "died"))
    assert saved_best == [died_at]
    train(config, str(tmp_path / "died"))
    same(last_adapter(tmp_path / "whole", config), last_adapter(tmp_path / "died", config))


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    config = tiny_config(tmp_path, **{"train.steps": 400, "train.save_every": 0, "train.eval_every": 0})
    process = subprocess.Popen(
        command(config, tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "SIGTERM" in out and "the same command continues" in out
    step, _ = last_adapter(tmp_path / "run", config)
    assert 2 <= step < 400 and f"step {step} of 400" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.optimzer.learning_rate=1"], "did you mean optimizer.learning_rate?"),
        (["--config.optimizer.learning_rate=high"], "learning_rate"),
        (["--workdr=x"], "did you mean workdir?"),
        (["--config", "nowhere.py"], "nowhere.py"),
        ([], "--workdir is needed"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    result = subprocess.run([sys.executable, "-m", "sqa_jax.train", *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_config_file_with_an_unknown_key(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from sqa_jax.config import default\ndef get_config():\n    c = default()\n    c.optimizer.learning_rat = 1\n    return c\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "sqa_jax.train", "--config", str(file), "--workdir", str(tmp_path / "w")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert (
        result.returncode == 2 and "learning_rate" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    ), result.stderr


@pytest.mark.parametrize("verb", ["train", "evaluate", "preprocess", "score", "export"])
def test_help_tells_what_is_read_and_written(verb):
    result = subprocess.run([sys.executable, "-m", f"sqa_jax.{verb}", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and all(
        word in result.stdout
        for word in ("Reads:", "Writes:", "Example", "--config" if verb != "score" else "--problems")
    )


def overfit_eight(tmp_path, **changes):
    """Trains on eight questions of the sample and answers them, by the verbs; checks that each text is its target."""
    from sqa_jax.data import sample
    from sqa_jax.data.sources import load_problems
    from sqa_jax.prompts.formats import Format, render_target

    sample.write(tmp_path / "eight")
    pids = sorted(random.Random(0).sample(sample.generate().splits["train"], 8), key=int)
    (tmp_path / "eight" / "pid_splits.json").write_text(json.dumps({split: pids for split in ("train", "val", "test")}))
    changes = {
        "data.source": "dir", "data.path": tmp_path / "eight", "data.cache": tmp_path / "cache", "recipe.answer": "both",
        "optimizer.learning_rate": 3e-3, "train.eval_every": 0, "eval.mode": "generate", "eval.max_new_tokens": 100,
        "eval.batch_questions": 8, "eval.checkpoint": "last", **changes,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in changes.items()] + ["--config.adapter.methods=('full',)"]
    for verb in ("train", "evaluate"):
        command = [sys.executable, "-m", f"sqa_jax.{verb}", "--config", "configs/test.py", "--workdir", str(tmp_path / "run")]  # fmt: skip
        result = subprocess.run([*command, *flags], capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
        assert result.returncode == 0, result.stderr
    rows = map(json.loads, (tmp_path / "run/eval/test/predictions.jsonl").read_text().splitlines())
    problems = load_problems("dir", str(tmp_path / "eight")).split("test")
    assert {row["pid"]: row["text"] for row in rows} == {
        p.pid: render_target(Format("QCM", "A"), p.choices, p.answer, "", "", "both") for p in problems
    }


def test_eight_examples_are_learnt_and_generated(tmp_path):
    """The test that finds a shifted label, a missing end token or another prompt at inference: overfit, then *generate*."""
    changes = {"student.path": "random:small", "train.steps": 120, "eval.val_limit": 2, "eval.batch_rows": 1}
    overfit_eight(tmp_path, **changes)
