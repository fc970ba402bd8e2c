"""The engine tries both programs of a product, and keeps residuals that fit and pay."""

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.engine.plan import Plan
from tests.support.engine import block, compile_now, create_point, launches, multiply, product_spec

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


def test_both_programs_are_tried_and_residuals_stay(open_engine, objective_example, assert_product):
    example = objective_example
    engine = open_engine(example)
    point = create_point(engine, example)
    compile_now(point, ("hvp", 1), ("prepare", 0), ("apply", 1))
    V = block(example, 1)
    tried = [(hvp, 0) for hvp in range(1, Plan.SAMPLES + 1)] + [(Plan.SAMPLES, 1), (Plan.SAMPLES, 2)]
    for product, programs in enumerate(tried):
        assert_product(multiply(engine, point, V), example.hessian, V)
        assert (launches(engine, "hvp"), launches(engine, "apply")) == programs, product
    assert engine.lanes[0].residency.used_bytes()["residuals"] == point.objective.residual_bytes


def test_blocks_make_and_use_no_residuals(open_engine, logistic):
    engine = open_engine(logistic)
    point = create_point(engine, logistic)
    compile_now(point, ("hvp", 4), ("prepare", 0), ("apply", 1))
    for seed in range(3):
        multiply(engine, point, block(logistic, 4, seed))
    assert launches(engine, "apply") == 0
    assert "residuals" not in engine.lanes[0].residency.used_bytes()


def test_a_product_does_not_wait_for_the_residual_programs_to_compile(open_engine, rosen):
    engine = open_engine(rosen)
    point = create_point(engine, rosen)
    for _ in range(Plan.SAMPLES + 1):
        multiply(engine, point, block(rosen, 1))
    assert launches(engine, "hvp") == Plan.SAMPLES + 1
    compile_now(point, ("prepare", 0), ("apply", 1))
    multiply(engine, point, block(rosen, 1))
    assert launches(engine, "apply") == 1


def test_residuals_that_would_fill_the_budget_are_not_made(open_engine, rosen, assert_product):
    engine = open_engine(rosen)
    needed = create_point(engine, rosen).objective.residual_bytes
    engine = open_engine(memory_budget_bytes=4 * needed - 1)
    point = create_point(engine, rosen)
    compile_now(point, ("hvp", 1), ("prepare", 0), ("apply", 1))
    for seed in range(Plan.SAMPLES + 1):
        V = block(rosen, 1, seed)
        assert_product(multiply(engine, point, V), rosen.hessian, V)
    assert launches(engine, "apply") == 0


def test_residuals_that_do_not_fit_beside_the_data_are_no_failure_of_the_product(
    open_engine, make_example, assert_product
):
    x = np.linspace(1, 2, 5)
    example = make_example(lambda x, d: jnp.sum(x[1:] ** 4 * x[:-1]) * d.mean(), x, np.ones(1000))
    residuals = create_point(open_engine(example), example).objective.residual_bytes
    budget = example.data[0].nbytes + 2 * x.nbytes + residuals - 1
    assert 0 < residuals <= budget // 4
    engine = open_engine(memory_budget_bytes=budget)
    point = create_point(engine, example)
    compile_now(point, ("hvp", 1), ("prepare", 0), ("apply", 1))
    for seed in range(Plan.SAMPLES + 1):
        V = block(example, 1, seed)
        assert_product(multiply(engine, engine.resident(product_spec(point)), V), example.hessian, V)
