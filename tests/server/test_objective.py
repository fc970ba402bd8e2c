"""The place of a point's data follows from its size and the budget: no device, no
programs.
"""

import math
from types import SimpleNamespace

import pytest

from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server.device import data_sources
from hvpd_server.device.programs import Kernels
from hvpd_server.engine.objective import MAX_BLOCKS, OWN_RULES, Objective, program_of, tensor_key
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer.structural import STRUCTURAL

N = 10
X_BYTES = 8 * N


class Programs:
    """Programs that state the number of rows, and the derivation."""

    described = objective_pb2.Derivation(mode="forward_over_reverse", programs=["value_and_grad", "hvp"])

    def for_rows(self, rows):
        found = object.__new__(Kernels)
        found.rows = rows
        return found


def tensor(*shape, digest="a", dtype="float64"):
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, digest=digest)


FEATURES, LABELS, TABLE = tensor(1000, 4, digest="features"), tensor(1000, digest="labels"), tensor(5, digest="table")
CAPTURED = tensor(7, digest="captured")
ROW = 5 * 8


def objective(
    budget, *, reduction="mean", data=(FEATURES, LABELS, TABLE), row_leaves=(0, 1), captured=(), programs=None, **rest
):
    bundle = objective_pb2.Bundle(
        n=N,
        dtype="float64",
        mode="forward_over_reverse",
        data=data,
        captured=captured,
        row_leaves=row_leaves,
        row_reduction=reduction,
    )
    return Objective("0" * 64, bundle, programs or Programs(), budget, **rest)


def test_only_functions_of_the_client_get_vectors_that_may_not_change():
    """Each kind of mark that carries functions is decided about."""
    plain = {"hvpd.stop_gradient", "hvpd.checkpoint", "hvpd.scan"}
    assert set(STRUCTURAL) == {*OWN_RULES, *plain}
    for name in STRUCTURAL:
        programs = Programs()
        programs.described = objective_pb2.Derivation(mode="forward_over_reverse", recognised={f"the mark {name}": 1})
        assert objective(1 << 30, programs=programs).own_rules is (name not in plain)


def lengths(placement):
    return [span.stop - span.start for span in placement.spans]


ALL = 1000 * ROW + 5 * 8 + 2 * X_BYTES


def test_data_that_fits_is_on_the_device_as_a_whole():
    found = objective(ALL).placement([FEATURES, LABELS, TABLE])
    assert not found.spans
    assert found.needs == {tensor_key(FEATURES): 32_000, tensor_key(LABELS): 8000, tensor_key(TABLE): 40}
    kernels = objective(ALL).kernels
    assert isinstance(kernels, Kernels)
    assert kernels.rows == 1000


def test_data_one_byte_too_large_goes_in_chunks_and_leaves_without_rows_stay():
    budget = ALL - 1
    found = objective(budget).placement([FEATURES, LABELS, TABLE])
    assert found.row_bytes == ROW
    room = budget - 2 * X_BYTES - 40
    assert room // 8 // ROW == 124
    assert lengths(found) == [112] * 8 + [104]  # These are the fewest chunks of at most 124 rows.
    assert found.needs == {tensor_key(TABLE): 40, found.room_key: 2 * 112 * ROW}


def test_captured_arrays_stay():
    found = objective(ALL, captured=[CAPTURED]).placement([FEATURES, LABELS, TABLE])
    assert found.spans
    assert found.needs[tensor_key(CAPTURED)] == 56


def test_a_tensor_that_is_given_twice_counts_once():
    both = [FEATURES, FEATURES]
    budget = 32_000 + 2 * X_BYTES
    assert not objective(budget, data=both).placement(both).spans
    assert objective(budget - 1, data=both).placement(both).spans


