"""What the wire hands to the engine, where no answer shows it: who asks, and how urgent it is."""

import numpy as np
import pytest

from hvpd._frames import Frame
from hvpd.v1 import curvature_pb2
from hvpd_server._service import CurvatureService

N = 3


class FakeObjective:
    digest = "d" * 64
    sizes = (N,)
    dtype = np.dtype("float64")

    class bundle:  # noqa: N801 - a field of the real one
        dtype = "float64"


class FakePoint:
    objective = FakeObjective()


class FakeEngine:
    """Multiplies by one, and notes for whom."""

    def __init__(self):
        self.asked = []

    def resident(self, spec, tenant):
        return FakePoint()

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
    answers = list(service.StreamProducts(iter(requests), context))
    assert [bytes(answer.chunk) for answer in answers] == [vector] * 3
    assert engine.asked == [("ipv4:10.0.0.1:5000", priority) for priority in (0, 7, -100)]
    assert context.peers == 1


def test_so_does_a_product_of_one_message(service, engine):
    request = curvature_pb2.ComputeProductRequest(spec=spec(3), vectors=np.ones(N).tobytes())
    service.ComputeProduct(request, FakeContext())
    assert engine.asked == [("ipv4:10.0.0.1:5000", 3)]
