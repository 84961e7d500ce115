"""What a run tells, and who of several processes tells it."""

from __future__ import annotations

import json

import jax
import pytest

from sqa_jax.training.reporter import Reporter

METRICS = {"loss": 1.0, "adapter_norm": 2.0, "tokens": 3.0}


@pytest.mark.parametrize("process", [0, 1])
def test_only_the_first_process_writes_and_speaks(process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    report = Reporter(tmp_path, 0, 2)
    report.say("hello")
    for step in (1, 2):
        report.step(step, METRICS, write=True)
        report.flush()
    report.close()
    written = [json.loads(line)["step"] for path in tmp_path.glob("metrics.jsonl") for line in path.open()]
    assert written == ([1, 2] if process == 0 else [])
    assert ("hello" in capsys.readouterr().err) == bool(list(tmp_path.iterdir())) == (process == 0)
