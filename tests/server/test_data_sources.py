"""Sources of data that is resident, and of data in chunks, with fake kernels and
loaders.
"""

import concurrent.futures
import itertools
import threading
import weakref

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.device import data_sources
from hvpd_server.errors import Code, ServiceError

WAIT = 10


# Cutting rows into chunks


def lengths(spans):
    return [span.stop - span.start for span in spans]


@settings(max_examples=500)
@given(
    rows=st.integers(1, 20_000),
    row_bytes=st.integers(0, 5000),
    room_bytes=st.integers(-(10**6), 10**7),
    multiple=st.integers(1, 9),
)
@example(rows=1, row_bytes=0, room_bytes=0, multiple=1)
@example(rows=3, row_bytes=8, room_bytes=10**6, multiple=4)
@example(rows=200_000, row_bytes=8, room_bytes=-1, multiple=4)
@example(rows=196_612, row_bytes=0, room_bytes=0, multiple=3)
def test_chunks_have_every_row_once_in_order_and_are_about_as_long(rows, row_bytes, room_bytes, multiple):
    spans = data_sources.spans(rows, row_bytes, room_bytes, multiple)
    assert (spans[0].start, spans[-1].stop) == (0, rows)
    assert all(one.stop == other.start for one, other in itertools.pairwise(spans))
    assert min(lengths(spans)) > 0
    assert len(spans) <= data_sources.MAX_CHUNKS + 1
    assert len(set(lengths(spans))) <= (2 if multiple == 1 else 3)  # Each length has its own compiled program.
    assert len(set(lengths(spans)[:-2])) <= 1
    assert max(lengths(spans)) == lengths(spans)[0]
    if multiple == 1:
        assert lengths(spans)[0] - lengths(spans)[-1] < len(spans)


