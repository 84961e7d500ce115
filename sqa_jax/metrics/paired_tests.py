"""Two systems on the same questions, each trained with one or several seeds: how different are they, how surely?

Correctness is an array [S, n]: of each seed and question 1 (right) or 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples whose weights exist at one time


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The accuracy of `second` minus that of `first`.

    Attributes:
      n: questions.
      difference, low, high: of the accuracies (shares, not percent), with its 95 % bootstrap interval.
      p: of the paired test that both are right equally often.
      by_seed: difference of each pair of equal seeds.
      smallest: the smallest difference that these questions would have shown (see `smallest_difference`).
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]
    smallest: float


def compare(
    first: np.ndarray,
    second: np.ndarray,
    over_seeds: bool,
    rng_seed: int = 0,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Comparison:
    """Compares two systems.

    Args:
      first, second: [S1, n] and [S2, n] correctness on the same questions.
      over_seeds: resample seeds as well as questions.
      pairs: (row of first, row of second) of the same seed; None where both have the same seeds in the same order.

    Raises:
      ValueError: not the same number of questions, or `over_seeds` with a single seed.
    """
    first, second = np.atleast_2d(np.asarray(first, float)), np.atleast_2d(np.asarray(second, float))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} questions cannot be paired")
    if over_seeds and min(len(first), len(second)) < 2:
        raise ValueError("resampling seeds needs two or more of each system")
    low, high = bootstrap_interval(first, second, over_seeds, rng_seed)
    if pairs is None:
        pairs = [(k, k) for k in range(min(len(first), len(second)))]
    return Comparison(
        n=first.shape[1],
        difference=float(second.mean() - first.mean()),
        low=low,
        high=high,
        p=paired_test(first, second),
        by_seed=tuple(float(second[b].mean() - first[a].mean()) for a, b in pairs),
        smallest=smallest_difference(first, second),
    )


def bootstrap_interval(
    first: np.ndarray, second: np.ndarray, over_seeds: bool, rng_seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the difference of means.

    Questions are resampled, each with all its answers (Efron & Tibshirani 1993, section 13.3); with `over_seeds`,
    each system's seeds as well, independently: the pigeonhole bootstrap of a crossed design (Owen 2007, Annals of
    Applied Statistics 1:386). With three seeds that part is coarse, and rather too wide than too narrow.
    """
    rng = np.random.default_rng(rng_seed)
    n = first.shape[1]
    draws = []
    for start in range(0, RESAMPLES, _AT_ONCE):
        size = min(_AT_ONCE, RESAMPLES - start)
        times = rng.multinomial(n, np.full(n, 1 / n), size=size)  # [R, n] how often each question is drawn

        def mean(system: np.ndarray, times=times, size=size) -> np.ndarray:
            by_seed = times @ system.T  # [R, S] right answers: whole numbers, so that nothing is rounded but the end
            S = len(system)
            weights = rng.multinomial(S, np.full(S, 1 / S), size=size) if over_seeds else 1
            return (by_seed * weights).sum(axis=1) / (S * n)

        draws.append(mean(second) - mean(first))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return float(low), float(high)


def paired_test(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value that both systems are right equally often on the same questions.

    One seed each: McNemar's exact test (McNemar 1947, Psychometrika 12:153). More: its extension to clustered
    pairs, a question being a cluster of answers that are not independent (Durkalski et al. 2003, Statistics in
    Medicine 22:2417): with d_k the mean difference on question k, (Σ d_k)² / Σ d_k² is χ² with one degree of
    freedom; for one pair a question that is McNemar's statistic.
    """
    from scipy.stats import chi2

    from sqa_jax.metrics.intervals import mcnemar

    if len(first) == len(second) == 1:
        return mcnemar(first[0].astype(bool).tolist(), second[0].astype(bool).tolist())
    d = second.mean(axis=0) - first.mean(axis=0)
    if not d.any():
        return 1.0
    return float(chi2.sf(d.sum() ** 2 / (d**2).sum(), 1))


def smallest_difference(first: np.ndarray, second: np.ndarray, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference that a paired test on as many questions finds with the given power.

    Solves n = (z_{1-α/2} √ψ + z_power √(ψ - δ²))² / δ² for δ (Connor 1987, Biometrics 43:207, equation 3). ψ is the
    mean square of a question's difference: with one seed the share of questions on which the systems differ, with
    more, where chance differences cancel, less. It is what was observed, and at least δ: to be so far apart, systems
    must differ on so many questions.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    n = first.shape[1]
    observed = float(((second.mean(axis=0) - first.mean(axis=0)) ** 2).mean())
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)

    def excess(delta: float) -> float:
        psi = max(observed, delta)
        return (z_alpha * psi**0.5 + z_power * (psi - delta**2) ** 0.5) ** 2 / delta**2 - n

    return 1.0 if excess(1.0) > 0 else float(brentq(excess, 1e-9, 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm–Bonferroni adjusted p-values, which control the family-wise error rate (Holm 1979, SJS 6:65).

    Step-down: the smallest of m p-values is multiplied by m, the next by m - 1, and so on. An adjusted value is never
    below that of a smaller p-value, nor above 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted
