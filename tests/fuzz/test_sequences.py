"""Messages in every order: each product gets one answer, right or an error. A store
holds the committed blobs, and nothing else.
"""

import contextlib
import hashlib
import queue
import shutil
import tempfile
from pathlib import Path

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from google.rpc import error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from hvpd.v1 import curvature_pb2, curvature_pb2_grpc
from hvpd_server.errors import ServiceError
from hvpd_server.store.store import Store

N = 6
X = np.arange(1.0, N + 1)


@pytest.fixture(scope="module")
def curvature(server):
    with grpc.insecure_channel(server.address) as channel:
        yield curvature_pb2_grpc.CurvatureServiceStub(channel)


@pytest.fixture(scope="module")
def point(client):
    """Yield a point of x -> sum(x^4) / 12, whose Hessian is diag(x^2)."""
    return client.register(lambda x: jnp.sum(x**4) / 12, X, name="fuzz/sequences").at(X)


def product(point, **changes):
    fields = {"point_id": point._id, "operator": curvature_pb2.OPERATOR_HESSIAN, "k": 1}
    return curvature_pb2.ProductSpec(**(fields | changes))


def why(error):
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in error.details)
    return info.reason


SPOILED = [
    {"k": 0},
    {"k": -1},
    {"k": 2**31 - 1},
    {"point_id": ""},
    {"point_id": "../../x"},
    {"operator": 0},
    {"operator": -7},
    {"operator": 2},
    {"block": 1},
    {"block": -1},
    {"priority": 2**31 - 1},
]


@st.composite
def plans(draw):
    """Draw one product: its spec's fault, its vectors, and the places of cuts. The sum
    of the pieces may be wrong.
    """
    k = draw(st.integers(1, 4))
    spoiled = draw(st.none() | st.sampled_from(SPOILED)) if draw(st.booleans()) else None
    V = np.array(draw(st.lists(st.floats(-1e3, 1e3), min_size=k * N, max_size=k * N))).reshape(k, N)
    raw = V.tobytes()
    last = len(raw) - 1  # Bytes after the last are another message, of no product: see `hostile`.
    wrong = draw(st.sampled_from([0, 0, 0, 0, -1, 1, -8, 8, -len(raw), 500]))
    raw = raw[:wrong] if wrong < 0 else raw + bytes(wrong)
    cuts = sorted(draw(st.lists(st.integers(0, min(last, len(raw))), max_size=4)))
    pieces = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    return spoiled or {}, V, pieces, wrong, draw(st.booleans())


@settings(settings.get_profile("fuzz-calls"))
@given(data=st.data())
def test_products_whose_messages_interleave_are_each_answered_once(curvature, point, tried, data):
    """No tag is used twice, and at most sixteen products arrive at once."""
    pipelined = data.draw(st.booleans())
    asked = data.draw(st.lists(plans(), min_size=1, max_size=8))
    waiting = {
        tag: [
            curvature_pb2.StreamProductsRequest(
                tag=tag,
                chunk=piece,
                spec=None
                if index
                else product(point, **({"k": len(V), "pipelined": pipelined, "quadratic_form": form} | spoiled)),
            )
            for index, piece in enumerate(pieces)
        ]
        for tag, (spoiled, V, pieces, _, form) in enumerate(asked)
    }
    messages = []
    while waiting:
        tag = data.draw(st.sampled_from(sorted(waiting)))
        messages.append(waiting[tag].pop(0))
        if not waiting[tag]:
            del waiting[tag]
    tried("products in pieces that interleave", len(asked))
    answers = {}
    for message in curvature.StreamProducts(iter(messages), timeout=60):
        answers.setdefault(message.tag, []).append(message)
    assert answers.keys() == set(range(len(asked)))
    for tag, (spoiled, V, _, wrong, form) in enumerate(asked):
        found = answers[tag]
        errors = [message.error for message in found if message.HasField("error")]
        if spoiled or wrong:
            assert len(found) == len(errors) == 1, (tag, found)
            assert why(errors[0]) != "INTERNAL"
            continue
        assert not errors, errors
        assert [message.HasField("info") for message in found] == [True] + [False] * (len(found) - 1)
        expected = np.einsum("kn,kn->k", V, V * X**2) if form else V * X**2
        got = np.frombuffer(b"".join(message.chunk for message in found)).reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-9)