@settings(max_examples=300)
@given(rows=st.integers(1, 20_000), row_bytes=st.integers(1, 5000), room_bytes=st.integers(1, 10**8))
def test_chunks_are_as_few_as_fit_twice_into_a_quarter_of_the_room(rows, row_bytes, room_bytes):
    spans = data_sources.spans(rows, row_bytes, room_bytes)
    most = room_bytes // 8 // row_bytes
    if most * data_sources.MAX_CHUNKS >= rows:  # Otherwise the chunks are larger, and other code refuses them.
        assert 8 * lengths(spans)[0] * row_bytes <= room_bytes
        assert len(spans) == -(-rows // most)


def test_a_chunk_has_a_row_at_least_and_chunks_are_not_without_number():
    assert lengths(data_sources.spans(5, 1000, 1)) == [1] * 5
    assert lengths(data_sources.spans(10**9, 8, -1)) == [-(-(10**9) // (1 << 16))] * 65_535 + [10**9 % 15_259]
    assert len(data_sources.spans(10**12, 8, 100)) <= 1 << 16


def test_a_chunk_has_a_largest_size_however_much_room_there_is():
    spans = data_sources.spans(1 << 20, 1 << 20, 1 << 60)
    assert lengths(spans)[0] == data_sources.CHUNK_BYTES >> 20


@settings(max_examples=300)
@given(rows=st.integers(8, 10_000), multiple=st.integers(2, 8), most=st.integers(8, 10_000))
def test_the_devices_divide_each_chunk_except_a_last_one_with_the_remainder(rows, multiple, most):
    spans = data_sources.spans(rows, 1, 8 * most, multiple)
    rest = rows % multiple
    assert not any(length % multiple for length in lengths(spans)[: -1 if rest else None])
    assert not rest or lengths(spans)[-1] == rest
    assert lengths(spans)[0] <= most


def test_fewer_rows_than_devices_are_one_chunk():
    assert lengths(data_sources.spans(3, 8, 10**6, 4)) == [3]


# Going through them


class FakeKernels:
    """Programs for a number of rows. Each is an ordinary function of its arguments."""

    def __init__(self, rows, programs, calls=None):
        self.rows = rows
        self._programs = programs
        self._calls = calls if calls is not None else []

    def call(self, name, width, *args):
        self._calls.append((name, width, self.rows))
        return self._programs[name](*args)


class Now(concurrent.futures.Executor):
    """An executor that runs each call at once, in the submitting thread, so that the
    order is fixed.
    """

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            future.set_exception(error)
        return future


def streamed(programs, array, lengths, reduction="mean", *, load=None, calls=None, ahead=None):
    """Return a source of an array's rows, in chunks of these lengths."""
    stops = list(itertools.accumulate(lengths))
    spans = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    several = data_sources.Several([FakeKernels(length, programs, calls) for length in dict.fromkeys(lengths)])
    return data_sources.Streamed(several, spans, reduction, load or (lambda rows: [array[rows]]), ahead or Now())


@pytest.fixture
def numbers():
    return np.random.default_rng(0).normal(size=(10, 3))


@pytest.mark.parametrize("lengths", [[10], [4, 4, 2], [9, 1], [1] * 10])
def test_a_mean_weighs_each_chunk_by_its_rows(numbers, lengths):
    programs = {"value_and_grad": lambda x, rows: (np.mean(rows @ x), np.mean(rows, axis=0))}
    x = np.arange(3.0)
    value, gradient = streamed(programs, numbers, lengths).call("value_and_grad", 0, x)
    np.testing.assert_allclose(value, np.mean(numbers @ x), rtol=1e-14)
    np.testing.assert_allclose(gradient, numbers.mean(axis=0), rtol=1e-14, atol=1e-16)


def test_a_mean_has_its_penalty_once(numbers):
    programs = {"hvp": lambda V, rows: V @ (rows.T @ rows) / len(rows) + 7 * V}
    V = np.eye(3)
    found = streamed(programs, numbers, [4, 4, 2]).call("hvp", 3, V)
    np.testing.assert_allclose(found, numbers.T @ numbers / 10 + 7 * np.eye(3), rtol=1e-14)


def test_a_sum_is_that_of_all_rows(numbers):
    programs = {"hvp": lambda V, rows: V @ (rows.T @ rows)}
    found = streamed(programs, numbers, [4, 4, 2], "sum").call("hvp", 3, np.eye(3))
    np.testing.assert_allclose(found, numbers.T @ numbers, rtol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("program", ["kfac", "sampled_kfac"])
def test_the_first_kronecker_factor_is_a_mean_for_both_reductions(numbers, reduction, program):
    """The factors are A_0, G_0, A_1, G_1. G is a mean or sum over the rows, like the
    loss.
    """
    share = (lambda rows: np.float64(1 / len(rows))) if reduction == "mean" else (lambda rows: np.float64(1))

    def factors(*args):
        rows = args[-1]
        return [rows.T @ rows / len(rows), share(rows) * rows.sum(axis=0), rows.mean(axis=0), share(rows) * len(rows)]

    seed = 1 if program == "sampled_kfac" else None
    found = streamed({program: factors}, numbers, [4, 4, 2], reduction).call(program, 0, seed=seed)
    for part, expected in zip(found, factors(numbers), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-14)


def test_sums_are_taken_in_float64_and_come_back_in_the_programs_dtype():
    """In float32, 2^24 + 1 is 2^24."""
    rows = np.array([2.0**24, *[1.0] * 8], np.float32)
    programs = {"value_and_grad": lambda rows: (rows[0], rows.astype(np.float64), np.sum(rows, keepdims=True))}
    value, double, single = streamed(programs, rows, [1] * 9, "sum").call("value_and_grad", 0)
    assert np.add.accumulate(rows)[-1] == 2.0**24
    assert value == single[0] == double[0] == 2.0**24 + 8
    assert (value.dtype, double.dtype, single.dtype) == (np.float32, np.float64, np.float32)


def test_the_next_chunk_is_read_before_one_is_computed_and_the_one_after_it_not_before(numbers):
    log = []

    def load(rows):
        log.append(("load", rows.start))
        return [rows.start]

    programs = {"hvp": lambda start: log.append(("compute", start)) or np.zeros(1)}
    streamed(programs, numbers, [3, 3, 3, 1], load=load).call("hvp", 1)
    assert log == [
        ("load", 0),
        ("load", 3),
        ("compute", 0),
        ("load", 6),
        ("compute", 3),
        ("load", 9),
        ("compute", 6),
        ("compute", 9),
    ]


def test_the_next_chunk_is_read_while_one_is_computed(numbers):
    """Neither task ends before the other has begun."""
    together = threading.Barrier(2)

    def load(rows):
        if rows.start == 5:
            together.wait(WAIT)
        return [rows.start]

    def compute(start):
        if start == 0:
            together.wait(WAIT)
        return np.ones(1)

    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        found = streamed({"hvp": compute}, numbers, [5, 5], load=load, ahead=ahead).call("hvp", 1)
    assert found == 1.0


def test_two_chunks_are_there_at_a_time_and_none_afterwards(numbers):
    alive, most = weakref.WeakSet(), []

    class Chunk:
        pass

    def load(rows):
        chunk = Chunk()
        alive.add(chunk)
        most.append(len(alive))
        return [chunk]

    streamed({"hvp": lambda chunk: np.zeros(1)}, numbers, [1] * 10, load=load).call("hvp", 1)
    assert most == [1] + [2] * 9
    assert len(alive) == 0


def test_an_error_of_the_loader_ends_the_computation(numbers):
    calls = []

    def load(rows):
        if rows.start == 6:
            raise ServiceError(Code.DATA_LOSS, "BLOB_CORRUPT", "the disk is broken")
        return [rows.start]

    source = streamed({"hvp": lambda start: np.zeros(1)}, numbers, [3, 3, 3, 1], load=load, calls=calls)
    with pytest.raises(ServiceError, match="the disk is broken"):
        source.call("hvp", 1)
    assert calls == [("hvp", 1, 3)] * 2


def test_an_error_of_a_program_surfaces_and_one_chunk_was_read_in_vain(numbers):
    read = []

    def load(rows):
        read.append(rows.start)
        return [rows.start]

    def fail(start):
        raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "no memory")

    with pytest.raises(ServiceError, match="no memory"):
        streamed({"hvp": fail}, numbers, [3, 3, 3, 1], load=load).call("hvp", 1)
    assert read == [0, 3]


def test_closing_the_reader_during_a_computation_is_an_error(numbers):
    ahead = concurrent.futures.ThreadPoolExecutor(1)

    def compute(rows):
        ahead.shutdown(wait=False, cancel_futures=True)
        return np.zeros(1)

    with pytest.raises((RuntimeError, concurrent.futures.CancelledError)):
        streamed({"hvp": compute}, numbers, [1] * 10, ahead=ahead).call("hvp", 1)


def test_every_chunk_draws_with_a_key_of_its_own_and_the_same_seed_with_the_same_keys(numbers):
    keys = []
    source = streamed({"sampled_fisher": lambda x, V, key, rows: keys.append(tuple(key)) or V}, numbers, [4, 4, 2])
    for seed in (0, 0, 1, 2**32, 2**64 - 1):
        source.call("sampled_fisher", 1, "x", np.ones((1, 3)), seed=seed)
    assert keys[:3] == keys[3:6]
    assert len(set(keys[3:9])) == 6
    assert all(np.asarray(key).dtype == np.uint32 for key in keys)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_the_first_key_is_jaxs_own_of_the_seed(seed):
    with jax.enable_x64(True):
        expected = jax.random.key_data(jax.random.key(np.uint64(seed), impl="threefry2x32"))
    np.testing.assert_array_equal(data_sources.random_key(seed), expected)


def test_a_sample_is_of_the_first_and_the_last_chunk_with_the_programs_of_the_whole(numbers):
    programs = {"hvp": lambda rows: np.mean(rows, axis=0)}
    source = streamed(programs, numbers, [4, 4, 2])
    assert source.sample.kernels is source.kernels
    expected = np.concatenate([numbers[:4], numbers[8:]]).mean(axis=0)
    np.testing.assert_allclose(source.sample.call("hvp", 1), expected, rtol=1e-14)
    assert lengths(streamed(programs, numbers, [10]).sample.spans) == [10]


# Data that is on the device


def test_resident_data_comes_after_the_random_key():
    kernels = FakeKernels(0, {"hvp": lambda *args: args, "sampled_fisher": lambda *args: args})
    source = data_sources.Resident(kernels, ["captured", "data"])
    assert source.call("hvp", 2, "x", "V") == ("x", "V", "captured", "data")
    x, V, key, *rest = source.call("sampled_fisher", 2, "x", "V", seed=5)
    assert (x, V, rest) == ("x", "V", ["captured", "data"])
    np.testing.assert_array_equal(key, [0, 5])
    assert source.sample is source


def test_residuals_are_results_and_arguments_in_the_order_of_the_bundle():
    kernels = FakeKernels(0, {"prepare": lambda *args: ("value", "gradient", "first", "second")})
    spec = tensor_pb2.ArraySpec(dtype="float64", shape=[1])
    of = [objective_pb2.Residual(spec=spec, **where) for where in ({"result": 1}, {"argument": 0}, {"argument": 2})]
    source = data_sources.Resident(kernels, ["captured", "data"])
    assert source.residuals(of, "x") == ["second", "x", "data"]


# Programs for several sizes


class Asked:
    """Kernels that note their requests."""

    def __init__(self, rows, widths=(), error=None):
        self.rows, self.error, self.requests = rows, error, []
        self._widths = list(widths)

    def request(self, name, width=0):
        self.requests.append((name, width))
        future = concurrent.futures.Future()
        if self.error is None:
            future.set_result("compiled")
        else:
            future.set_exception(self.error)
        return future

    def ready(self, name, width=0):
        return width in self._widths

    def widths(self, name):
        return self._widths

    def compiles(self):
        return [objective_pb2.Compile(program="hvp", width=self.rows)]


def test_a_program_is_compiled_for_all_sizes():
    several = data_sources.Several([Asked(5, [1, 4, 8]), Asked(2, [1, 2, 8])])
    assert several.rows == (5, 2)
    assert several.widths("hvp") == [1, 8]
    assert [width for width in (1, 2, 4, 8) if several.ready("hvp", width)] == [1, 8]
    several.request("hvp", 16).result()
    assert [each.requests for each in several.of] == [[("hvp", 16)]] * 2
    assert several.for_rows(2) is several.of[1]
    assert [compile_.width for compile_ in several.compiles()] == [5, 2]


def test_a_compile_that_fails_for_one_size_fails_for_all():
    failing = Asked(2, error=ServiceError(Code.INVALID_ARGUMENT, "COMPILE_FAILED", "not for two rows"))
    pending = data_sources.Several([Asked(5), failing]).request("hvp", 1)
    with pytest.raises(ServiceError, match="not for two rows"):
        pending.result()
