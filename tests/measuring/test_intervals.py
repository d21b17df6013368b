"""Intervals against scipy's, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from enc_plugin.measuring.gbr import GBREstimate
from enc_plugin.measuring.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (1, 355), (290, 355), (5000, 10_000)])
def test_the_interval_of_a_share_is_scipys_wilson(right, count):
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(100 * right / count, count) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert math.isnan(wilson_interval(math.nan, count)[0])


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap_and_leaves_the_random_state_alone():
    values = torch.distributions.LogNormal(0.0, 2.0).sample((400,)).double()  # heavy-tailed, as GBR is
    state = np.random.get_state()[1].copy()
    found = bootstrap_interval(values)
    assert found == bootstrap_interval(values)
    assert (np.random.get_state()[1] == state).all()
    expected = stats.bootstrap((values.numpy(),), np.mean, n_resamples=4000, method="percentile", rng=1)
    assert found == pytest.approx(tuple(expected.confidence_interval), rel=0.05)
    mean, sem = values.mean().item(), values.std().item() / 20
    assert found[1] - mean > mean - found[0]  # the tail is on the right
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * sem, rel=0.15)


def test_equal_values_have_no_width_and_values_that_are_not_finite_no_interval():
    assert bootstrap_interval(torch.full((5,), 2.0)) == (2.0, 2.0)
    assert all(map(math.isnan, bootstrap_interval(torch.tensor([1.0, math.inf]))))


def test_a_gbr_has_a_median_and_an_interval_beside_its_mean():
    estimate = GBREstimate(torch.tensor([0.1, 0.2, 0.3, 0.4, 99.0], dtype=torch.float64), 1.0)
    assert estimate.median == pytest.approx(0.3)
    low, high = estimate.interval
    assert low < estimate.mean < high
    assert math.isnan(GBREstimate(torch.tensor([1.0, math.nan]).double(), 1.0).median)
