"""The memory of vectors and of their products is counted from the first byte until the
product ends.
"""

import gc

import numpy as np
import pytest

from hvpd._wire import frames as _frames
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server.errors import ServiceError
from hvpd_server.rpc.call_limits import Arrivals
from hvpd_server.rpc.incoming import Arriving, Vectors

F8 = np.dtype("float64")


@pytest.mark.parametrize("pieces", [1, 2, 10])
def test_memory_is_counted_from_the_first_piece_until_the_product_ends(pieces):
    """Each vector counts twice, because the product has as many bytes."""
    arrivals = Arrivals(320)
    first, second = (Vectors(1, 10, F8, arrivals, "a") for _ in range(2))
    assert arrivals.held() == {}
    for piece in range(pieces):
        assert first.append(bytes(80 // pieces)) == (piece == pieces - 1)
        assert arrivals.held() == {"a": 160}
        with pytest.raises(ServiceError) as error:
            second.append(bytes(8))
        assert error.value.reason == "ARRIVALS_FULL"
        assert error.value.retry_after > 0
    first.release()
    assert not second.append(bytes(8))
    second.release()
    assert arrivals.held() == {}


def test_vectors_that_come_at_once_are_counted():
    arrivals = Arrivals(320)
    first = Vectors(1, 10, F8, arrivals, "a")
    assert len(first.room(80)) == 80
    assert arrivals.held() == {"a": 160}
    with pytest.raises(ServiceError) as error:
        Vectors(1, 10, F8, arrivals, "a").room(80)
    assert error.value.reason == "ARRIVALS_FULL"
    first.release()
    first.release()
    assert arrivals.held() == {}


def test_the_memory_goes_with_the_release_and_not_with_the_object():
    vectors = Vectors(1, 10, F8, Arrivals(320), "a")
    vectors.append(bytes(8))
    vectors.release()
    assert vectors._buffer is None


# On a stream


class Objective:
    dtype = F8
    bundle = objective_pb2.Bundle(dtype="float64")

    def columns(self, program):
        return 10


class Point:
    objective = Objective()


class Engine:
    def resident(self, spec, owner):
        return Point()


@pytest.fixture
def arrivals():
    return Arrivals(1 << 20)


@pytest.fixture
def arriving(arrivals):
    return Arriving(Engine(), "owner", "tenant", arrivals)


SPEC = curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1)


def opening(tag, **fields):
    return curvature_pb2.StreamProductsRequest(tag=tag, spec=SPEC, **fields)


def held(arrivals):
    return arrivals.held().get("tenant", 0)


def test_a_product_refused_in_the_middle_is_counted_no_more(arriving, arrivals):
    assert arriving.take(opening(1), bytes(8)) is None
    assert held(arrivals) >= 160
    with pytest.raises(ServiceError, match="wrong size"):
        arriving.take(curvature_pb2.StreamProductsRequest(tag=1), bytes(80))
    assert held(arrivals) == 0
    assert (
        arriving.take(curvature_pb2.StreamProductsRequest(tag=1), bytes(8)) is None
    )  # It was on its way when the product was refused.
    assert held(arrivals) == 0


def test_a_product_whose_tag_is_used_again_is_counted_no_more(arriving, arrivals):
    arriving.take(opening(1), bytes(8))
    with pytest.raises(ServiceError, match="in use"):
        arriving.take(opening(1), bytes(8))
    assert held(arrivals) == 0


def test_products_that_come_no_further_are_counted_no_more(arriving, arrivals):
    for tag in range(3):
        arriving.take(opening(tag), bytes(8))
    whole = arriving.take(opening(3), bytes(80))
    assert held(arrivals) >= 4 * 160
    arriving.close()
    assert 160 <= held(arrivals) < 320
    whole.vectors.release()
    assert held(arrivals) == 0


def test_all_bytes_of_a_message_count(arriving, arrivals):
    """A vector keeps its message alive, and a spec keeps its unknown fields."""
    frames = _frames.codec(curvature_pb2.StreamProductsRequest)
    junk = b"\x7a" + bytes([0x80 | (100_000 & 0x7F), 0x80 | (100_000 >> 7 & 0x7F), 100_000 >> 14]) + bytes(100_000)
    message, chunk = frames.read(junk + frames.write(Frame(opening(1), bytes(80))))
    product = arriving.take(message, chunk)
    assert held(arrivals) >= 200_160
    product.vectors.release()
    message, chunk = frames.read(frames.write(Frame(opening(1), bytes(80))) + junk)  # No client writes it so.
    product = arriving.take(message, chunk)
    assert held(arrivals) >= 200_160
    product.vectors.release()
    assert held(arrivals) == 0


# Finalizers


class Collecting(dict):
    """Collects garbage while bytes are counted, as Python may at any allocation."""

    def get(self, *arguments):
        gc.collect()
        return super().get(*arguments)


def test_a_garbage_collection_while_bytes_are_counted_does_not_hang(start):
    """The collection closes a generator that only a cycle holds, in the thread that has
    the lock. The generator gives its bytes back.
    """
    arrivals = Arrivals(1000)

    def answer(cycle):
        vectors = Vectors(1, 10, F8, arrivals, "a")
        vectors.append(bytes(8))
        try:
            with arrivals.holding("a", 8):
                yield cycle
        finally:
            vectors.release()

    cycle = []
    cycle.append(answer(cycle))
    next(cycle[0])
    assert arrivals.held() == {"a": 168}
    arrivals._bytes = Collecting(arrivals._bytes)
    del cycle
    start(arrivals.take, "b", 5).result(20)
    assert arrivals.held() == {"b": 5}


def test_vectors_have_no_finalizer():
    """A finalizer would run in any thread, with any lock held."""
    assert not hasattr(Vectors, "__del__")
