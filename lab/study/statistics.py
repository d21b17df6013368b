"""Means, contrasts of cells and rank correlations over seeds, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval (Student's t); NaN bounds where one seed gives none.

    ``n`` is the number of values; of a contrast, that of its smallest cell.
    """

    mean: float
    low: float
    high: float
    n: int


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
    return contrast([(1, values)])


def geometric_interval(values: Sequence[float]) -> Interval:
    """Geometric mean of independent positive values, with the 95 % interval of their logarithms.

    Args:
        values: One value a seed, at least one, all above 0.

    Returns:
        As :func:`interval`; the bounds are positive, and the ratio of two such means is the mean of the ratios.

    Raises:
        ValueError: If there is no value, or one is not positive.
    """
    return contrast([(1, values)], ratio=True)


def contrast(terms: Sequence[tuple[float, Sequence[float]]], ratio: bool = False) -> Interval:
    r"""Weighted sum :math:`\sum_k c_k \bar x_k` of the means of independent cells, by Welch's interval.

    Cells may differ in their variance and number of seeds; the degrees of freedom are Satterthwaite's. Two terms of
    weight 1 and -1 are Welch's t test. Seeds are not paired: runs of equal seeds are hardly more alike than others (the
    correlation within a seed is about 0.05), and pairing would cost half of the few degrees of freedom.

    Args:
        terms: Weight and values of each cell.
        ratio: Of positive values: the same of their logarithms, as a factor.

    Returns:
        The interval, with NaN bounds if a cell has a single value.

    Raises:
        ValueError: If a cell has no value, or with ``ratio`` one that is not positive.

    Example:
        >>> found = contrast([(1, [3.0, 4.0, 5.0]), (-1, [1.0, 2.0, 3.0])])
        >>> f"{found.mean:.1f} [{found.low:.3f}, {found.high:.3f}]"
        '2.0 [-0.267, 4.267]'
    """
    if not all(len(values) for _, values in terms):
        raise ValueError("values: expected at least one value of each cell, got none")
    if ratio:
        if (least := min(min(values) for _, values in terms)) <= 0:
            raise ValueError(f"values: a ratio or a geometric mean needs positive values, got {least}")
        found = contrast([(weight, [math.log(value) for value in values]) for weight, values in terms])
        return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.n)
    n = min(len(values) for _, values in terms)
    mean = sum(weight * math.fsum(values) / len(values) for weight, values in terms)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    parts = [(weight**2 * float(np.var(values, ddof=1)) / len(values), len(values) - 1) for weight, values in terms]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Interval(mean, mean, mean, n)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    low, high = stats.t.interval(CONFIDENCE, freedom, loc=mean, scale=math.sqrt(variance))
    return Interval(mean, float(low), float(high), n)


def homogeneity(cells: Sequence[Sequence[float]]) -> float:
    """p-value of a one-way analysis of variance: whether cells could have one mean; NaN for fewer than two cells."""
    cells = [values for values in cells if len(values) > 1]
    return float(stats.f_oneway(*cells).pvalue) if len(cells) > 1 else math.nan


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
