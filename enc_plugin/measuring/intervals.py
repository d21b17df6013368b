"""Intervals of measured figures: of a mean by the bootstrap, of a share by Wilson's formula."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

CONFIDENCE = 0.95
_RESAMPLES = 1000


def bootstrap_interval(values: Tensor) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values`` ``(N,)``, the same for equal values.

    Unlike mean ± standard error it follows a heavy tail, where a few samples make up most of the mean. Both ends are
    NaN if a value is not finite.
    """
    array = values.double().numpy()
    if not np.isfinite(array).all():
        return math.nan, math.nan
    generator = np.random.default_rng(0)  # its own: the run's random state stays as it is
    means = [array[generator.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def wilson_interval(percent: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval, in percent, of a share that was ``percent`` of ``count`` independent samples.

    It stays within 0 and 100, also where all samples or none are right. NaN stays NaN.
    """
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    share, weight = percent / 100, 1 / (1 + z**2 / count)
    center = weight * (share + z**2 / (2 * count))
    half = weight * z * math.sqrt(max(share * (1 - share), 0) / count + (z / (2 * count)) ** 2)
    return 100 * max(center - half, 0), 100 * min(center + half, 1)
