"""Counts of products, and the difference of two snapshots."""

from hvpd._transport.statistics import Counts, Statistics
from hvpd.v1 import curvature_pb2


def info(width):
    return curvature_pb2.ProductInfo(batch_width=width, queue_duration_ns=10**9, compute_duration_ns=2 * 10**9)


def test_products_are_summed():
    counts = Counts()
    counts.add_products([info(2), info(4)], vectors=5, seconds=8.0)
    counts.add_retry()
    found = counts.snapshot()
    assert found == Statistics(2, 5, 8.0, 2.0, 4.0, 6, 1)
    assert found.mean_batch_width == 3.0


def test_a_difference_has_the_products_between_two_snapshots():
    counts = Counts()
    counts.add_products([info(8)], vectors=1, seconds=1.0)
    before = counts.snapshot()
    counts.add_products([info(3)], vectors=2, seconds=4.0)
    assert counts.snapshot() - before == Statistics(1, 2, 4.0, 1.0, 2.0, 3, 0)
    assert (before - before).mean_batch_width == 0.0
