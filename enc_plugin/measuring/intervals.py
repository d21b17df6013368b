"""Confidence intervals: bootstrap interval of a mean, Wilson interval of a percentage."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

CONFIDENCE = 0.95
_RESAMPLES = 1000


def bootstrap_interval(values: Tensor) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values``, ``(N,)``; deterministic.

    Unlike mean ± standard error, it suits a heavy-tailed distribution, in which a few samples make up most of the mean.
    Both ends are NaN if a value is not finite.
    """
    array = values.double().numpy()
    if not np.isfinite(array).all():
        return math.nan, math.nan
    generator = np.random.default_rng(0)  # does not change the global random state
    means = [array[generator.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def wilson_interval(percent: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval, in percent, of a measured ``percent`` of ``count`` independent samples.

    It stays within 0 and 100. NaN gives NaN.
    """
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    share, weight = percent / 100, 1 / (1 + z**2 / count)
    center = weight * (share + z**2 / (2 * count))
    half = weight * z * math.sqrt(max(share * (1 - share), 0) / count + (z / (2 * count)) ** 2)
    return 100 * max(center - half, 0), 100 * min(center + half, 1)
