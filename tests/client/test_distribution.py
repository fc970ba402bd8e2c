"""Quantiles of a histogram are those of Prometheus's `histogram_quantile`."""

import pytest

from hvpd._wire.distribution import Distribution

FOUND = Distribution([1.0, 2.0, 4.0], [10, 0, 10, 0])


@pytest.mark.parametrize(("share", "expected"), [(0.25, 0.5), (0.5, 1.0), (0.75, 3.0), (1.0, 4.0)])
def test_a_quantile_is_interpolated_within_its_bucket(share, expected):
    assert FOUND.quantile(share) == expected


def test_a_quantile_above_all_bounds_is_the_last_bound():
    assert Distribution([1.0, 2.0], [1, 0, 9]).quantile(0.5) == 2.0


def test_an_empty_histogram_has_no_quantile():
    assert Distribution([1.0], [0, 0]).quantile(0.5) is None


def test_growth_is_counted_from_the_earlier_time_and_a_restart_counts_as_no_growth():
    later = Distribution([1.0, 2.0, 4.0], [15, 3, 4, 1])
    assert later.since(FOUND) == Distribution([1.0, 2.0, 4.0], [5, 3, 0, 1])
