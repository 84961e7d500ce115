"""What surrounds the compiled step: pending metrics, best checkpoint, stop vote, profile, transfer guard, overview."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.parallel.rules import shardings
from sqa_jax.signals import StopSignal
from sqa_jax.training import loop
from sqa_jax.training.checkpoint import BestCheckpoint
from sqa_jax.training.optimizer import make_schedule
from sqa_jax.training.overview import parameter_overview
from sqa_jax.training.pending import NonFiniteLoss, PendingMetrics
from sqa_jax.training.profiler import WARM_UP, StepProfiler
from sqa_jax.training.stop import StopVote
from tests.support.runs import metrics_of, tiny_config


class FakeReporter:
    def __init__(self):
        self.steps = []

    def step(self, step, metrics, write):
        self.steps.append((step, metrics, write))


class FakeRows:
    def pids_of(self, row):
        return [f"question-{row}"]


def metrics_with(loss=1.0, row_losses=(1.0, 2.0), grad_norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm), "row_losses": jnp.asarray([row_losses])}


@pytest.fixture
def pending(tmp_path):
    report = FakeReporter()
    rates = np.array([0.1, 0.2, 0.3, 0.4])
    return report, PendingMetrics(tmp_path, report, FakeRows(), 2, 2, rates)


def test_metrics_are_reported_one_step_late_with_the_learning_rate(pending):
    report, metrics = pending
    assert metrics.settle() is False, "before the first step"
    for step in (1, 2, 3, 4):
        metrics.push(step, metrics_with(), step == 4)
        assert len(report.steps) == step - 1
        assert metrics.settle() is (step == 4)
    assert not metrics.settle(), "each step is settled once"
    assert [(step, values["learning_rate"], write) for step, values, write in report.steps] == [
        (1, 0.1, False), (2, 0.2, True), (3, 0.3, False), (4, 0.4, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "questions"),
    [
        (metrics_with(math.nan, (1.0, math.nan)), "questions question-5;"),
        (metrics_with(grad_norm=math.inf), "questions question-4, question-5;"),
    ],
)
def test_a_loss_that_is_not_finite_names_the_questions_of_its_rows(pending, metrics, questions):
    report, pending = pending
    pending.push(3, metrics, False)
    with pytest.raises(NonFiniteLoss, match="step 3: loss") as caught:
        pending.settle()
    assert questions in str(caught.value) and not report.steps


def test_the_best_adapter_is_that_of_the_lowest_loss():
    class FakeCheckpoints:
        saved = []

        def save_best(self, step, adapter):
            self.saved.append((step, adapter))

    best = BestCheckpoint(FakeCheckpoints(), None)
    better = [best.update(step, loss, f"adapter {step}") for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0])]
    assert better == [True, True, False, False, True] and best.loss == 1.0
    assert FakeCheckpoints.saved == [(0, "adapter 0"), (1, "adapter 1"), (4, "adapter 4")]
    assert not BestCheckpoint(FakeCheckpoints(), 0.5).update(9, 0.6, None), "a continued run knows the best so far"


def test_a_process_that_is_alone_stops_at_once():
    signal = StopSignal()
    stop = StopVote(signal)
    stop.decide(False)
    assert not stop.decided and not stop.asked and not stop.vote() and stop.reason == "config.train.stop_after"
    signal.asked, signal.name = True, "SIGTERM"
    assert stop.vote() and stop.asked
    stop.decide(False)
    assert stop.decided and stop.reason == "SIGTERM"


def test_another_process_stops_this_one():
    stop = StopVote(StopSignal())
    stop.decide(True)
    assert stop.decided and stop.reason == "a signal to another process"


# ---- a run


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run with a profile of two of its six steps."""
    root = tmp_path_factory.mktemp("profiled")
    config = tiny_config(root, **{"train.profile_steps": 2, "train.eval_every": 0, "eval.val_limit": 2})
    loop.train(config, str(root / "run"))
    return config, root / "run"


