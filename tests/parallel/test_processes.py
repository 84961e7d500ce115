"""Runs of two and four processes: the result of one, whichever dies, comes late or stops; and one line that says so."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sqa_jax.checkpoints.load import load_student
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.parallel.processes import Group, check
from sqa_jax.parallel.rules import shardings
from sqa_jax.parallel.supervisor import explain
from sqa_jax.runtime import Runtime, make_decoder
from sqa_jax.training.loop import train
from tests.support.process_group import free_port, launch, wait_for_all
from tests.support.runs import command, last_adapter, tiny_config, wait_for_step
from tests.training.test_step import METHODS, on_one_device  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent.parent


# (methods, mesh); in one the `tensor` axis spans the processes, so that each loads every row.
CASES = {2: [(METHODS[0], (2, 2, 2)), (METHODS[1], (1, 1, 8))], 4: [(METHODS[0], (1, 2, 2)), (METHODS[1], (2, 2, 1))]}


@pytest.mark.parametrize("processes", CASES)
def test_processes_give_the_single_device_result(on_one_device, processes):  # noqa: F811
    address, cases = f"127.0.0.1:{free_port()}", CASES[processes]
    started = launch(
        lambda index: [
            ROOT / "tests" / "support" / "processes_worker.py",
            address,
            processes,
            index,
            json.dumps(cases),
        ],
        processes,
        math.prod(cases[0][1]),
    )
    for code, out, err in wait_for_all(started):
        assert code == 0, err[-2000:]
        results = json.loads(next(line for line in out.splitlines() if line.startswith("RESULT "))[7:])
        for (methods, _), result in zip(cases, results, strict=True):
            losses, adapter = on_one_device[methods]
            np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
            leaves = jax.tree_util.tree_leaves_with_path(adapter)
            assert result["adapter"].keys() == {jax.tree_util.keystr(path) for path, _ in leaves}
            for path, leaf in leaves:
                name = jax.tree_util.keystr(path)
                np.testing.assert_allclose(result["adapter"][name], leaf.ravel()[::7], atol=1e-5, err_msg=name)


# ---- the verb


def verb(config, workdir, processes, **last):
    """Arguments of `train` for each process; `last` changes the last one's configuration."""
    address = f"127.0.0.1:{free_port()}"

    def arguments(index):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(last if index == processes - 1 else {})
        return [
            *command(changed, workdir)[1:], "--coordinator", address, "--processes", processes, "--process", index,
            "--start_timeout=60", "--heartbeat_timeout=6",
        ]  # fmt: skip

    return arguments


def verb_lines(out: str) -> list[str]:
    """Lines of the verb itself. Gloo's threads write into each other's lines: its words may be in any order."""
    gloo = set("[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :".split())
    return [line for line in out.splitlines() if not all(word in gloo or word.isdigit() for word in line.split())]


def four_devices(config, count: int = 4):
    """The runtime of one process on as many devices as several processes have together, or on another number."""
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    student = load_student(config.student.path, shardings_for=lambda tree: shardings(tree, mesh))
    return Runtime(mesh, student, make_decoder(config, student.config, mesh))