@pytest.mark.parametrize(("reduction", "row_leaves"), [("", (0, 1)), ("", ())])
def test_data_that_cannot_be_chunked_is_placed_whole_at_any_size(reduction, row_leaves):
    found = objective(1, reduction=reduction, row_leaves=row_leaves).placement([FEATURES, LABELS, TABLE])
    assert not found.spans
    assert sum(found.needs.values()) == ALL - 2 * X_BYTES


def test_programs_are_compiled_for_a_chunk_and_for_the_last_one():
    served = objective(ALL // 3)
    assert isinstance(served.kernels, data_sources.Several)
    expected = tuple(dict.fromkeys(lengths(served.placement([FEATURES, LABELS, TABLE]))))
    assert served.kernels.rows == expected
    assert len(expected) <= 2


@pytest.mark.parametrize("budget", [1, 2 * X_BYTES, 2 * X_BYTES + 40, 2 * X_BYTES + 40 + 2 * ROW - 1])
def test_a_budget_too_small_for_two_rows_needs_more_than_it_is(budget):
    """The request for a point is refused, not the registration."""
    found = objective(budget).placement([FEATURES, LABELS, TABLE])
    assert sum(found.needs.values()) + 2 * X_BYTES > budget
    assert sum(lengths(found)) == 1000


def test_a_budget_for_two_rows_is_enough():
    budget = 2 * X_BYTES + 40 + 2 * ROW
    found = objective(budget).placement([FEATURES, LABELS, TABLE])
    assert sum(found.needs.values()) + 2 * X_BYTES == budget
    assert lengths(found) == [1] * 1000


def test_rows_without_number_and_no_room_make_no_spans_without_number():
    many = tensor(10**9, digest="many")
    found = objective(1000, data=[many], row_leaves=[0]).placement([many])
    assert len(found.spans) <= data_sources.MAX_CHUNKS
    assert sum(found.needs.values()) > 1000


def test_other_data_goes_by_its_own_size():
    served = objective(ALL)
    small = [tensor(10, 4, digest="s"), tensor(10, digest="t"), TABLE]
    large = [tensor(5000, 4, digest="l"), tensor(5000, digest="m"), TABLE]
    assert not served.placement(small).spans
    assert served.kernels_for(small).rows == 10
    assert sum(lengths(served.placement(large))) == 5000


def test_points_with_the_same_data_share_the_room_for_chunks_and_others_do_not():
    served = objective(ALL // 3)
    placements = [
        served.placement(data)
        for data in (
            [FEATURES, LABELS, TABLE],
            [FEATURES, LABELS, tensor(5, digest="other")],
            [FEATURES, tensor(1000, digest="other"), TABLE],
        )
    ]
    assert placements[0].room_key == placements[1].room_key != placements[2].room_key
    assert objective(ALL // 4).placement([FEATURES, LABELS, TABLE]).room_key != placements[0].room_key


# On several devices


def split(parts):
    """Return the settings of so many devices. They hold data once if they divide its
    rows. Otherwise each holds a copy.
    """
    return {"parts": parts, "copies": lambda shape: 1 if shape and shape[0] % parts == 0 else parts}


def test_replicated_arrays_count_once_for_each_device():
    found = objective(10**6, **split(4)).placement([FEATURES, LABELS, TABLE])
    assert found.needs == {tensor_key(FEATURES): 32_000, tensor_key(LABELS): 8000, tensor_key(TABLE): 4 * 40}
    assert objective(10**6, **split(4)).vector_bytes == 4 * X_BYTES
    assert objective(10**6).vector_bytes == X_BYTES


def test_rows_that_the_devices_do_not_divide_count_four_times_and_may_have_to_go_in_chunks():
    odd = [tensor(1001, 4, digest="odd"), tensor(1001, digest="labels"), TABLE]
    budget = 1001 * ROW * 4
    assert objective(budget, data=odd, **split(4)).placement(odd).spans
    assert not objective(budget + 4 * (40 + 2 * X_BYTES), data=odd, **split(4)).placement(odd).spans


def test_the_devices_divide_the_chunks_and_each_device_has_the_remainder():
    odd = [tensor(1003, 4, digest="odd"), tensor(1003, digest="labels"), TABLE]
    found = objective(20_000, data=odd, **split(4)).placement(odd)
    assert lengths(found)[-1] == 3
    assert not any(length % 4 for length in lengths(found)[:-1])
    assert found.needs[found.room_key] == 2 * max(lengths(found)[0], 3 * 4) * ROW
    assert math.gcd(*lengths(found)[:-1]) >= 4


# Derivations


def derived(**fields):
    return SimpleNamespace(
        for_rows=Programs().for_rows,
        described=objective_pb2.Derivation(**{"mode": "auto", "programs": ["value_and_grad", "hvp"], **fields}),
    )


def residual(shape, **source):
    return objective_pb2.Residual(spec=tensor_pb2.ArraySpec(dtype="float64", shape=shape), **source)


def test_residuals_count_as_far_as_they_are_no_arguments():
    kept = [residual([7, 2], result=0), residual([1000, 4], argument=1), residual([], result=1)]
    found = objective(ALL, programs=derived(residuals=kept, programs=["hvp", "prepare", "apply"]))
    assert found.residual_bytes == 8 * (7 * 2 + 1)


def test_the_mode_is_the_derived_mode_and_not_the_requested_one():
    """jax forbids forward mode for some objectives."""
    found = objective(ALL, programs=derived(mode="reverse_over_reverse"))
    assert found.bundle.mode == "forward_over_reverse"
    assert found.described.mode == "reverse_over_reverse"
    assert found.plan.choose(1).program == "hvp"


# Principal blocks


def with_leaves(*shapes):
    found = objective(ALL)
    found.bundle.x_leaves.extend(tensor_pb2.ArraySpec(dtype="float64", shape=shape) for shape in shapes)
    return found


def test_the_vectors_of_a_block_have_its_elements():
    found = with_leaves([2, 3], [], [3])
    assert found.columns("hvp") == N
    assert [found.columns(f"hvp[{leaves}]") for leaves in ("0", "1", "0,2", "0,1,2")] == [6, 1, 9, 10]


@pytest.mark.parametrize("leaves", ["3", "1,0", "1,1"])
def test_a_block_that_x_does_not_have_is_refused(leaves):
    with pytest.raises(ServiceError, match="a block must be of ascending positions of leaves of x, 0 to 2") as error:
        with_leaves([2, 3], [], [3]).columns(f"ggn[{leaves}]")
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, "UNKNOWN_BLOCK")


def test_blocks_have_a_largest_number_and_known_ones_go_on():
    found = with_leaves(*[[1]] * 10)
    subsets = [[leaf for leaf in range(10) if number >> leaf & 1] for number in range(1, MAX_BLOCKS + 2)]
    names = [",".join(map(str, leaves)) for leaves in subsets]
    for name in names[:-1]:
        found.columns(f"hvp[{name}]")
    with pytest.raises(ServiceError, match=f"has products of {MAX_BLOCKS} principal blocks already") as error:
        found.columns(f"hvp[{names[-1]}]")
    assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_BLOCKS")
    assert found.columns(f"ggn[{names[0]}]") == 1


@pytest.mark.parametrize(
    ("spec", "program"),
    [
        ({}, "hvp"),
        ({"block": 2}, "hvp[1,3]"),
        ({"leaves": [0, 2]}, "hvp[0,2]"),
        ({"operator": curvature_pb2.OPERATOR_SAMPLED_FISHER, "block": 1}, "sampled_fisher[0]"),
    ],
)
def test_a_product_of_a_block_is_of_the_program_of_its_leaves(spec, program):
    bundle = objective_pb2.Bundle(blocks=[{"leaves": [0]}, {"leaves": [1, 3]}])
    asked = curvature_pb2.ProductSpec(**{"operator": curvature_pb2.OPERATOR_HESSIAN, **spec})
    assert program_of(asked, bundle) == program