def test_the_learning_rate_is_in_the_metrics(profiled):
    config, workdir = profiled
    rate = make_schedule(config.optimizer, 6)
    expected = [float(f"{float(rate(step)):.6g}") for step in range(6)]
    assert [row["learning_rate"] for row in metrics_of(workdir)] == pytest.approx(expected, rel=1e-5)


def test_a_profile_holds_a_trace(profiled):
    _, workdir = profiled
    traces = list((workdir / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_the_profiler_traces_the_steps_after_the_warm_up(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def run(steps, first, last):
        calls.clear()
        with StepProfiler(tmp_path, first, steps) as profiler:
            for step in range(first + 1, last + 1):
                profiler.before(step, None)
                calls.append(step)
        return [call for call in calls if call != f"start {tmp_path / 'profile'}"], len(calls)

    assert run(0, 0, 5) == ([1, 2, 3, 4, 5], 5)
    traced = [10 + k for k in (1, 2)]
    assert WARM_UP == 2 and run(2, 10, 15) == ([*traced, 13, 14, "stop", 15], 7)
    assert run(9, 10, 14) == ([*traced, 13, 14, "stop"], 6), "a run that ends sooner ends the trace"
    with pytest.raises(UserError, match="config.train.profile_steps"):
        StepProfiler(_Bucket(), 0, 1)


class _Bucket:
    """A path in a bucket, without what talks to one."""

    def __truediv__(self, name):
        return self

    def __str__(self):
        return "gs://bucket/run"


def test_the_step_moves_nothing_to_the_devices_by_itself(tmp_path, monkeypatch):
    """A batch that is still in host memory is refused by the transfer guard, not copied in each step."""
    monkeypatch.setattr(loop, "place_rows", lambda batch, *rest, **kwargs: batch)
    config = tiny_config(tmp_path, **{"train.eval_every": 0, "eval.val_limit": 2, "data.train_limit": 8})
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(config, str(tmp_path / "run"))


def test_the_overview_of_a_run(profiled):
    _, workdir = profiled
    text = (workdir / "parameters.txt").read_text()
    assert "trained" in text and "frozen" in text
    total, trained, frozen = (int(number.replace(",", "")) for number in _numbers(text.splitlines()[-1]))
    assert total == trained + frozen > frozen > trained > 0


def _numbers(line: str) -> list[str]:
    words = line.split()
    return [words[words.index(word) - 1] for word in ("parameters:", "trained", "frozen")]


def test_the_overview_names_shape_sharding_count_and_status():
    config = default()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 4, 2
    mesh = make_mesh(config.mesh)

    def on_mesh(tree):
        return jax.device_put(tree, shardings(tree, mesh))

    frozen = on_mesh(
        {
            "embed_tokens": {"embedding": jnp.zeros((16, 8))},
            "layers": {"mlp": {"up_proj": {"kernel": jnp.zeros((30, 8, 16))}}, "input_layernorm": {"scale": jnp.zeros((30, 8))}},
        }
    )  # fmt: skip
    trained = on_mesh({"lora": {"up_proj": {"a": jnp.zeros((30, 8, 4))}}})
    table, summary = parameter_overview(trained, frozen)
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "mlp/up_proj/kernel 30×8×16 float32 -, fsdp, tensor 3,840 frozen" in lines
    assert "input_layernorm/scale 30×8 float32 replicated 240 frozen" in lines
    assert "up_proj/a 30×8×4 float32 -, fsdp, - 960 trained" in lines
    assert summary == "5,168 parameters: 960 trained (18.58 %), 4,208 frozen" and lines[-1] == summary
    assert "layers 4,080 frozen" in lines, "a subtotal for each top-level module"
    stacked, _ = parameter_overview({}, {"blocks": [{"kernel": jnp.zeros((2, 3))} for _ in range(12)]})
    assert stacked.count("kernel") == 1 and "12 × 2×3" in stacked
