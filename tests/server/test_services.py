"""The services hand tenant and priority to the engine, keep no vectors, and bound their
replies.
"""

import hashlib
import weakref

import numpy as np
import pytest

import hvpd_server.bundle
from hvpd._wire import codec
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.curvature import CurvatureService
from hvpd_server.rpc.objectives import ObjectiveService
from hvpd_server.rpc.streams import Streams
from hvpd_server.scheduling import blocks

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
    """An engine that multiplies by one, and notes the tenant."""

    def __init__(self):
        self.asked = []

    def resident(self, spec, tenant):
        return FakePoint()

    def record_deferred(self):
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

    def cancel(self):
        pass


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def service(engine):
    return CurvatureService(engine, Streams(4))


def spec(priority):
    return curvature_pb2.ProductSpec(operator=curvature_pb2.OPERATOR_HESSIAN, k=1, priority=priority)


def test_without_tokens_the_tenant_of_a_stream_is_its_connection(service, engine):
    vector = np.ones(N).tobytes()
    requests = [
        Frame(curvature_pb2.StreamProductsRequest(tag=tag, spec=spec(priority)), vector)
        for tag, priority in enumerate([0, 7, -100])
    ]
    context = FakeContext()
    answers = [bytes(answer.chunk) for answer in service.StreamProducts(iter(requests), GrpcCall(context))]
    assert answers == [vector] * 3
    assert engine.asked == [("ipv4:10.0.0.1:5000", priority) for priority in (0, 7, -100)]
    assert context.peers == 1


def test_without_tokens_the_tenant_of_a_product_is_its_connection(service, engine):
    request = curvature_pb2.ComputeProductRequest(spec=spec(3), vectors=np.ones(N).tobytes())
    service.ComputeProduct(request, GrpcCall(FakeContext()))
    assert engine.asked == [("ipv4:10.0.0.1:5000", 3)]


class Job:
    """A job in the queue, which can be cancelled."""

    def cancel(self):
        pass


def test_nothing_of_a_product_is_kept_when_it_is_answered(service, engine, monkeypatch):
    """Otherwise a large product would hold its memory while the next one comes."""
    made, alive = [], []
    empty = blocks.empty

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

    monkeypatch.setattr(blocks, "empty", tracked)
    monkeypatch.setattr(engine, "multiply", multiply)
    assert sum(1 for _ in service.StreamProducts(requests(), GrpcCall(FakeContext()))) == 3
    assert len(made) == 9
    assert alive == [[], [], []]


# Work that a request does once


def counted(monkeypatch, place, name):
    """Replace a function by one that notes the arguments of its calls; return them."""
    calls, function = [], getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **settings: calls.append(args) or function(*args, **settings))
    return calls


def spec_of(example, x):
    digest = hashlib.sha256(x.tobytes()).hexdigest()
    return curvature_pb2.PointSpec(objective_digest=example.export.digest, x_digest=digest, default_data=True)


def create_point(engine, *messages):
    found = list(CurvatureService(engine, Streams(4)).CreatePoint(iter(messages), GrpcCall(FakeContext())))
    return next(each.message for each in found if each.message.HasField("point")), found


def test_a_point_is_located_once_and_its_x_is_hashed_once(open_engine, rosen, monkeypatch):
    engine = open_engine(rosen)
    located = counted(monkeypatch, engine, "locate")
    hashed = counted(monkeypatch, codec, "digest")

    def hashes(x):
        return sum(bytes(payload) == x.tobytes() for (payload,) in hashed)

    inline = curvature_pb2.CreatePointRequest(spec=spec_of(rosen, rosen.x), inline_x=rosen.x.tobytes())
    base, _ = create_point(engine, Frame(inline))
    assert (len(located), hashes(rosen.x)) == (1, 1)

    direction = np.ones_like(rosen.x)
    digest = hashlib.sha256(direction.tobytes()).hexdigest()
    move = curvature_pb2.Move(base_id=base.point.id, direction_digest=digest, alpha=0.5)
    step = rosen.x + 0.5 * direction
    moved = curvature_pb2.CreatePointRequest(spec=spec_of(rosen, step), move=move)
    rest = Frame(curvature_pb2.CreatePointRequest(), direction.tobytes())
    _, answers = create_point(engine, Frame(moved), rest)
    assert answers[0].message.direction_wanted
    assert (len(located), hashes(step), hashes(direction)) == (2, 1, 1)


def test_a_step_that_the_client_rounded_otherwise_is_asked_for(open_engine, rosen):
    engine = open_engine(rosen)
    point = engine.create_point(engine.locate(spec_of(rosen, rosen.x)), rosen.x)
    direction, x = np.ones_like(rosen.x), rosen.x + 0.25
    digest = hashlib.sha256(direction.tobytes()).hexdigest()
    move = curvature_pb2.Move(base_id=point.id, direction_digest=digest, alpha=0.5)
    messages = [curvature_pb2.CreatePointRequest(spec=spec_of(rosen, x), move=move)]
    rest = [direction.tobytes(), x.tobytes()]
    frames = [*map(Frame, messages), *(Frame(curvature_pb2.CreatePointRequest(), chunk) for chunk in rest)]
    _, answers = create_point(engine, *frames)
    wanted = [(each.message.direction_wanted, each.message.x_wanted) for each in answers[:2]]
    assert wanted == [(True, False), (False, True)]


def test_a_registration_parses_its_bundle_once(open_engine, rosen, upload, monkeypatch):
    engine = open_engine()
    for content in rosen.export.blobs.values():
        upload(engine.store, content)
    parsed = counted(monkeypatch, hvpd_server.bundle, "parse")
    request = objective_pb2.CreateObjectiveRequest(digest=rosen.export.digest, name="rosen")
    found = ObjectiveService(engine).CreateObjective(request, GrpcCall(FakeContext())).objective
    assert (found.name, found.digest, found.bundle) == ("rosen", rosen.export.digest, rosen.bundle)
    assert len(parsed) == 1


# Replies about objectives


class FakeObjectives:
    """Objectives with given bundles, visible to every tenant. A bundle of None cannot
    be read.
    """

    def __init__(self, bundles):
        self.bundles = {f"{index:064x}": bundle for index, bundle in enumerate(bundles)}
        self.owners = self.checks = self.objectives = self
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
    """Return a bundle of about a size. Listings have the field `data`, and not
    `x_leaves`.
    """
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
        page = service.ListObjectives(request, GrpcCall(FakeContext()))
        assert page.ByteSize() <= MOST
        assert engine.read - before <= 2 * MOST  # The cost of a page is bounded, too.
        digests += [each.digest for each in page.objectives]
        token = page.next_page_token
        if not token:
            break
    assert digests == fit


def test_a_plan_is_no_larger_than_a_message():
    engine = FakeObjectives([])
    for width in range(300):
        engine.plan.compiles.add(program="hvp[" + "1," * 10_000 + "1]", width=width, error="e" * 10**6)
    plan = ObjectiveService(engine).GetPlan(objective_pb2.GetPlanRequest(), GrpcCall(FakeContext()))
    assert MOST // 2 < plan.ByteSize() <= MOST
    assert [each.width for each in plan.compiles] == list(range(len(plan.compiles)))
