"""Paired comparison of two systems with one or several training seeds: bootstrap intervals, tests, power, Holm.

Correctness is an array [S, n]: 1 where the run of a seed answered a question correctly, else 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
_CHUNK = 500  # resamples whose weights are in memory together


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The accuracy of `second` minus that of `first`.

    Attributes:
      n: number of questions.
      difference, low, high: of the accuracies (fractions, not percent), with its 95 % bootstrap interval.
      p: p-value of the paired test of equal accuracy.
      by_seed: difference of each pair of runs with the same seed.
      smallest: minimum detectable difference (see `smallest_difference`).
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]
    smallest: float


def compare(
    first: Float[np.ndarray, "S1 n"],
    second: Float[np.ndarray, "S2 m"],
    over_seeds: bool,
    rng_seed: int = 0,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Comparison:
    """Compares two systems on the same questions.

    Args:
      over_seeds: resample seeds as well as questions.
      pairs: (row of first, row of second) of the same seed; None where both have the same seeds in the same order.

    Raises:
      ValueError: the numbers of questions n and m differ, or `over_seeds` with a single seed.
    """
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
    first: Float[np.ndarray, "S1 n"], second: Float[np.ndarray, "S2 n"], over_seeds: bool, rng_seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the difference of means.

    Questions are resampled, each with all its answers (Efron & Tibshirani 1993, section 13.3); with `over_seeds`,
    each system's seeds as well, independently: the pigeonhole bootstrap of a crossed design (Owen 2007, Annals of
    Applied Statistics 1:386). With three seeds that part is coarse, and errs on the wide side.
    """
    rng = np.random.default_rng(rng_seed)
    n = first.shape[1]
    draws = []
    for start in range(0, RESAMPLES, _CHUNK):
        size = min(_CHUNK, RESAMPLES - start)
        times = rng.multinomial(n, np.full(n, 1 / n), size=size)  # [R, n] multiplicity of each question

        def mean(system: np.ndarray, times=times, size=size) -> np.ndarray:
            by_seed = times @ system.T  # [R, S] correct answers: whole numbers, so rounding happens once, at the end
            S = len(system)
            weights = rng.multinomial(S, np.full(S, 1 / S), size=size) if over_seeds else 1
            return (by_seed * weights).sum(axis=1) / (S * n)

        draws.append(mean(second) - mean(first))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return float(low), float(high)


def paired_test(first: Float[np.ndarray, "S1 n"], second: Float[np.ndarray, "S2 n"]) -> float:
    """McNemar's test: two-sided p-value of equal accuracy on the same questions.

    With one seed each the exact test (McNemar 1947, Psychometrika 12:153). With more its extension to clustered
    pairs, a question being a cluster of dependent answers (Durkalski et al. 2003, Statistics in Medicine 22:2417):
    with d_k the mean difference on question k, (Σ d_k)² / Σ d_k² is χ² with one degree of freedom; with one pair a
    question that is McNemar's statistic.
    """
    from scipy.stats import chi2

    from sqa_jax.metrics.intervals import mcnemar

    if len(first) == len(second) == 1:
        return mcnemar(first[0].astype(bool).tolist(), second[0].astype(bool).tolist())
    d = second.mean(axis=0) - first.mean(axis=0)
    if not d.any():
        return 1.0
    return float(chi2.sf(d.sum() ** 2 / (d**2).sum(), 1))


def smallest_difference(
    first: Float[np.ndarray, "S1 n"], second: Float[np.ndarray, "S2 n"], alpha: float = 0.05, power: float = 0.8
) -> float:
    """Minimum detectable difference: what a paired test on as many questions finds with the given power.

    Solves n = (z_{1-α/2} √ψ + z_power √(ψ - δ²))² / δ² for δ (Connor 1987, Biometrics 43:207, equation 3). ψ is the
    mean square of a question's difference: with one seed the fraction of discordant questions, with more, where
    chance differences cancel, less. It is taken as observed, but at least δ: a difference of δ needs that many
    discordant questions.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    n = first.shape[1]
    observed = float(((second.mean(axis=0) - first.mean(axis=0)) ** 2).mean())
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)

    def excess(delta: float) -> float:
        psi = max(observed, delta)
        return (z_alpha * psi**0.5 + z_power * (psi - delta**2) ** 0.5) ** 2 / delta**2 - n

    return 1.0 if excess(1.0) > 0 else float(cast(float, brentq(excess, 1e-9, 1.0)))  # a tuple only with full_output


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
