"""The leaderboard's columns, intervals and the score verb, against brute force."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sqa_jax.data import sample
from sqa_jax.data.problem import ImageFile, Problem
from sqa_jax.data.sources import load_problems
from sqa_jax.errors import UserError
from sqa_jax.metrics.intervals import accuracy_interval, mcnemar, paired_difference
from sqa_jax.metrics.leaderboard import COLUMNS, read_predictions, score
from sqa_jax.reporting.format import duration
from sqa_jax.reporting.tables import comparison, text_table
from tests.support.verbs import run_verb

problem = st.builds(
    Problem,
    pid=st.uuids().map(str),
    question=st.just("q"),
    choices=st.just(("a", "b", "c")),
    answer=st.integers(0, 2),
    hint=st.sampled_from(["", "  ", "h"]),
    image=st.sampled_from([None, ImageFile("i", bytes)]),
    grade=st.sampled_from(["", "grade1", "grade6", "grade7", "grade12"]),
    subject=st.sampled_from(["natural science", "social science", "language science", ""]),
)


@settings(max_examples=60, deadline=None)
@given(problems=st.lists(problem, min_size=1, max_size=30, unique_by=lambda p: p.pid), data=st.data())
def test_columns_equal_counting_by_hand(problems, data):
    predictions = {p.pid: data.draw(st.sampled_from([None, 0, 1, 2])) for p in problems if data.draw(st.booleans())}
    rows = [
        (
            p.subject, bool(p.hint.strip()), p.image is not None, p.grade[5:],
            float(predictions.get(p.pid) is not None and predictions[p.pid] == p.answer),
        )
        for p in problems
    ]  # fmt: skip
    by_hand = {
        "NAT": [r[4] for r in rows if r[0] == "natural science"],
        "SOC": [r[4] for r in rows if r[0] == "social science"],
        "LAN": [r[4] for r in rows if r[0] == "language science"],
        "TXT": [r[4] for r in rows if r[1]],
        "IMG": [r[4] for r in rows if r[2]],
        "NO": [r[4] for r in rows if not r[1] and not r[2]],
        "G1-6": [r[4] for r in rows if r[3] in ("1", "6")],
        "G7-12": [r[4] for r in rows if r[3] in ("7", "12")],
        "AVG": [r[4] for r in rows],
    }
    found = score(problems, predictions)
    assert list(COLUMNS) == list(by_hand)
    for column, values in by_hand.items():
        assert found["n"][column] == len(values)
        assert found[column] == (round(100 * np.mean(values), 2) if values else None)
    assert found["missing"] == len(problems) - len(predictions)
    assert found["unparsed"] == sum(a is None for a in predictions.values())


FOUR = [Problem(str(k), "q", ("a", "b"), k % 2) for k in range(4)]


@pytest.mark.parametrize(
    ("predictions", "words"),
    [({"9": 0}, "question 9 is not in this split"), ({"1": 2}, "question 1: answer 2 is outside")],
)
def test_predictions_that_belong_elsewhere_are_refused(predictions, words):
    with pytest.raises(UserError, match=words):
        score(FOUR, predictions)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"pid": "1", "answer": 0}\n{"pid": "1", "answer": 1}', "question 1 is predicted twice"),
        ('{"pid": "1"}', 'prediction 1 lacks "pid" or "answer"'),
        ('{"pid": "1", "answer": "B"}', "question 1: answer 'B'"),
        ('{"pid": "1", "answer": true}', "question 1: answer True"),
        ('{"pid": "1", "ans', ":1: not a JSON object"),
        ("[1]", ":1: not a JSON object"),
    ],
)
def test_bad_prediction_files_are_named(tmp_path, content, words):
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=f"p.jsonl.*{words}"):
        read_predictions(file)


@settings(max_examples=40, deadline=None)
@given(right=st.lists(st.booleans(), min_size=5, max_size=60))
def test_wilson_interval_is_its_formula(right):
    n, p, z = len(right), np.mean(right), stats.norm.ppf(0.975)
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n),
    )
    np.testing.assert_allclose(accuracy_interval(right), [p, max(0, centre - half), min(1, centre + half)], atol=1e-9)


def test_paired_bootstrap_equals_resampling_questions():
    rng = np.random.default_rng(0)
    first, second = rng.random(200) < 0.5, rng.random(200) < 0.65
    draws = rng.integers(0, 200, (4000, 200))
    brute = (second[draws].mean(1) - first[draws].mean(1)).astype(float)
    found = paired_difference(first, second)
    assert found.value == pytest.approx(second.mean() - first.mean())
    np.testing.assert_allclose([found.low, found.high], np.percentile(brute, [2.5, 97.5]), atol=0.012)


def test_mcnemar_is_the_exact_binomial():
    first, second = [True] * 3 + [False] * 12 + [True] * 5, [False] * 3 + [True] * 12 + [True] * 5
    by_hand = 2 * sum(stats.binom.pmf(k, 15, 0.5) for k in range(4))
    assert mcnemar(first, second) == pytest.approx(by_hand)
    assert mcnemar(first, first) == 1.0


def test_table_shows_every_system_and_the_difference():
    systems = {"base": {p.pid: 0 for p in FOUR}, "better": {p.pid: p.answer for p in FOUR}}
    for markdown in (False, True):
        text = comparison(FOUR, systems, markdown)
        assert all(name in text for name in ("base", "better", *COLUMNS)) and "100.00" in text and "50.00" in text
        assert "better − base: +50.0 points on the same 4 questions" in text


def test_text_tables_align_the_first_column_left_and_the_others_right():
    rows = [["zero-shot", "1.5", ""], ["n", "100", "x"]]
    assert text_table(["system", "AVG", "note"], rows) == (
        "system     AVG  note\n---------  ---  ----\nzero-shot  1.5\nn          100     x"
    )
    assert text_table(["a", "b"], [["c", "d"]], markdown=True) == "| a | b |\n| --- | ---: |\n| c | d |"


@pytest.mark.parametrize(
    ("seconds", "digits", "text"),
    [(None, 0, "–"), (0.4, 0, "0 s"), (0.0123, 1, "12.3 ms"), (119.4, 0, "119 s"), (1.26, 1, "1.3 s"), (150, 0, "2 min"),
     (150, 1, "2.5 min"), (7199, 0, "120 min"), (9000, 0, "2.5 h"), (9000, 1, "2.5 h")],
)  # fmt: skip
def test_durations_have_the_unit_that_fits(seconds, digits, text):
    assert duration(seconds, digits) == text


def run(*arguments):
    return run_verb("score", *arguments)


@pytest.fixture(scope="module")
def gold(tmp_path_factory):
    made, directory = sample.generate(), tmp_path_factory.mktemp("gold")
    rows = {pid: made.problems[pid]["answer"] for pid in made.splits["test"]}
    (directory / "gold.jsonl").write_text("".join(json.dumps({"pid": p, "answer": a}) + "\n" for p, a in rows.items()))
    (directory / "gold.json").write_text(json.dumps({"results": rows}))
    return directory


@pytest.mark.parametrize("name", ["gold.jsonl", "gold.json"])
def test_gold_scores_one_hundred(gold, name):
    result = run("--problems", "sample", "--predictions", str(gold / name))
    metrics = json.loads(result.stdout)
    assert all(metrics[column] == 100.0 for column in COLUMNS) and metrics["missing"] == metrics["unparsed"] == 0


@pytest.mark.parametrize("name", ["image-questions", "image-questions-shifted"])
def test_other_embedded_questions_are_scored_too(tmp_path, name):
    gold = {problem.pid: problem.answer for problem in load_problems(name).split("test")}
    (tmp_path / "gold.json").write_text(json.dumps({"results": gold}))
    metrics = json.loads(run("--problems", name, "--predictions", str(tmp_path / "gold.json")).stdout)
    assert metrics["AVG"] == 100.0 and metrics["n"]["AVG"] == metrics["n"]["IMG"] == len(gold) == 960


def test_starts_fast_and_without_jax(gold):
    """In a process, for what it imports; its processor time is measured, which other processes do not change."""
    program = (
        "import sys; sys.argv = ['score', '--problems', 'sample', '--predictions', sys.argv[1]]; import runpy\n"
        "try: runpy.run_module('sqa_jax.score', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import time; print([m for m in ('jax', 'scipy', 'transformers', 'datasets', 'torch') if m in sys.modules], time.process_time(), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(gold / "gold.jsonl")], capture_output=True, text=True)
    modules, _, seconds = result.stderr.strip().rpartition(" ")
    assert modules == "[]" and float(seconds) < 1, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--problems", "sample"], "--predictions"),
        (["--problems", "/nowhere", "--predictions", "x.jsonl"], "problems.json: not found"),
        (["--problems", "sample", "--predictions", "nowhere.jsonl"], "nowhere.jsonl: not found"),
        (["--problems", "sample", "--splt", "val"], "did you mean split?"),
        (["--problems", "sample", "--split", "vl", "--predictions", "x"], "no split 'vl'"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(arguments, words):
    result = run(*arguments)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1, (
        result.stderr
    )