STEPS = 16


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of one process, and its configuration."""
    root = tmp_path_factory.mktemp("whole")
    config = tiny_config(
        root,
        **{
            "recipe.max_prompt": 250, "train.row_length": 320, "train.batch_rows": 4, "train.steps": STEPS,
            "train.eval_every": 0, "train.save_every": 3, "eval.batch_rows": 4,
        },
    )  # fmt: skip
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 4, 1, 1
    train(config, str(root / "run"), four_devices(config))
    return config, root / "run"


def test_a_run_survives_its_processes(whole, tmp_path):
    """Four processes of which one is killed; two on another mesh, one of which gets SIGTERM; then one, to the end."""
    config, uninterrupted = whole
    workdir = tmp_path / "run"
    four = launch(verb(config, workdir, 4), 4)
    assert wait_for_step(workdir, 1, four[0].process)
    child = int(subprocess.check_output(["pgrep", "-P", str(four[3].pid)]))  # of the supervisor
    assert wait_for_step(workdir, 4, four[0].process)
    os.kill(child, signal.SIGKILL)
    killed_at = time.monotonic()
    *others, killed = wait_for_all(four)
    assert time.monotonic() - killed_at < 30  # heartbeats of six seconds, and the exits
    assert killed.code == 1 and "process 3 of 4: ended by SIGKILL" in killed.err
    for code, _, err in others:
        # Threads of JAX may write after it.
        assert code != 0 and any(line.startswith("error: ") for line in err.splitlines()), err[-2000:]
        assert "Check failure stack trace" not in err

    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 2, 2
    two = launch(verb(config, workdir, 2), 2)
    assert wait_for_step(workdir, 7, two[0].process)
    os.kill(two[1].pid, signal.SIGTERM)
    stopped = wait_for_all(two)
    assert [code for code, _, _ in stopped] == [0, 0], stopped
    assert "saved; the same command continues" in stopped[0][1] and not verb_lines(stopped[1][1])
    step, _ = last_adapter(workdir, config)
    assert 7 <= step < STEPS

    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 4, 1, 1
    assert train(config, str(workdir), four_devices(config))["finished"]
    found, expected = losses(workdir), losses(uninterrupted)
    assert len(found) == STEPS + 2
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # Adam amplifies the last bit of a sum's order
    adapters = [last_adapter(run, config)[1]["adapter"] for run in (workdir, uninterrupted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *adapters)


def test_two_processes_evaluate_as_one(whole, tmp_path):
    config, uninterrupted = whole
    alone = evaluate(config, str(uninterrupted), four_devices(config))
    predictions = (uninterrupted / "eval" / "test" / "predictions.jsonl").read_text()
    (uninterrupted / "eval" / "test").rename(uninterrupted / "eval" / "alone")
    address = f"127.0.0.1:{free_port()}"
    flags = ["--coordinator", address, "--processes", 2, "--workdir", uninterrupted]
    started = launch(lambda index: ["-m", "sqa_jax.evaluate", *flags, "--process", index], 2)
    (code, out, err), (other, silent, _) = wait_for_all(started)
    assert code == other == 0, err[-2000:]
    assert f'"AVG": {alone["AVG"]}' in out and not verb_lines(silent)
    assert (uninterrupted / "eval" / "test" / "predictions.jsonl").read_text() == predictions


def losses(workdir) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "val_loss") if name in row]


@pytest.mark.parametrize(
    "changes",
    [
        {"student.path": "random:paligemma-tiny", "adapter.methods": ("prompt", "lora")},
        {"student.path": "random:qwen2-vl-tiny", "adapter.methods": ("lora",), "adapter.lora.vision_encoder": True},
    ],
    ids=["cached features", "vision encoder"],
)
def test_vision_language_models_train_as_one(changes, tmp_path):
    """With cached image features, which the processes compute together, and with the vision encoder in each step."""
    config = tiny_config(
        tmp_path,
        **{
            "data.source": "image-questions", "recipe.format": "QM-A", "train.row_length": 256, "train.batch_rows": 4,
            "train.steps": 3, "train.eval_every": 0, "train.save_every": 0, "train.log_every": 1, "eval.batch_rows": 4,
            "data.train_limit": 12,
            "optimizer.learning_rate": 1e-2, "mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, **changes,
        },
    )  # fmt: skip
    train(config, str(tmp_path / "alone"), four_devices(config, 1))
    config.mesh.data = config.mesh.fsdp = 2
    config.data.cache = str(tmp_path / "other")
    for code, _, err in wait_for_all(launch(verb(config, tmp_path / "run", 2), 2)):
        assert code == 0, err[-2000:]
    alone = losses(tmp_path / "alone")
    assert len(alone) == 3 + 2 and alone[-1] < alone[0]
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-4)


def test_an_error_in_one_process_ends_all(whole, tmp_path):
    config, _ = whole
    broken = {"data.source": "dir", "data.path": "/no/such/place"}
    started = launch(verb(config, tmp_path / "run", 2, **broken), 2)
    (code, _, err), (other, _, why) = wait_for_all(started)
    assert other == 2 and "/no/such/place" in why.splitlines()[-1]
    assert code == 1 and "process 1 of 2 failed: " in err.splitlines()[-1] and "/no/such/place" in err


def test_processes_that_do_not_come(tmp_path):
    """No coordinator listens at the address; and a coordinator waits for a process that never starts."""
    address = f"127.0.0.1:{free_port()}"
    single = ["-m", "sqa_jax.train", "--workdir", tmp_path, "--processes", 2, "--start_timeout=3"]
    started = [
        launch(lambda _, a=a: [*single, *a], 1)[0]
        for a in (
            ["--coordinator", address, "--process", 1],
            ["--coordinator", f"127.0.0.1:{free_port()}", "--process", 0],
        )
    ]
    (code, _, err), (other, _, waited) = wait_for_all(started, 60)
    assert code == 2 and f"no coordinator at {address} within 3 s" in err and len(err.strip().splitlines()) == 1
    assert other == 1 and "not all processes came within 3 s" in waited.splitlines()[-1]
    assert "stack trace" not in waited


def test_flags_that_contradict_each_other_are_refused():
    for group in (Group("somewhere"), Group("host:123"), Group("host:123", 2, 2), Group("host:123", 0, 0)):
        with pytest.raises(UserError, match="--coordinator|--processes"):
            check(group)
    check(Group("auto"))
    check(Group("host:123", 2, 1))


def test_fatal_logs_of_the_runtime_are_explained():
    group = Group("10.0.0.1:8476", 4, 2)
    lost = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n3\nThe tasks have crashed."
    assert "process 2 of 4: process 3 has ended" in explain(lost, signal.SIGABRT, group)
    assert "within 300 s" in explain("RPC: /xla.coordination.CoordinationService/RegisterTask", signal.SIGABRT, group)
    assert "out of memory" in explain("", signal.SIGKILL, group)