hostile = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.none()
        | st.fixed_dictionaries({"k": st.integers(-1, 3), "pipelined": st.booleans()})
        | st.sampled_from(SPOILED),
        st.integers(0, 12).map(lambda eighths: bytes(4 * eighths)),
    ),
    max_size=20,
)


@settings(settings.get_profile("fuzz-calls"))
@given(messages=hostile, reads=st.none() | st.integers(0, 4))
def test_messages_in_any_order_end_and_harm_no_other_caller(curvature, point, tried, messages, reads):
    """Tags are used again, specs are missing or repeated, and calls are given up in the
    middle.
    """
    tried("messages of streams in any order", len(messages))
    requests = [
        curvature_pb2.StreamProductsRequest(tag=tag, chunk=chunk, spec=None if spec is None else product(point, **spec))
        for tag, spec, chunk in messages
    ]
    outgoing = queue.SimpleQueue()
    for request in requests:
        outgoing.put(request)
    if reads is None:
        outgoing.put(None)
    answers = curvature.StreamProducts(iter(outgoing.get, None), timeout=60)
    if reads is None:
        for answer in answers:
            assert answer.HasField("error") or len(answer.chunk) in (8 * N, 16 * N, 24 * N)
            assert not answer.HasField("error") or why(answer.error) != "INTERNAL"
    else:
        completes = [request for request in requests if not request.HasField("spec") and not request.tag]
        with contextlib.suppress(StopIteration):
            for _ in range(min(reads, len(completes) and 1)):
                next(answers)
        answers.cancel()
        outgoing.put(None)
    np.testing.assert_array_equal(point.hessian() @ np.ones(N), X**2)


@settings(settings.get_profile("fuzz-calls"))
@given(data=st.data())
def test_a_point_comes_from_its_x_alone(curvature, point, tried, data):
    """x comes whole or in pieces, too short, too long, with another digest, or with
    moves from nowhere.
    """
    tried("points")
    x = np.array(data.draw(st.lists(st.floats(-10, 10), min_size=N, max_size=N)))
    raw = x.tobytes()
    wrong = data.draw(st.sampled_from([0, 0, 0, -8, 8, -1, -len(raw)]))
    sent = raw[:wrong] if wrong < 0 else raw + bytes(wrong)
    digest = data.draw(st.sampled_from([hashlib.sha256(raw).hexdigest()] * 4 + ["0" * 64, "", "../" * 21 + "a"]))
    inline = data.draw(st.booleans())
    opening = curvature_pb2.CreatePointRequest(
        spec=curvature_pb2.PointSpec(objective_digest=point.objective.digest, default_data=True, x_digest=digest),
        inline_x=sent if inline else b"",
    )
    if data.draw(st.booleans()):
        opening.move.base_id = data.draw(st.sampled_from([point._id, "", "0" * 64]))
        opening.move.alpha = data.draw(st.floats())
        opening.move.direction_digest = data.draw(st.sampled_from(["", "0" * 64, hashlib.sha256(raw).hexdigest()]))
    if data.draw(st.booleans()):
        opening.pin_seconds = data.draw(st.sampled_from([0, -1, 1, -(2**31), 2**31 - 1]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=3)))
    pieces = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    messages = [
        opening,
        *([] if inline and sent else [curvature_pb2.CreatePointRequest(chunk=piece) for piece in pieces]),
    ]
    try:
        answers = list(curvature.CreatePoint(iter(messages), timeout=60))
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)  # noqa: PT017 - either may be
        return
    (made,) = [answer.point for answer in answers if answer.HasField("point")]
    assert digest == hashlib.sha256(raw).hexdigest()
    # XLA on a CPU rounds subnormal numbers to zero.
    np.testing.assert_allclose(made.value, np.sum(x**4) / 12, rtol=1e-12, atol=1e-300)
    gradient = np.frombuffer(b"".join(answer.chunk for answer in answers))
    np.testing.assert_allclose(gradient, x**3 / 3, rtol=1e-12, atol=1e-300)


