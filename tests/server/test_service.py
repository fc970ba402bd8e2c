"""What the wire hands to the engine, where no answer shows it: who asks, how urgent it is, and what is kept of it."""

import weakref

import numpy as np
import pytest

from hvpd._frames import Frame
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server import _buffers
from hvpd_server._service import CurvatureService

N = 3


class FakeObjective:
    digest = "d" * 64
    dtype = np.dtype("float64")
    bundle = objective_pb2.Bundle(dtype="float64")

    def columns(self, program):
        return N


class FakePoint:
    objective = FakeObjective()


class FakeEngine:
    """Multiplies by one, and notes for whom."""

    def __init__(self):
        self.asked = []

    def resident(self, spec, tenant):
        return FakePoint()

    def settle(self):
        pass

    def multiply(self, point, program, vectors, **settings):
        self.asked.append((settings["tenant"], settings["priority"]))
        return vectors, curvature_pb2.ProductInfo()


class FakeContext:
    """A call over a connection."""

    def __init__(self):
        self.peers = 0

    def peer(self):
        self.peers += 1
        return "ipv4:10.0.0.1:5000"

    def time_remaining(self):
        return float("inf")

    def add_callback(self, callback):
        return True


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def service(engine):
    return CurvatureService(engine, max_streams=4)


def spec(priority):
    return curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1, priority=priority)


def test_a_stream_asks_for_its_connection_which_is_the_tenant(service, engine):
    vector = np.ones(N).tobytes()
    requests = [
        Frame(curvature_pb2.StreamProductsRequest(tag=tag, spec=spec(priority)), vector)
        for tag, priority in enumerate([0, 7, -100])
    ]
    context = FakeContext()
    answers = [bytes(answer.chunk) for answer in service.StreamProducts(iter(requests), context)]
    assert answers == [vector] * 3
    assert engine.asked == [("ipv4:10.0.0.1:5000", priority) for priority in (0, 7, -100)]
    assert context.peers == 1


def test_so_does_a_product_of_one_message(service, engine):
    request = curvature_pb2.ComputeProductRequest(spec=spec(3), vectors=np.ones(N).tobytes())
    service.ComputeProduct(request, FakeContext())
    assert engine.asked == [("ipv4:10.0.0.1:5000", 3)]


class Job:
    """What a queue holds on to for whoever might cancel it."""

    def cancel(self):
        pass


def test_nothing_of_a_product_is_kept_when_it_is_answered(service, engine, monkeypatch):
    """A large one would take its memory a second time while the next one comes."""
    made, alive = [], []
    empty = _buffers.empty

    def tracked(shape, dtype):
        array = empty(shape, dtype)
        made.append(weakref.ref(array))
        return array

    def multiply(point, program, vectors, *, on_queue, **settings):
        job, product = Job(), vectors.copy()
        made.extend(map(weakref.ref, (job, product)))
        on_queue(job.cancel)
        return product, curvature_pb2.ProductInfo()

    def requests():
        for tag in range(3):
            vector = np.full(N, float(tag)).tobytes()
            yield Frame(curvature_pb2.StreamProductsRequest(tag=tag, spec=spec(0)), vector[:8])
            yield Frame(curvature_pb2.StreamProductsRequest(tag=tag), vector[8:])
            alive.append([reference() for reference in made if reference() is not None])

    monkeypatch.setattr(_buffers, "empty", tracked)
    monkeypatch.setattr(engine, "multiply", multiply)
    assert sum(1 for _ in service.StreamProducts(requests(), FakeContext())) == 3
    assert len(made) == 9
    assert alive == [[], [], []]
