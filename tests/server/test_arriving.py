"""Vectors that come in pieces take memory that is counted, for as long as they are there."""

import collections
import gc

import numpy as np
import pytest

from hvpd_server._arriving import Vectors
from hvpd_server._calls import Arrivals
from hvpd_server._errors import ServiceError

F8 = np.dtype("float64")


def test_memory_is_counted_from_the_first_piece_until_the_vectors_are_gone():
    arrivals = Arrivals(100)
    first = Vectors(1, 10, F8, arrivals, "a")
    assert not first.append(bytes(8))
    second = Vectors(1, 10, F8, arrivals, "a")
    with pytest.raises(ServiceError) as error:
        second.append(bytes(8))
    assert error.value.reason == "ARRIVALS_FULL"
    assert Vectors(1, 10, F8, arrivals, "a").append(bytes(80))  # What comes whole lies where it came.
    assert first.append(bytes(72))
    with pytest.raises(ServiceError):  # It is there, and not answered.
        second.append(bytes(8))
    del first
    assert not second.append(bytes(8))


def test_what_is_refused_or_given_up_in_the_middle_is_counted_no_more():
    arrivals = Arrivals(100)
    first = Vectors(1, 10, F8, arrivals, "a")
    first.append(bytes(8))
    with pytest.raises(ServiceError, match="wrong size"):
        first.append(bytes(80))
    del first
    arrivals.take("a", 50)
    with pytest.raises(ServiceError):
        arrivals.take("a", 1)


class Collecting(collections.Counter):
    """Collects garbage where bytes are counted, as Python may at any allocation."""

    def total(self):
        gc.collect()
        return super().total()


def test_a_garbage_collection_while_bytes_are_counted_hangs_nobody(start):
    """The finalizer of vectors that only a cycle holds runs in the thread that has the lock."""
    arrivals = Arrivals(1000)
    arrivals._bytes = Collecting()
    vectors = Vectors(1, 10, np.dtype(np.float64), arrivals, "a")
    vectors.append(bytes(8))
    vectors.cycle = vectors
    assert arrivals.held() == {"a": 80}
    del vectors
    start(arrivals.take, "b", 5).result(60)
    assert arrivals.held() == {"b": 5}