CONTENTS = [bytes([letter]) * size for letter in b"ab" for size in (0, 1, 1000, 5000)]


class Uploads(RuleBasedStateMachine):
    """A store under uploads that interleave, break off and lie, and under restarts. It
    has the committed blobs.
    """

    under_way = Bundle("under_way")

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = Store(self.root / "store")
        self.stored = {}
        self.open = []

    def teardown(self):
        self._abandon_all()
        self.store.close()
        shutil.rmtree(self.root)

    def _abandon_all(self):
        for upload in self.open:
            upload["stack"].close()
        self.open.clear()

    @rule(target=under_way, content=st.sampled_from(CONTENTS), lie=st.sampled_from([0, 0, 0, 1, -1]))
    def begin(self, content, lie):
        size = max(len(content) + lie, 0)
        stack = contextlib.ExitStack()
        upload = stack.enter_context(self.store.upload(hashlib.sha256(content).hexdigest(), size))
        self.open.append({"stack": stack, "upload": upload, "content": content, "size": size, "at": 0, "good": True})
        return self.open[-1]

    @rule(
        each=under_way,
        length=st.integers(0, 3000),
        gap=st.sampled_from([0, 0, 0, 0, 1, -1]),
        other=st.sampled_from([b"", b"", b"z"]),
    )
    def append(self, each, length, gap, other):
        if each not in self.open:
            return
        piece = other or each["content"][each["at"] : each["at"] + length]
        fits = gap == 0 and each["at"] + len(piece) <= each["size"]
        try:
            each["upload"].append(each["at"] + gap, piece)
        except ServiceError as error:
            assert not fits, error  # noqa: PT017 - either may be
        else:
            assert fits
            each["good"] &= each["content"][each["at"] : each["at"] + len(piece)] == piece
            each["at"] += len(piece)

    @rule(each=under_way)
    def commit(self, each):
        if each not in self.open:
            return
        self.open.remove(each)
        good = each["good"] and each["at"] == each["size"] == len(each["content"])
        with each["stack"]:
            try:
                each["upload"].commit()
            except ServiceError:
                assert not good
            else:
                assert good
                self.stored[hashlib.sha256(each["content"]).hexdigest()] = each["content"]

    @rule(each=under_way)
    def break_off(self, each):
        if each in self.open:
            self.open.remove(each)
            each["stack"].close()

    @rule()
    def restart(self):
        """Restart as after SIGKILL, without any cleaning up."""
        self.store.close()
        for upload in self.open:
            upload["upload"]._file.close()
        self.open.clear()
        self.store = Store(self.root / "store")
        assert list((self.root / "store" / "incoming").iterdir()) == []

    @rule(content=st.sampled_from(CONTENTS), how=st.sampled_from(["empty", "other", "cut", "longer"]))
    def corrupt(self, content, how):
        digest = hashlib.sha256(content).hexdigest()
        damaged = {"empty": b"", "other": b"\0" + content[1:], "cut": content[:-1], "longer": content + b"\0"}[how]
        if digest not in self.stored or damaged == content:
            return
        (self.root / "store" / "blobs" / digest[:2] / digest).write_bytes(damaged)
        with pytest.raises(ServiceError, match="set aside"):
            self.store.read(digest)
        del self.stored[digest]

    @invariant()
    def has_what_was_committed(self):
        for content in CONTENTS:
            digest = hashlib.sha256(content).hexdigest()
            assert self.store.has(digest) == (digest in self.stored)
            if digest in self.stored:
                assert self.store.read(digest) == content
        assert len(list((self.root / "store" / "incoming").iterdir())) == len(self.open)


def test_a_store_has_exactly_the_committed_blobs(tried, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    budget = settings(settings.get_profile("fuzz-calls"), stateful_step_count=25)
    run_state_machine_as_test(Uploads, settings=budget)
    tried("lives of a store, of 25 steps", budget.max_examples)
