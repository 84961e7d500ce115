"""The train and evaluate verbs on a tiny student: learning, resuming, stopping, refusing."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys

import pytest

from sqa_jax.data.sources import load_problems
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.models.soft_tokens import NO_SOFT_PROMPT
from sqa_jax.runtime import build_runtime
from sqa_jax.training.checkpoint import Checkpoints
from sqa_jax.training.loop import train
from sqa_jax.training.validate import Validator
from tests.conftest import ROOT
from tests.support.runs import (
    ONE_DEVICE,
    command,
    last_adapter,
    metrics_of,
    overfit_eight,
    quick_config,
    same,
    start_training,
    tiny_config,
    wait_for_step,
)
from tests.support.verbs import run_verb

MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, config, result) of a finished run on one device."""
    root = tmp_path_factory.mktemp("trained")
    config = quick_config(root)
    return root / "run", config, train(config, str(root / "run"))


def test_a_run_writes_what_the_verb_documents(trained):
    workdir, config, result = trained
    assert result == {**json.loads((workdir / "train.json").read_text()), "stopped": False} and result["finished"]
    assert [row["step"] for row in metrics_of(workdir)] == [1, 2, 3, 4, 5, 6]
    validations = metrics_of(workdir, "val_loss")
    assert [row["step"] for row in validations] == [0, 3, 6]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert list((workdir / "tensorboard").glob("events*")) and (workdir / "checkpoints" / "best").is_dir()


def test_written_lines_sum_to_the_tokens_of_the_run(trained, tmp_path):
    """With few written lines, and validation in between, their sum is the same."""
    each, config, _ = trained
    some = quick_config(tmp_path, **{"train.log_every": 4, "data.cache": config.data.cache})
    train(some, str(tmp_path / "some"))
    lines = [metrics_of(workdir) for workdir in (each, tmp_path / "some")]
    assert [len(rows) for rows in lines] == [6, 2]
    assert len({sum(row["tokens"] for row in rows) for rows in lines}) == 1


def test_a_finished_run_is_not_trained_again(trained):
    workdir, config, result = trained
    before = (workdir / "metrics.jsonl").read_text()
    assert train(config, str(workdir))["step"] == 6
    assert (workdir / "metrics.jsonl").read_text() == before


def test_stopping_and_continuing_is_bit_exact(trained, tmp_path):
    """On eight devices, where the train state is sharded; the tests below continue on one."""
    _, config, _ = trained
    whole = quick_config(tmp_path, **MESH, **{"data.cache": config.data.cache, "eval.val_limit": 1})
    parts = whole.copy_and_resolve_references()
    parts.train.stop_after = 3
    train(whole, str(tmp_path / "whole"))
    for expected in (3, 6):
        assert train(parts, str(tmp_path / "parts"))["step"] == expected
    same(last_adapter(tmp_path / "whole", config), last_adapter(tmp_path / "parts", config))


def test_evaluation_has_a_row_a_question_and_resumes(trained):
    workdir, config, _ = trained
    metrics = evaluate(config, str(workdir))
    folder = workdir / "eval" / "test"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 == metrics["n"]["AVG"] and metrics["missing"] == metrics["unparsed"] == 0
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
        evaluate(quick_config(tmp_path), str(tmp_path))


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
    config = quick_config(tmp_path, **{"train.row_length": 64})
    with pytest.raises(UserError, match="none of the 4 questions of 'val' fits into a row of 64 tokens.*raise"):
        Validator(config, build_runtime(config), load_problems("sample").split("val")[:4], NO_SOFT_PROMPT)


def test_kill_nine_at_random_steps_is_bit_exact(tmp_path):
    """SIGKILL in three different steps; the final adapter is the uninterrupted run's, bit for bit."""
    config = tiny_config(
        tmp_path, **{"train.steps": 12, "train.save_every": 2, "train.eval_every": 6, "eval.val_limit": 2}
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start_training(config, whole), whole)
    for step in sorted(random.Random(7).sample(range(1, 10), 3)):
        process = start_training(config, killed)
        assert wait_for_step(killed, step, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        assert not (killed / "train.json").exists()
    finish(start_training(config, killed), killed)
    same(last_adapter(whole, config), last_adapter(killed, config))
    assert [row["step"] for row in metrics_of(killed)] == list(range(1, 13)), "each step is reported once"


def finish(process, workdir) -> None:
    process.join(120)
    assert process.exitcode == 0 and json.loads((workdir / "train.json").read_text())["finished"]


@pytest.mark.parametrize("died_at", [0, 3])
def test_death_between_best_adapter_and_train_state(trained, tmp_path, monkeypatch, died_at):
    """The best adapter is on disk, the train state of the same step is not: the run continues from the state before."""
    whole, config, _ = trained
    settings = {"train.save_every": 1 if died_at else 2, "data.cache": config.data.cache}
    config = quick_config(tmp_path, **settings)
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
    same(last_adapter(whole, config), last_adapter(tmp_path / "died", config))


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    config = quick_config(tmp_path, **{"train.steps": 400, "train.save_every": 0, "train.eval_every": 0})
    process = subprocess.Popen(
        command(config, tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_DEVICE
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
    result = run_verb("train", *arguments)
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_config_file_with_an_unknown_key(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from sqa_jax.config import default\ndef get_config():\n    c = default()\n    c.optimizer.learning_rat = 1\n    return c\n"
    )
    result = run_verb("train", "--config", file, "--workdir", tmp_path / "w")
    assert result.returncode == 2 and "learning_rate" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.parametrize("verb", ["train", "evaluate", "preprocess", "score", "export"])
def test_help_tells_what_is_read_and_written(verb):
    result = run_verb(verb, "--help")
    option = "--config" if verb != "score" else "--problems"
    assert result.returncode == 0
    assert all(word in result.stdout for word in ("Reads:", "Writes:", "Example", option))


def test_help_imports_nothing_heavy():
    """It is printed in a fraction of a second, so no verb may load JAX, NumPy or transformers for it."""
    verbs = ["train", "evaluate", "preprocess", "score", "export", "plan", "teach", "agent", "study"]
    script = """
import contextlib, io, runpy, sys
from absl import flags
known = set(flags.FLAGS)
for verb in sys.argv[1:]:
    sys.argv = [verb, "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_module(f"sqa_jax.{verb}", run_name="__main__", alter_sys=True)
    flags.FLAGS.remove_flag_values(set(flags.FLAGS) - known)
    for heavy in {"jax", "numpy", "transformers", "datasets"} & sys.modules.keys():
        sys.exit(f"{verb} imports {heavy}")
"""
    result = subprocess.run([sys.executable, "-c", script, *verbs], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_eight_examples_are_learned_and_generated(tmp_path):
    """Overfit, then generate: finds a shifted label, a missing end token, or another prompt at inference."""
    overfit_eight(tmp_path, **{"student.path": "random:tiny", "train.steps": 60, "optimizer.learning_rate": 1e-2})
