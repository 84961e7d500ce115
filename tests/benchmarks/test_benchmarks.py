"""The benchmark: both sides do the same work, and the report holds what was measured."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from sqa_jax.errors import UserError
from sqa_jax.files import read_json, write_json
from tests.benchmarks import ours, process, work
from tests.benchmarks.__main__ import benchmark
from tests.benchmarks.config import get_config
from tests.benchmarks.grouping import group_by_length
from tests.benchmarks.report import disagreement, machine, markdown
from tests.support.runs import ONE_DEVICE
from tests.support.verbs import run_verb

TINY = {
    "student.path": "random:tiny", "recipe.max_prompt": 500, "train.row_length": 512, "train.batch_rows": 8,
    "train.steps": 3, "eval.limit": 12, "eval.row_length": 512, "eval.batch_rows": 8, "eval.batch_questions": 8,
    "eval.max_new_tokens": 6,
}  # fmt: skip


def tiny_config(root, **change):
    config = get_config()
    config.update_from_flattened_dict(TINY | change)
    config.data.cache = str(root / "datasets")
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with the work in it."""
    root = tmp_path_factory.mktemp("benchmark")
    settings = {"config": tiny_config(root).to_dict(), "run": "", "tokenizer": "", "batch_options": 5}
    write_json(root / "benchmark.json", settings)
    work.prepare(root, 0.0)
    return root


def test_both_sides_train_alike(root, reference):
    """Same losses and gradients from the first step to the last: same weights, adapter, examples and optimizer."""

    def compute():
        from tests.benchmarks import theirs

        found = theirs.train(root, time.time())
        return {key: np.array(found[key]) for key in ("losses", "gradient_norms")}

    found, expected = ours.train(root, time.time()), reference("benchmarks/train", compute, 1e-4)
    np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-4)
    np.testing.assert_allclose(found["gradient_norms"], expected["gradient_norms"], rtol=1e-3)
    assert found["losses"][-1] != found["losses"][0]


def test_grouping_by_length_keeps_the_examples_and_saves_padding(root):
    def padded(batches):
        return sum(len(batch) * max(len(example["tokens"]) for example in batch) for batch in batches)

    before = read_json(root / "work.json", "")["batches"]
    after = group_by_length(before)
    assert len(after) == len(before) and padded(after) < padded(before)
    assert sorted(map(str, sum(after, []))) == sorted(map(str, sum(before, [])))


def test_both_sides_answer_alike(root, reference):
    def compute():
        from tests.benchmarks import theirs

        texts = json.dumps(theirs.generate(root, 0.0)["texts"]).encode()
        answers = theirs.likelihood(root, 0.0)["answers"]
        return {"answers": np.array(answers), "texts": np.frombuffer(texts, np.uint8)}

    expected = reference("benchmarks/answers", compute)
    texts = json.loads(expected["texts"].tobytes())
    assert ours.likelihood(root, 0.0)["answers"] == expected["answers"].tolist()
    assert len(set(expected["answers"].tolist())) > 1
    assert ours.generate(root, 0.0)["texts"] == texts and all(texts)


def test_measurements_run_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE["XLA_FLAGS"])  # one device is enough, and compiles faster
    config = tiny_config(tmp_path, **{"train.batch_rows": 1, "data.train_limit": 24})
    benchmark(config, str(tmp_path), ["loader"], 1, tokenizer="", run="", batch_options=16)
    (seconds,) = json.loads((tmp_path / "results.json").read_text())["loader"]["ours"]
    assert 0 < seconds["waited"] < seconds["loaded"] and seconds["ready"] > 0
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


def test_mistakes_on_the_command_line(tmp_path):
    done = run_verb("benchmarks", "--measure=loader", "--repeats=0", f"--workdir={tmp_path}", package="tests")
    assert done.returncode == 2 and done.stderr == "error: --repeats is 0; measure once or more\n"


def test_a_process_that_fails_is_quoted(tmp_path):
    write_json(tmp_path / "benchmark.json", {"config": {"adapter": {"methods": ["prompt"]}}})
    with pytest.raises(UserError, match="^config.adapter.methods is .* lora$"):
        process.measure("tests.benchmarks.work", "prepare", True, tmp_path, "mistake")
    with pytest.raises(
        UserError, match=r"^defect ended with exit code 1 \(KeyError: 'nothing'\); all of it is in .*log$"
    ):
        process.measure("tests.benchmarks.work", "nothing", False, tmp_path, "defect")


def test_other_files_are_not_touched(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="something else"):
        benchmark(get_config(), str(tmp_path), ["loader"], 1)
    assert (tmp_path / "runs").is_dir()


def results(ours_losses=(2.0, 1.5), dtype="float32"):
    """Two runs of each side with known figures."""

    def runs(*rates, losses):
        return [
            {"rate": rate, "first_step_s": 10 * rate, "peak_bytes": 1e9 * rate, "losses": losses, "gradient_norms": [1.0, 1.0]}
            for rate in rates
        ]  # fmt: skip

    train = {
        "ours": runs(4.0, 9.0, losses=ours_losses),
        "theirs": runs(2.0, 3.0, losses=(2.0, 1.5)),
        "theirs_grouped": runs(8.0, 9.0, losses=(2.1, 1.4)),
        "theirs_large_pages": runs(16.0, 18.0, losses=(2.1, 1.4)),
    }
    account = {
        "parts": [{"seconds": {"forward": 2.0, "whole step": 8.0}, "flops": {"forward": 3e9, "whole step": 6e9}}],
        "ours": [{"seconds": 1.0, "flops": 2e9}],
        "theirs": [{"seconds": 0.5}],
    }
    sizes = dict.fromkeys(
        ("parameters", "examples_per_step", "tokens_per_example", "real_tokens_in_rows", "questions", "options_per_question", "tokens_per_prompt"), 1
    )  # fmt: skip
    return {
        "machine": machine(), "config": get_config().to_dict(), "work": sizes | {"dtype": dtype, "accelerator": "cpu"},
        "train": train, "account": account,
    }  # fmt: skip


def test_ratios_are_of_neighbouring_runs():
    page = markdown(results())
    assert "| training, real tokens/s | 6.5 | 2.5 | 2.50× (2.00–3.00) |" in page
    assert "| … theirs grouped by length | 6.5 | 8.5 | 0.75× (0.50–1.00) |" in page
    assert "| first step from the process's start, s | 40 | 20 | 2.00× (2.00–2.00) |" in page  # compiles
    assert "| … ours compiled before, s | 90 | 30 | 3.00× (3.00–3.00) |" in page
    # The products' rate is 2 GFLOP/s, so 6 GFLOP would take 3 s.
    assert "| whole step | 8 | 6 | 0.75 | 38% |" in page
    assert "the step would take 3 s; 5 s go elsewhere" in page


@pytest.mark.parametrize(
    ("loss", "dtype", "same"),
    [(2.0005, "float32", True), (2.01, "float32", False), (2.01, "bfloat16", True), (float("nan"), "bfloat16", False)],
)
def test_another_first_loss_is_no_benchmark(loss, dtype, same):
    assert (disagreement(results((loss, 1.5), dtype)) == "") == same
