"""Means, paired differences and rank correlations over seeds, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval (Student's t); NaN bounds where one seed gives none."""

    mean: float
    low: float
    high: float
    n: int

    def p_value(self, ratio: bool = False) -> float:
        """Two-sided p-value of a mean difference of 0, or of a mean ratio of 1; NaN for one seed."""
        mean, high = (math.log(self.mean), math.log(self.high)) if ratio else (self.mean, self.high)
        if math.isnan(high):
            return math.nan
        half = high - mean
        if half == 0:
            return float(mean == 0)
        return 2 * float(stats.t.sf(abs(mean) / half * _quantile(self.n), self.n - 1))


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values and its 95 % interval.

    Args:
        values: One value a seed, at least one.

    Returns:
        The mean and interval. The bounds are NaN for a single value, and equal the mean where all values are equal.

    Raises:
        ValueError: If there is no value.

    Example:
        >>> found = interval([1.0, 2.0, 3.0])
        >>> f"{found.mean:.1f} [{found.low:.3f}, {found.high:.3f}]"
        '2.0 [-0.484, 4.484]'
    """
    n = len(values)
    if n == 0:
        raise ValueError("values: expected at least one value, got none")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = _quantile(n) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def geometric_interval(values: Sequence[float]) -> Interval:
    """Geometric mean of independent positive values, with the 95 % interval of their logarithms.

    Args:
        values: One value a seed, at least one, all above 0.

    Returns:
        As :func:`interval`; the bounds are positive, and the ratio of two such means is the mean of the ratios.

    Raises:
        ValueError: If there is no value, or one is not positive.
    """
    if any(value <= 0 for value in values):
        raise ValueError(f"values: a geometric mean needs positive values, got {min(values)}")
    found = interval([math.log(value) for value in values])
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.n)


def _quantile(n: int) -> float:
    """Half the width of the interval of ``n`` values, in standard errors."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))


def shared_seeds(a: Mapping[int, float], b: Mapping[int, float], positive: bool = False) -> list[int]:
    """The seeds that both have, ascending; with ``positive`` those alone whose values are above 0 on both sides."""
    return [seed for seed in sorted(a.keys() & b.keys()) if not positive or min(a[seed], b[seed]) > 0]


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """Mean of ``a - b`` over the seeds that both have, with its interval; None if they share none.

    Runs of equal seeds start from the same weights and see the same data in the same order, so that the difference
    within a seed varies less than the values do.
    """
    seeds = shared_seeds(a, b)
    return interval([a[seed] - b[seed] for seed in seeds]) if seeds else None


def paired_ratio(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """Geometric mean of ``a / b`` over shared seeds, positive values only, with the interval of the logarithms."""
    seeds = shared_seeds(a, b, positive=True)
    return geometric_interval([a[seed] / b[seed] for seed in seeds]) if seeds else None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and its two-sided p-value; NaN for fewer than three pairs or a constant side.

    The p-value is that of a permutation test: exact up to seven pairs, else from 9,999 permutations, the same at each
    call. The usual one, from Student's t, is 0 for any few pairs in perfect order.
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan
    return _permutation_test(stats.rankdata(x), stats.rankdata(y))


def partial_rank_correlation(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho of what is left of ``x`` and ``y`` when the ranks of ``given`` are regressed out, and its p-value.

    The p-value permutes what is left, as :func:`rank_correlation` does. NaN for fewer than four triples, a constant
    side, or a side that ``given`` orders entirely.
    """
    if len(x) < 4 or min(len(set(side)) for side in (x, y, given)) < 2:
        return math.nan, math.nan
    by = stats.rankdata(given)
    left = []
    for side in (x, y):
        ranks = stats.rankdata(side)
        line = stats.linregress(by, ranks)
        if abs(line.rvalue) > 1 - 1e-12:
            return math.nan, math.nan
        left.append(ranks - (line.slope * by + line.intercept))
    return _permutation_test(*left)


def _permutation_test(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    permutations = stats.PermutationMethod(n_resamples=9999, rng=np.random.default_rng(0))
    found = stats.pearsonr(x, y, method=permutations)
    return float(found.statistic), float(found.pvalue)
