"""Tiny training runs: their configuration, their command line, and what they leave, read without the code under test."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from configs.test import get_config
from sqa_jax.config import default
from sqa_jax.data import sample
from sqa_jax.data.sources import load_problems
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.prompts.formats import Format, render_target
from sqa_jax.training.loop import train


def tiny_config(tmp_path: Path, **change):
    """Six steps of a random student on 24 questions; `change` overrides settings by their keys."""
    config = default()
    config.update_from_flattened_dict(
        {
            "student.path": "random:tiny", "data.cache": str(tmp_path / "datasets"), "data.train_limit": 24, "recipe.max_prompt": 700,
            "train.row_length": 1024, "train.batch_rows": 2, "train.steps": 6, "train.eval_every": 3, "train.save_every": 2,
            "eval.val_limit": 4, "eval.limit": 6, "eval.batch_rows": 2,
        } | change
    )  # fmt: skip
    return config


def quick_config(tmp_path: Path, **change):
    """`tiny_config` with LoRA on two layers and without rematerialization, which a start of a run traces sooner."""
    return tiny_config(tmp_path, **{"student.remat": "none", "adapter.lora.targets": ("q_proj", "down_proj")} | change)


def last_adapter(workdir, config):
    """(step, train state) of the last checkpoint, in NumPy, whatever devices it was saved from."""
    root = workdir / "checkpoints" / "last"
    step = max(int(path.name) for path in root.iterdir() if path.name.isdigit())
    reader, path = ocp.PyTreeCheckpointer(), root / str(step) / "state"
    leaves = reader.metadata(path).item_metadata.tree
    return step, reader.restore(path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), leaves))


def same(a, b) -> None:
    """Asserts that two trees of arrays are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def metrics_of(workdir, name: str = "loss") -> list[dict]:
    """The rows of metrics.jsonl that hold a metric."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if name in row]


def command(config, workdir) -> list[str]:
    """`python -m sqa_jax.train` with these settings, as a user starts it."""

    def settings(config, name=""):
        for key, value in config.items():
            yield from settings(value, f"{name}.{key}") if isinstance(value, ConfigDict) else [(f"{name}.{key}", value)]

    usual = dict(settings(get_config()))
    overrides = [f"--config{name}={value}" for name, value in settings(config) if value != usual[name]]
    return [sys.executable, "-m", "sqa_jax.train", "--config", "configs/test.py", "--workdir", str(workdir), *overrides]


# The environment of a process with a single simulated device: a run of two rows a batch needs no more.
ONE_DEVICE = {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")}


def start_training(config, workdir) -> multiprocessing.Process:
    """Trains in a process that is forked from one that has imported everything: it starts in no time, and can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.runs"])
    process = context.Process(target=_train_alone, args=(config, str(workdir)))
    process.start()
    return process


def _train_alone(config, workdir: str) -> None:
    os.environ.update(ONE_DEVICE)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train(config, workdir)


def wait_for_step(workdir, step: int, process) -> bool:
    """True as soon as a step is reported, False if the process ends before.

    Args:
      process: a `subprocess.Popen` or a `multiprocessing.Process`.
    """
    file = workdir / "metrics.jsonl"
    running = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    while running():
        lines = file.read_text().splitlines() if file.exists() else []
        if any('"loss"' in line and f'"step": {step},' in line for line in lines):
            return True
        time.sleep(0.01)
    return False


def overfit_eight(tmp_path: Path, **changes) -> None:
    """Trains a whole model on eight questions of the sample until it generates each target, letter by letter."""
    sample.write(tmp_path / "eight")
    pids = sorted(random.Random(0).sample(sample.generate().splits["train"], 8), key=int)
    (tmp_path / "eight" / "pid_splits.json").write_text(json.dumps({split: pids for split in ("train", "val", "test")}))
    config = get_config()
    config.adapter.methods = ("full",)
    config.update_from_flattened_dict(
        {
            "data.source": "dir", "data.path": str(tmp_path / "eight"), "data.cache": str(tmp_path / "cache"), "recipe.answer": "both",
            "optimizer.learning_rate": 3e-3, "train.eval_every": 0, "eval.mode": "generate", "eval.max_new_tokens": 100,
            "eval.batch_questions": 8, "eval.checkpoint": "last", **changes,
        }
    )  # fmt: skip
    train(config, str(tmp_path / "run"))
    evaluate(config, str(tmp_path / "run"))
    rows = map(json.loads, (tmp_path / "run/eval/test/predictions.jsonl").read_text().splitlines())
    problems = load_problems("dir", str(tmp_path / "eight")).split("test")
    assert {row["pid"]: row["text"] for row in rows} == {
        p.pid: render_target(Format("QCM", "A"), p.choices, p.answer, "", "", "both") for p in problems
    }
