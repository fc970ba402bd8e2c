"""With a fixed bucket, all launches have one width, and a product has the same bits.

Kernels are real, on the CPU, unless a test replaces them. Truth is jax's own
dense Hessian. For bits it is the product of a vector alone.
"""

import collections
import dataclasses
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._registration import export as _export
from hvpd_server.errors import Code, ServiceError
from tests.support.engine import WAIT, N, compile_now, create_point, multiply, vectors

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


@pytest.fixture
def fixed(open_engine, registered):
    """Yield a point whose launches have eight vectors each, and the engine."""
    engine = open_engine(example := registered(fixed_bucket=8))
    return engine, create_point(engine, example)


def test_every_launch_has_the_one_width_and_no_other_is_compiled(fixed, calls, problem, assert_product):
    engine, point = fixed
    for width in (1, 3, 8, 11, 16):
        V = vectors(width)
        assert_product(multiply(engine, point, V), problem.hessian, V)
    assert set(calls.run()) == {("hvp", 8)}
    assert point.source.kernels.widths("hvp") == [8]


def test_without_it_bits_depend_on_the_width(open_engine, problem):
    """The other tests here assume that this program's bits are not the same at every
    width, on this CPU.
    """
    engine = open_engine(problem)
    point = create_point(engine, problem)
    compile_now(point, ("hvp", 1), ("hvp", 8))
    alone, beside = multiply(engine, point, vectors(8)[:1]), multiply(engine, point, vectors(8))[:1]
    assert alone.tobytes() != beside.tobytes()


def test_a_vector_has_the_same_bits_wherever_in_a_block_it_stands(fixed):
    engine, point = fixed
    V = vectors(20)
    alone = [multiply(engine, point, V[row : row + 1]).tobytes() for row in range(20)]
    assert len(set(alone)) == 20
    for start, stop in [(0, 20), (0, 8), (3, 11), (5, 7), (12, 20), (19, 20)]:
        products = multiply(engine, point, V[start:stop])
        assert [row.tobytes() for row in products] == alone[start:stop]


@pytest.mark.parametrize("program", ["hvp", "ggn", "sampled_fisher"])
def test_bits_are_the_same_under_a_load_of_sixteen_threads_with_blocks_of_all_widths(
    open_engine, problem, start, calls, program
):
    """If there were other buckets, they would compile meanwhile: eight products go
    alone, and then under load.
    """
    import hvpd

    composite = hvpd.composite(
        lambda x, features: features @ x.reshape(N, 1),
        lambda z, labels: jnp.mean(jnp.logaddexp(0.0, -labels * z[:, 0])),
        distribution="normal",
    )
    options = {"platforms": ("cpu",), "precision": "highest", "fixed_bucket": 8}
    example = dataclasses.replace(problem, export=_export.export(composite, problem.x, problem.data, **options))
    engine = open_engine(example)
    point = create_point(engine, example)
    V = vectors(16, seed=7)
    alone = [multiply(engine, point, row[None], program).tobytes() for row in V]
    together, widths = threading.Barrier(16), collections.Counter()

    def caller(seed):
        rng = np.random.default_rng(seed)
        together.wait(WAIT)
        for _ in range(12):
            rows = rng.permutation(16)[: rng.integers(1, 17)]
            products, info = engine.multiply(point, program, V[rows])
            widths[info.batch_width > len(rows)] += 1
            assert [row.tobytes() for row in products] == [alone[row] for row in rows]

    for future in [start(caller, seed) for seed in range(16)]:
        future.result(WAIT)
    assert widths[True] > 0  # Launches were shared.
    assert set(calls.run()) == {(program, 8)}


def unsteady(calls):
    """Change the last bit of each vector that is not in the first row of a block, from
    now on.
    """

    def instead(name, width, args):
        if name != "hvp":
            return None
        found = np.array(calls.real())
        found[1:, 0] = np.nextafter(found[1:, 0], np.inf)
        return found

    calls.instead = instead


