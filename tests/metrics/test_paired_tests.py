"""The study's statistics against sums by hand, other libraries, and simulated studies of which the truth is known."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.metrics.paired_tests import (
    Comparison,
    bootstrap_interval,
    compare,
    holm,
    paired_test,
    smallest_difference,
)
from sqa_jax.study.hypotheses import ALPHA, HYPOTHESES, Hypothesis, verdict


def pair(only_first: int, only_second: int, both: int = 3, neither: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """[1, n] correctness of two systems with so many questions of each kind."""
    first = [1] * only_first + [0] * only_second + [1] * both + [0] * neither
    second = [0] * only_first + [1] * only_second + [1] * both + [0] * neither
    return np.array([first], float), np.array([second], float)


def one_seed(rng: np.random.Generator, n: int, p_first: float, p_second: float) -> tuple[np.ndarray, np.ndarray]:
    """Two systems that differ on shares p_first and p_second of the questions, each being right there alone."""
    kind = rng.choice(3, n, p=[p_first, p_second, 1 - p_first - p_second])
    alike = rng.random(n) < 0.5
    first = np.where(kind == 2, alike, kind == 0)
    second = np.where(kind == 2, alike, kind == 1)
    return first[None].astype(float), second[None].astype(float)


# ---- tests of a difference


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (1, 9), (9, 1), (12, 25), (60, 31)])
def test_one_seed_is_mcnemars_exact_test(b, c):
    """Twice the smaller tail of a fair coin's binomial, summed in whole numbers."""
    tail = Fraction(sum(math.comb(b + c, k) for k in range(min(b, c) + 1)), 2 ** (b + c))
    assert paired_test(*pair(b, c)) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def test_several_seeds_are_clusters_of_a_question():
    """Durkalski's statistic written out: per question, how many pairs of seeds favour one or the other system."""
    rng = np.random.default_rng(0)
    for seeds_first, seeds_second in ((3, 3), (2, 4)):
        first, second = (rng.random((s, 40)) < p for s, p in ((seeds_first, 0.5), (seeds_second, 0.62)))
        top = bottom = 0.0
        for k in range(40):
            pairs = [(a, b) for a in first[:, k] for b in second[:, k]]
            d = sum(b and not a for a, b in pairs) / len(pairs) - sum(a and not b for a, b in pairs) / len(pairs)
            top, bottom = top + d, bottom + d * d
        # The upper tail of χ² with one degree of freedom.
        expected = math.erfc(math.sqrt(top**2 / bottom / 2))
        assert paired_test(first.astype(float), second.astype(float)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("b", "c"), [(4, 9), (20, 7)])
def test_equal_seeds_are_mcnemars_statistic(b, c):
    """A seed that is there twice tells nothing new: (b - c)² / (b + c), as for one pair."""
    first, second = (np.vstack([x, x]) for x in pair(b, c))
    expected = math.erfc(math.sqrt((b - c) ** 2 / (b + c) / 2))
    assert paired_test(first, second) == pytest.approx(expected, rel=1e-9)


def test_no_difference_anywhere_is_no_evidence():
    same = np.ones((2, 5))
    assert paired_test(same, same) == 1.0 and paired_test(same[:1], same[:1]) == 1.0


def test_p_values_of_equal_systems_are_uniform_enough():
    """Simulated studies without a difference: five in a hundred are below 0.05, or fewer."""
    rng = np.random.default_rng(1)
    below = 0
    for _ in range(400):
        difficulty = rng.random(200)
        first, second = (rng.random((3, 200)) < difficulty for _ in range(2))
        below += paired_test(first.astype(float), second.astype(float)) < 0.05
    assert below <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


# ---- intervals


