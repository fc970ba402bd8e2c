"""What the wire hands to the engine, where no answer shows it: who asks, how urgent it is, and what is kept of it."""

import weakref

import numpy as np
import pytest

from hvpd._frames import Frame
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server import _buffers
from hvpd_server._errors import Code, ServiceError
from hvpd_server._service import CurvatureService, ObjectiveService

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


# Replies about objectives


class FakeObjectives:
    """Objectives of these bundles, all visible to everybody; those that are None cannot be read."""

    def __init__(self, bundles):
        self.bundles = {f"{index:064x}": bundle for index, bundle in enumerate(bundles)}
        self.owners = self.checks = self
        self.read = 0
        self.plan = objective_pb2.GetPlanResponse()

    def listing(self, owner):
        return [("", digest, 10**18) for digest in self.bundles]

    def bundle(self, digest):
        if self.bundles[digest] is None:
            raise ServiceError(Code.DATA_LOSS, "BLOB_CORRUPT", "it is lost")
        self.read += self.bundles[digest].ByteSize()
        return objective_pb2.Bundle.FromString(self.bundles[digest].SerializeToString())

    def told(self, owner, digest):
        return "", None

    def found(self, digest, bundle, tenant):
        return objective_pb2.RegistrationCheck()

    def derivation(self, digest):
        return objective_pb2.Derivation(mode="auto")

    def choices(self, digest, owner):
        return self.plan


def sized(size_bytes, field="data"):
    """A bundle of about so many bytes, in a field that listings have, or, in x_leaves, have not."""
    bundle = objective_pb2.Bundle()
    getattr(bundle, field).add(dtype="x" * 1000)
    bundle.MergeFrom(objective_pb2.Bundle(**{field: list(getattr(bundle, field)) * (size_bytes // 1005 - 1)}))
    return bundle


MOST = 4 << 20
LISTS = {
    "small": [sized(3000)] * 250,
    "large": [sized(1 << 20)] * 11,
    "as large as can be": [sized(MOST - (70 << 10))] * 3,
    "large where it is not listed": [sized(3 << 20, "x_leaves")] * 5,
    "large and small": [sized(5000), sized(MOST - (70 << 10)), sized(5000)] * 3,
    "of an older server": [sized(5000), sized(MOST), sized(5000)],
    "lost": [None] * 120 + [sized(3000), None, sized(1 << 20), None],
}


def too_large(bundle):
    return bundle is None or (bool(bundle.data) and bundle.ByteSize() > MOST - (40 << 10))


@pytest.mark.parametrize("bundles", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("page_size", [0, 7])
def test_a_page_of_objectives_is_no_larger_than_a_message(bundles, page_size):
    engine = FakeObjectives(bundles)
    service = ObjectiveService(engine)
    token, digests, fit = "", [], [each for each in engine.bundles if not too_large(engine.bundles[each])]
    while True:
        before = engine.read
        request = objective_pb2.ListObjectivesRequest(page_size=page_size, page_token=token)
        page = service.ListObjectives(request, FakeContext())
        assert page.ByteSize() <= MOST
        assert engine.read - before <= 2 * MOST  # What a page costs the server is bounded, too.
        digests += [each.digest for each in page.objectives]
        token = page.next_page_token
        if not token:
            break
    assert digests == fit


def test_a_plan_is_no_larger_than_a_message():
    engine = FakeObjectives([])
    for width in range(300):
        engine.plan.compiles.add(program="hvp[" + "1," * 10_000 + "1]", width=width, error="e" * 10**6)
    plan = ObjectiveService(engine).GetPlan(objective_pb2.GetPlanRequest(), FakeContext())
    assert MOST // 2 < plan.ByteSize() <= MOST
    assert [each.width for each in plan.compiles] == list(range(len(plan.compiles)))