def test_vectors_go_alone_in_the_first_row_if_the_row_changes_the_bits(
    open_engine, registered, calls, problem, assert_product, start
):
    engine = open_engine(example := registered(fixed_bucket=8))
    point = create_point(engine, example)
    unsteady(calls)
    V = vectors(5)
    alone = [multiply(engine, point, row[None]).tobytes() for row in V]
    calls.clear()
    products = multiply(engine, point, V)
    assert [row.tobytes() for row in products] == alone
    assert_product(products, problem.hessian, V)
    assert calls.run() == [("hvp", 8)] * 5
    together = threading.Barrier(8)

    def caller(row):
        together.wait(WAIT)
        return [multiply(engine, point, V[row : row + 1]).tobytes() for _ in range(5)]

    rows = [0, 1, 2, 3, 4, 0, 1, 2]
    for row, future in [(row, start(caller, row)) for row in rows]:
        assert future.result(WAIT) == [alone[row]] * 5


@pytest.mark.parametrize("first", ["zero", "nan"])
def test_a_point_without_evidence_leaves_the_probe_to_the_next_point(open_engine, registered, calls, first):
    """At 0 the Hessian of x^4 is 0, so every product has the same bits at any place."""
    engine = open_engine(
        example := registered(lambda x, features, labels: jnp.sum((features @ x) ** 4), fixed_bucket=8)
    )
    silent = create_point(engine, example, np.full(N, {"zero": 0.0, "nan": np.nan}[first]))
    V = vectors(3)
    assert not np.nan_to_num(multiply(engine, silent, V)).any()
    unsteady(calls)
    assert silent.objective.steady == {}
    point = create_point(engine, example)
    alone = [multiply(engine, point, row[None]).tobytes() for row in V]
    assert [row.tobytes() for row in multiply(engine, point, V)] == alone
    assert list(silent.objective.steady.values()) == [False]


def test_a_device_that_adds_in_another_order_each_time_has_no_fixed_bucket(fixed, calls):
    engine, point = fixed
    rng = np.random.default_rng(0)
    calls.instead = lambda name, width, args: rng.normal(size=(width, N))
    with pytest.raises(ServiceError, match="register it without fixed_bucket") as refused:
        multiply(engine, point, vectors(2))
    assert (refused.value.code, refused.value.reason) == (Code.FAILED_PRECONDITION, "NOT_DETERMINISTIC")


def test_it_is_found_out_once_however_many_ask_at_once(fixed, calls, start):
    engine, point = fixed
    together = threading.Barrier(8)

    def caller(seed):
        together.wait(WAIT)
        return multiply(engine, point, vectors(8, seed))

    for future in [start(caller, seed) for seed in range(8)]:
        future.result(WAIT)
    assert len(calls.run()) == 8 + 8  # Eight launches find out.


def test_the_bucket_is_no_wider_than_the_server_launches(open_engine, registered, calls, problem, assert_product):
    engine = open_engine(example := registered(fixed_bucket=64), max_block_width=4)
    point = create_point(engine, example)
    V = vectors(4)
    assert_product(multiply(engine, point, V), problem.hessian, V)
    assert set(calls.run()) == {("hvp", 4)}


def test_a_linearized_product_is_made_by_apply_with_and_without_room_for_its_residuals(open_engine, registered, calls):
    """Otherwise its bits would depend on the resident data."""
    example = registered(mode="linearized", fixed_bucket=4)
    roomy = open_engine(example)
    point = create_point(roomy, example)
    V = vectors(4)
    expected = multiply(roomy, point, V).tobytes()
    assert {name for name, _ in calls.run()} == {"prepare", "apply"}
    # Residuals take at most a quarter of the budget, and pinned entries leave no room
    # for them.
    residency = roomy.lanes[0].residency
    for key in ("one", "two"):
        residency.put(key, "data", key, residency.budget_bytes // 4 - 10**5)
        residency.pin(key, 100)
    residency.drop(("residuals", point.id))
    residency.put("three", "data", 3, residency.free_bytes())
    residency._entries["three"].leases[""] = residency._entries["three"].pinned_until = float("inf")
    residency._entries.leased.add("three")
    calls.clear()
    assert multiply(roomy, point, V).tobytes() == expected
    assert {name for name, _ in calls.run()} == {"prepare", "apply"}
    assert residency.get(("residuals", point.id)) is None
