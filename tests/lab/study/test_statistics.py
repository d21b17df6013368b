"""Intervals against scipy's own, pairs and ratios against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lab.study.statistics import (
    contrast,
    geometric_interval,
    homogeneity,
    interval,
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


@given(values, values)
def test_two_cells_are_compared_by_welchs_t_test(a, b):
    found = contrast([(1, a), (-1, b)])
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b), abs=1e-9)
    assert found.n == min(len(a), len(b))
    if min(np.std(a), np.std(b)) > 1e-6:
        low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_a_contrast_of_many_cells_covers_its_mean_in_95_of_100_cases():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        cells = [
            (weight, generator.normal(10 * weight, 1 + i, size=4)) for i, weight in enumerate((0.5, 0.5, -0.5, -0.5))
        ]
        found = contrast(cells)
        covered += found.low < 10 < found.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.03)


def test_a_cell_of_one_seed_leaves_no_interval():
    found = contrast([(1, [1.0, 2.0]), (-1, [0.5])])
    assert (found.mean, found.n, math.isnan(found.low)) == (1.0, 1, True)


def test_cells_without_spread_have_no_width():
    found = contrast([(1, [2.0, 2.0]), (-1, [1.0, 1.0])])
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_ratios_are_geometric():
    found = contrast([(1, [2.0, 8.0]), (-1, [1.0, 1.0])], ratio=True)
    assert found.mean == pytest.approx(4.0)
    assert found.low * found.high == pytest.approx(16.0)  # the interval is symmetric in the logarithm
    with pytest.raises(ValueError, match="positive"):
        contrast([(1, [0.0, 1.0]), (-1, [1.0, 1.0])], ratio=True)


def test_cells_of_one_mean_are_homogeneous_and_others_are_not():
    assert homogeneity([[1.0, 2.0, 3.0], [1.1, 2.1, 2.9]]) > 0.5
    assert homogeneity([[1.0, 1.1, 0.9], [5.0, 5.1, 4.9]]) < 1e-3
    assert math.isnan(homogeneity([[1.0, 2.0], [3.0]]))


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
