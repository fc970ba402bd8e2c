"""Data that does not fit on the device goes through it in chunks of rows.

Kernels are real, on the CPU, unless a test replaces them. Truth is jax's own
dense Hessian.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.errors import Code
from tests.support.engine import ROWS, N, create_point, logistic, multiply, refused, vectors

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


def chunked(registered, **options):
    return registered(row_reduction="mean", **options)


BUDGET = ROWS * N * 8 // 4
"""Bytes of a quarter of the data."""


def test_data_that_does_not_fit_goes_through_the_device_and_all_is_right(
    open_engine, registered, problem, assert_product
):
    engine = open_engine(example := chunked(registered), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    np.testing.assert_allclose(point.value, problem.value, rtol=1e-12)
    np.testing.assert_allclose(point.gradient, problem.gradient, rtol=1e-10, atol=1e-13)
    for width in (1, 3, 8):
        V = vectors(width)
        assert_product(multiply(engine, point, V), problem.hessian, V)
    assert sum(engine.lanes[0].residency.used_bytes().values()) <= BUDGET


def test_its_points_share_their_room_and_can_be_pinned(open_engine, registered):
    engine = open_engine(example := chunked(registered), memory_budget_bytes=BUDGET)
    points = [create_point(engine, example, example.x + shift) for shift in range(6)]
    residency = engine.lanes[0].residency
    assert all(residency.get(point.id) is point for point in points)
    engine.pin(points[0], 100)
    engine.pin(points[1], 100)
    assert residency.used_bytes()["point"] == 6 * 2 * N * 8


def test_a_block_waits_for_its_width_since_each_launch_goes_through_all_data(open_engine, registered, calls):
    engine = open_engine(example := chunked(registered), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    calls.clear()
    multiply(engine, point, vectors(16))
    assert calls.run() == [("hvp", 16)] * len(point.source.spans)
    assert 16 in point.source.kernels.widths("hvp")


def test_a_fixed_bucket_of_chunks_is_probed_on_two_of_them(open_engine, registered, calls):
    engine = open_engine(example := chunked(registered, fixed_bucket=4), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    chunks = len(point.source.spans)
    assert chunks > 10
    calls.clear()
    alone = multiply(engine, point, vectors(4)[:1]).tobytes()
    assert calls.run() == [("hvp", 4)] * (8 * 2 + chunks)
    assert multiply(engine, point, vectors(4))[:1].tobytes() == alone


@pytest.mark.parametrize(
    ("fun", "reduction"),
    [
        (lambda x, features, labels: jnp.sum(jnp.logaddexp(0.0, -labels * (features @ x))) + jnp.sum(x**2), "sum"),
        (lambda x, features, labels: jnp.sum(jnp.logaddexp(0.0, -labels * (features @ x))), "mean"),
        (logistic, "sum"),
        (lambda x, features, labels: jnp.mean(features @ x) ** 2, "mean"),
        (lambda x, features, labels: jnp.std(features @ x), "mean"),
    ],
    ids=["a sum with a penalty", "a sum called a mean", "a mean called a sum", "a square of a mean", "a deviation"],
)
def test_an_objective_that_is_no_mean_or_sum_over_rows_is_refused_in_chunks(open_engine, registered, fun, reduction):
    example = registered(fun, row_reduction=reduction)
    whole = open_engine(example)
    assert create_point(whole, example, np.zeros(N)).launches == 0  # With all of its data resident, the value is right.
    engine = open_engine(memory_budget_bytes=BUDGET)
    for x in (example.x, np.zeros(N), example.x):
        error = refused(create_point, engine, example, x)
        assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "ROW_REDUCTION")
        assert f"row_reduction '{reduction}'" in str(error)
        assert "--memory-budget" in str(error)


def test_that_it_is_one_is_found_out_once(open_engine, registered, calls):
    engine = open_engine(example := chunked(registered), memory_budget_bytes=BUDGET)
    chunks = len(create_point(engine, example).source.spans)
    assert len(calls) == chunks + 3
    create_point(engine, example, example.x + 1)
    assert len(calls) == 2 * chunks + 3


def test_the_same_array_as_data_and_closed_over_is_cut_as_data_only(open_engine, problem, registered, assert_product):
    """They have the same digest, dtype and shape."""
    features = problem.data[0]

    def total(x, *data):
        return logistic(x, *data) + jnp.sum(jnp.asarray(features)) * 1e-3

    example = chunked(lambda **options: registered(total, **options))
    assert [tensor.digest for tensor in example.bundle.captured] == [example.bundle.data[0].digest]
    engine = open_engine(example, memory_budget_bytes=features.nbytes + 2 * N * 8 + 2 * (N + 1) * 8)
    point = create_point(engine, example)
    assert len(point.source.spans) > 1
    np.testing.assert_allclose(point.value, problem.value + features.sum() * 1e-3, rtol=1e-12)
    V = vectors(2)
    assert_product(multiply(engine, point, V), problem.hessian, V)


def test_the_error_for_a_budget_below_two_rows_gives_the_bytes_of_a_row(open_engine, registered):
    engine = open_engine(example := chunked(registered), memory_budget_bytes=2 * N * 8 + 1000)
    error = refused(create_point, engine, example)
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "MEMORY_BUDGET")
    assert "--memory-budget" in str(error)
    assert f"1 rows of {N * 8 + 8} bytes" in str(error)


def test_data_that_does_not_fit_and_may_not_be_cut_says_how_it_could_be(open_engine, problem):
    engine = open_engine(problem, memory_budget_bytes=BUDGET)
    assert "register it with row_reduction" in str(refused(create_point, engine, problem))


def test_a_file_that_is_lost_in_the_middle_of_a_product_is_told(open_engine, registered, calls):
    engine = open_engine(example := chunked(registered), memory_budget_bytes=BUDGET)
    point = create_point(engine, example)
    digest = example.bundle.data[0].digest
    calls.clear()

    def instead(name, width, args):
        if len(calls) == 3:
            (engine.store.root / "blobs" / digest[:2] / digest).unlink()

    calls.instead = instead
    error = refused(multiply, engine, point, vectors(1))
    assert (error.code, error.reason) == (Code.DATA_LOSS, "BLOB_CORRUPT")
    assert error.metadata == {"digests": digest}