def test_interval_is_scipys_paired_percentile_interval():
    from scipy.stats import bootstrap

    first, second = one_seed(np.random.default_rng(2), 300, 0.10, 0.17)
    theirs = bootstrap(
        (first[0], second[0]), lambda a, b, axis=-1: b.mean(axis=axis) - a.mean(axis=axis),
        paired=True, vectorized=True, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    ours = bootstrap_interval(first, second, over_seeds=False)
    assert np.abs(np.array(ours) - (theirs.low, theirs.high)).max() < 0.006


def coverage(over_seeds: bool, spread: float, studies: int = 250) -> float:
    """How often the interval holds the true difference, of systems whose seeds differ by `spread`."""
    rng, held = np.random.default_rng(4), 0
    n, seeds, truth = 150, 6, 0.08
    for _ in range(studies):
        ease = rng.uniform(0.3, 0.7, n)  # of the questions, for both systems
        first, second = (
            rng.random((seeds, n)) < ease + mean + rng.normal(0, spread, (seeds, 1)) for mean in (0.0, truth)
        )
        low, high = bootstrap_interval(first.astype(float), second.astype(float), over_seeds)
        held += low <= truth <= high
    return held / studies


def test_intervals_cover_the_truth_as_often_as_they_say(monkeypatch):
    """Without spread of the seeds, questions are enough; with it, only resampling seeds as well tells the truth."""
    monkeypatch.setattr("sqa_jax.metrics.paired_tests.RESAMPLES", 500)
    noise = 3 * math.sqrt(0.95 * 0.05 / 250)
    assert coverage(over_seeds=False, spread=0.0) > 0.95 - noise
    assert coverage(over_seeds=True, spread=0.06) > 0.95 - noise - 0.03, "a percentile interval of six seeds is narrow"
    assert coverage(over_seeds=False, spread=0.06) < 0.95 - noise


def test_one_seed_covers_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr("sqa_jax.metrics.paired_tests.RESAMPLES", 500)
    rng, held = np.random.default_rng(5), 0
    for _ in range(300):
        low, high = bootstrap_interval(*one_seed(rng, 300, 0.10, 0.18), over_seeds=False)
        held += low <= 0.08 <= high
    assert abs(held / 300 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 300)


def test_resampling_seeds_widens_the_interval():
    rng = np.random.default_rng(6)
    first, second = (rng.random((3, 80)) < np.array([[0.4], [0.5], [0.6]]) + shift for shift in (0.0, 0.1))
    narrow, wide = (bootstrap_interval(first.astype(float), second.astype(float), over) for over in (False, True))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_an_interval_holds_its_estimate(seeds_first, seeds_second, n, state):
    rng = np.random.default_rng(state)
    first, second = (rng.random((s, n)) < rng.choice([0, 0.5, 1]) for s in (seeds_first, seeds_second))
    first, second = first.astype(float), second.astype(float)
    made = compare(first, second, over_seeds=min(seeds_first, seeds_second) > 1)
    assert made.low <= made.difference <= made.high
    assert made.difference == pytest.approx(second.mean() - first.mean(), abs=1e-12)


def test_what_all_resamples_share_is_not_missed_by_rounding(monkeypatch):
    """Seeds that are right everywhere or nowhere: the interval is the difference itself, to the last bit."""
    monkeypatch.setattr("sqa_jax.metrics.paired_tests.RESAMPLES", 50)
    for n in range(1, 80):
        first, second = np.zeros((3, n)), np.repeat([[1.0], [1.0], [0.0]], n, axis=1)
        made = compare(first, second, over_seeds=False)
        assert made.low == made.difference == made.high


# ---- comparisons


def test_swapping_the_systems_turns_the_sign():
    rng = np.random.default_rng(7)
    first, second = ((rng.random((2, 60)) < p).astype(float) for p in (0.4, 0.6))
    there, back = compare(first, second, False), compare(second, first, False)
    assert there.difference > 0 > back.difference == -there.difference
    assert (there.p, there.smallest) == (back.p, back.smallest)
    assert there.by_seed == tuple(-d for d in back.by_seed) and len(there.by_seed) == 2
    assert there.low == pytest.approx(-back.high, abs=0.02)


def test_seeds_are_paired_as_asked():
    first, second = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], float), np.array([[1, 1, 1, 1]], float)
    assert compare(first, second, False, pairs=[(1, 0)]).by_seed == (0.25,)
    assert compare(first, second, False).by_seed == (0.5,)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="3 and 4 questions cannot be paired"):
        compare(np.ones((1, 3)), np.ones((1, 4)), False)
    with pytest.raises(ValueError, match="two or more"):
        compare(np.ones((1, 3)), np.ones((2, 3)), True)


# ---- power


@pytest.mark.parametrize(("n", "share", "seeds"), [(600, 0.3, 1), (1500, 0.12, 1), (500, 0.3, 3)])
def test_the_smallest_difference_is_found_four_times_in_five(n, share, seeds):
    """Simulated studies with that difference; with several seeds, chance differences on a question average out."""
    rng = np.random.default_rng(8)

    def study(delta: float) -> tuple[np.ndarray, np.ndarray]:
        made = [one_seed(rng, n, (share - delta) / 2, (share + delta) / 2) for _ in range(seeds)]
        return np.vstack([first for first, _ in made]), np.vstack([second for _, second in made])

    # What a study without a difference says that it could have seen.
    delta = float(np.mean([smallest_difference(*study(0.0)) for _ in range(40)]))
    found = np.mean([paired_test(*study(delta)) < 0.05 for _ in range(400)])
    assert abs(found - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 400) + 0.03, (delta, found)


@pytest.mark.parametrize("n", [30, 150])
def test_systems_that_never_differed_could_have_differed_unseen(n):
    """The smallest difference is then that of questions which all point one way, not nearly none."""
    rng, same = np.random.default_rng(9), np.ones((1, n))
    delta = smallest_difference(same, same)
    found = np.mean([paired_test(*one_seed(rng, n, 0.0, delta)) < 0.05 for _ in range(400)])
    assert abs(found - 0.8) < 0.12, (delta, found)  # the exact test goes in steps of a whole question


