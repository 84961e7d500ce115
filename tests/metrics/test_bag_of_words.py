"""The bag-of-words baseline against scikit-learn's feature hasher and logistic regression."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.data.sources import load_problems
from sqa_jax.metrics.bag_of_words import COLUMNS, features, option_scores, predict
from sqa_jax.metrics.feature_hashing import hashed_counts, murmurhash3
from sqa_jax.metrics.logistic_regression import fit
from tests.support.verbs import run_verb


@pytest.fixture(scope="module")
def questions():
    problems = load_problems("sample")
    return problems.split("train"), problems.split("test")[:300]


def test_scores_and_predictions_are_those_of_scikit_learn(questions, reference):
    train, test = questions

    def compute():
        from sklearn.feature_extraction import FeatureHasher
        from sklearn.linear_model import LogisticRegression

        hasher = FeatureHasher(COLUMNS, input_type="string")
        rows, asked = (hasher.transform(features(p, o) for p in part for o in p.choices) for part in (train, test))
        labels = [k == p.answer for p in train for k in range(len(p.choices))]
        return {"scores": LogisticRegression(C=1.0, max_iter=200).fit(rows, labels).decision_function(asked)}

    theirs = iter(reference("metrics/bag_of_words", compute)["scores"])
    by_option = [[float(next(theirs)) for _ in problem.choices] for problem in test]
    ours = option_scores(train, test)
    np.testing.assert_allclose(np.concatenate(ours), np.concatenate(by_option), rtol=0, atol=1e-8)
    assert predict(train, test) == {p.pid: int(np.argmax(scores)) for p, scores in zip(test, by_option, strict=True)}


# Of MurmurHash3_x86_32 with seed 0, signed; strings of every length of tail, and one whose sign bit is set.
KNOWN_HASHES = {
    "": 0,
    "a": 1009084850,
    "ab": -1681926305,
    "abc": -1277324294,
    "abcd": 1139631978,
    "hello, world": 345750399,
}


def test_murmurhash3_of_known_strings(reference):
    assert dict(zip(KNOWN_HASHES, murmurhash3(list(KNOWN_HASHES)).tolist(), strict=True)) == KNOWN_HASHES
    rng = np.random.default_rng(0)
    strings = ["".join(rng.choice(list("ab|_éß日"), rng.integers(0, 40))) for _ in range(500)]

    def compute():
        from sklearn.utils import murmurhash3_32

        return {"hashes": np.array([murmurhash3_32(string, 0) for string in strings], np.int32)}

    np.testing.assert_array_equal(murmurhash3(strings), reference("metrics/murmurhash3", compute)["hashes"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.text("abc", max_size=3), max_size=6), min_size=1, max_size=5))
def test_hashed_counts_are_sums_of_signs(rows):
    """Counted string by string; the few columns make strings collide."""
    expected = np.zeros((len(rows), 5))
    for number, row in enumerate(rows):
        for string in row:
            (value,) = murmurhash3([string]).tolist()
            expected[number, abs(value) % 5] += 1 if value >= 0 else -1
    np.testing.assert_array_equal(hashed_counts(rows, 5).toarray(), expected)


def test_the_fit_is_a_minimum():
    """The gradient of the penalised loss vanishes, and a step in any direction makes the loss larger."""
    rng = np.random.default_rng(1)
    x, labels = rng.choice([-1.0, 0.0, 1.0], (60, 8)), rng.random(60) < 0.4
    from scipy import sparse

    weights, bias = fit(sparse.csr_array(x), labels, penalty=0.7)

    def loss(w, b):
        signs = np.where(labels, 1, -1)
        return np.log1p(np.exp(-signs * (x @ w + b))).sum() + 0.35 * w @ w

    least = loss(weights, bias)
    for direction in rng.normal(size=(20, 9)):
        step = 0.05 * direction / np.linalg.norm(direction)
        assert loss(weights + step[:-1], bias + step[-1]) > least


def test_the_verb_writes_a_prediction_for_each_question(tmp_path):
    result = run_verb(
        "metrics.bag_of_words", "--problems", "sample", "--split", "test", "--limit", 20, "--out", tmp_path / "p.jsonl"
    )
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert result.returncode == 0 and "wrote 20 predictions" in result.stdout and len(rows) == 20
    assert (
        run_verb("metrics.bag_of_words", "--problems", "sample").stderr
        == "error: --problems and --out are needed; see --help\n"
    )
