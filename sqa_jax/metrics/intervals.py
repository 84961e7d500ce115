"""Confidence intervals of an accuracy and of a paired difference, and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """An estimate with its two-sided 95 % interval."""

    value: float
    low: float
    high: float


def accuracy_interval(right: Sequence[bool]) -> Interval:
    """Accuracy with Wilson's score interval (Wilson 1927, JASA 22:209)."""
    from scipy.stats import binomtest  # slow to import

    result = binomtest(sum(right), len(right)).proportion_ci(0.95, method="wilson")
    return Interval(sum(right) / len(right), float(result.low), float(result.high))


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Paired bootstrap: accuracy of `second` minus that of `first` on the same questions, with a percentile interval.

    Questions are resampled, each with both systems' answers (Efron & Tibshirani 1993, section 13.3).

    Raises:
      ValueError: the two are of different length.
    """
    import numpy as np

    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} answers are not of the same questions")
    difference = np.asarray(second, float) - np.asarray(first, float)
    # Each question contributes -1, 0 or 1, so a resample is one multinomial draw of their counts.
    counts = [(difference == value).sum() for value in (-1, 0, 1)]
    draws = np.random.default_rng(seed).multinomial(len(difference), np.array(counts) / len(difference), size=resamples)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / len(difference), [2.5, 97.5])
    return Interval(float(difference.mean()), float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """McNemar's exact test: two-sided p-value of equal accuracy on paired answers (McNemar 1947, Psychometrika 12:153)."""
    from scipy.stats import binomtest

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_second, only_first + only_second).pvalue)