def test_a_handful_of_questions_shows_nothing():
    assert smallest_difference(*pair(0, 1, both=1, neither=1)) == 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200))
def test_the_smallest_difference_is_a_share_that_falls_with_more_questions(b, c, alike):
    first, second = pair(b, c, both=alike + 1)
    one = smallest_difference(first, second)
    four = smallest_difference(np.tile(first, 4), np.tile(second, 4))
    assert 0 < four <= one <= 1 and (four < one or four == 1)


# ---- a family of tests


def closed_bonferroni(p_values: list[float]) -> list[float]:
    """Holm's procedure by its definition as a closed test (Marcus et al. 1976, Biometrika 63:655).

    A hypothesis is rejected where Bonferroni's test rejects every intersection of hypotheses that it is part of.
    """
    family = range(len(p_values))
    subsets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(family, size)]
    return [max(min(1.0, len(s) * min(p_values[k] for k in s)) for s in subsets if k in s) for k in family]


def rejected(p_values: list[float], alpha: float) -> list[bool]:
    """Holm (1979): going up from the smallest p-value, reject while p ≤ α / (hypotheses that are left)."""
    left, decisions = set(range(len(p_values))), [False] * len(p_values)
    while left and p_values[k := min(left, key=lambda j: p_values[j])] <= alpha / len(left):
        decisions[k] = True
        left.remove(k)
    return decisions


p_lists = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.02, 0.05, 1.0])), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(p_lists)
def test_holm_is_the_closed_test_by_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(closed_bonferroni(p_values), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(p_lists, st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    for adjusted, decision in zip(holm(p_values), rejected(p_values, alpha), strict=True):
        assert decision == (adjusted <= alpha) or adjusted == pytest.approx(alpha, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(p_lists, st.randoms(use_true_random=False))
def test_holm_is_monotone_clipped_and_independent_of_the_order(p_values, random):
    adjusted = holm(p_values)
    assert all(a >= p - 1e-12 for a, p in zip(adjusted, p_values, strict=True)) and max(adjusted) <= 1
    ranked = [a for _, a in sorted(zip(p_values, adjusted, strict=True))]
    assert ranked == sorted(ranked)
    order = random.sample(range(len(p_values)), len(p_values))
    assert holm([p_values[k] for k in order]) == pytest.approx([adjusted[k] for k in order], abs=1e-12)


def test_an_empty_family():
    assert holm([]) == []


# ---- verdicts


def measured(difference: float, low: float, high: float) -> Comparison:
    return Comparison(n=400, difference=difference, low=low, high=high, p=0.01, by_seed=(difference,), smallest=0.043)


BETTER = Hypothesis("H", "second is better", "golden", "teacher_cot", +1)
WORSE = Hypothesis("H", "second is worse", "golden", "teacher_cot", -1)


@pytest.mark.parametrize(
    ("hypothesis", "difference", "low", "high", "p", "word"),
    [
        (BETTER, 0.05, 0.01, 0.09, 0.01, "supported"),
        (BETTER, -0.05, -0.09, -0.01, 0.01, "contradicted"),
        (WORSE, -0.05, -0.09, -0.01, 0.01, "supported"),
        (WORSE, 0.05, 0.01, 0.09, 0.01, "contradicted"),
        (BETTER, 0.05, 0.01, 0.09, ALPHA, "undecided"),  # the test does not decide
        (WORSE, -0.05, -0.09, -0.01, 0.2, "undecided"),
        (BETTER, 0.05, -0.01, 0.11, 0.01, "undecided"),  # the interval does not: seeds differ too much
        (WORSE, -0.05, -0.11, 0.0, 0.01, "undecided"),
    ],
)
def test_verdicts(hypothesis, difference, low, high, p, word):
    said, why = verdict(hypothesis, measured(difference, low, high), p)
    assert said == word
    assert f"teacher_cot − golden = {100 * difference:+.1f} points" in why and "n = 400" in why
    assert f"p = {p:.2g}" in why and f"{100 * low:+.1f} to {100 * high:+.1f}" in why
    assert ("a difference below 4.3 points would often go undetected" in why) == (word == "undecided")


def test_every_hypothesis_compares_two_arms_that_exist():
    from sqa_jax.prompts.recipes import ARMS
    from sqa_jax.study.matrix import ZERO_SHOT

    assert [h.name for h in HYPOTHESES if not h.soft] == [f"H3.{k}" for k in range(1, 7)]
    assert all(
        {h.first, h.second} <= {*ARMS, *ZERO_SHOT} and h.first != h.second and abs(h.sign) == 1 for h in HYPOTHESES
    )
