"""Intervals against scipy's own, pairs and ratios against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from enc_plugin.study.statistics import (
    geometric_interval,
    interval,
    paired_difference,
    paired_ratio,
    partial_rank_correlation,
    rank_correlation,
)

values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


@given(values)
def test_interval_is_students_t(sample):
    found = interval(sample)
    spread = stats.sem(sample)
    assert found.mean == pytest.approx(np.mean(sample), abs=1e-9)
    if spread > 1e-9:
        low, high = stats.t.interval(0.95, len(sample) - 1, loc=np.mean(sample), scale=spread)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_one_seed_has_no_interval():
    found = interval([3.0])
    assert (found.mean, found.n) == (3.0, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_no_value_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


@given(values, st.floats(-10, 10))
def test_what_seeds_share_cancels_in_pairs(sample, shift):
    a = dict(enumerate(x + shift for x in sample))
    found = paired_difference(a, dict(enumerate(sample)))
    assert found.mean == pytest.approx(shift, abs=1e-9)
    assert found.high - found.low < 1e-9


@given(values, st.floats(-5, 5))
def test_p_values_are_those_of_the_paired_t_test(sample, shift):
    other = [shift + math.sin(100 * i) for i in range(len(sample))]
    found = paired_difference(dict(enumerate(sample)), dict(enumerate(other)))
    assert found.p_value() == pytest.approx(stats.ttest_rel(sample, other).pvalue, rel=1e-6, abs=1e-12)
    assert math.isnan(interval([1.0]).p_value())
    assert (interval([1.0, 1.0]).p_value(), interval([0.0, 0.0]).p_value()) == (0.0, 1.0)


def test_p_values_of_ratios_are_of_the_logarithms():
    a, b = {0: 2.0, 1: 3.0, 2: 5.0}, {0: 1.5, 1: 2.5, 2: 2.0}
    expected = stats.ttest_rel(np.log(list(a.values())), np.log(list(b.values()))).pvalue
    assert paired_ratio(a, b).p_value(ratio=True) == pytest.approx(expected)


def test_seeds_that_only_one_side_has_are_left_out():
    found = paired_difference({0: 1.0, 1: 2.0, 7: 100.0}, {0: 0.0, 1: 1.0, 9: -100.0})
    assert (found.mean, found.n) == (1.0, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_ratios_are_geometric():
    found = paired_ratio({0: 2.0, 1: 8.0}, {0: 1.0, 1: 1.0})
    assert found.mean == pytest.approx(4.0)
    assert found.low * found.high == pytest.approx(16.0)  # the interval is symmetric in the logarithm


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8))
def test_geometric_interval_is_students_t_of_logarithms(sample):
    found = geometric_interval(sample)
    expected = interval(list(np.log(sample)))
    assert (found.mean, found.n) == (pytest.approx(stats.gmean(sample), rel=1e-6), len(sample))
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_geometric_mean_of_zero_is_an_error():
    with pytest.raises(ValueError, match="needs positive values, got 0.0"):
        geometric_interval([1.0, 0.0])


def test_rank_correlation_sees_order_alone():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000])[0] == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [0, -1, -5, -6])[0] == pytest.approx(-1.0)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3])[0])


def test_a_perfect_order_of_few_pairs_is_no_certainty():
    """Two of the 24 orders of four pairs are as extreme; Student's t makes this p = 0."""
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1])[1] == pytest.approx(2 / 24)


def test_p_of_a_rank_correlation_is_near_students_t_for_many_pairs():
    generator = np.random.default_rng(1)
    x = generator.normal(size=60)
    y = 0.3 * x + generator.normal(size=60)
    found = rank_correlation(list(x), list(y))
    expected = stats.spearmanr(x, y)
    assert found == pytest.approx((expected.statistic, expected.pvalue), abs=0.01)
    assert found == rank_correlation(list(x), list(y))


@given(st.integers(0, 2**32 - 1), st.integers(4, 30))
@settings(max_examples=25, deadline=None)
def test_partial_rank_correlation_is_the_closed_form(seed, n):
    x, y, z = np.random.default_rng(seed).normal(size=(3, n))
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    rho, p = partial_rank_correlation(x, y, z)
    if max(abs(xz), abs(yz)) > 1 - 1e-12:
        assert math.isnan(rho)
    else:
        assert rho == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)), abs=1e-9)
        assert 0 < p <= 1


def test_a_shared_cause_is_no_correlation_of_its_own():
    generator = np.random.default_rng(2)
    cause = generator.normal(size=80)
    x, y = (cause + 0.3 * generator.normal(size=80) for _ in range(2))
    assert rank_correlation(x, y)[0] > 0.8
    rho, p = partial_rank_correlation(x, y, cause)
    assert abs(rho) < 0.25
    assert p > 0.05


@pytest.mark.parametrize(
    ("x", "y", "given"),
    [
        ([1, 2, 3], [1, 3, 2], [2, 1, 3]),  # too few
        ([1, 1, 1, 1], [1, 2, 3, 4], [2, 1, 4, 3]),
        ([1, 2, 4, 8], [1, 3, 2, 4], [10, 20, 30, 40]),  # x is ordered by what is given
    ],
)
def test_partial_rank_correlation_of_nothing_left_is_nan(x, y, given):
    assert all(math.isnan(value) for value in partial_rank_correlation(x, y, given))
