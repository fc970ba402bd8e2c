"""The gate lets calls in by their tokens' rights, without a server or a network."""

import collections
import datetime
import importlib
import json
import logging
import pkgutil
import re

import grpc
import pytest

import hvpd.v1
from hvpd._wire import protocol
from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Calls
from hvpd_server.rpc.gate import OPEN, RIGHT_OF, Gate
from hvpd_server.tenancy import token_file
from hvpd_server.tenancy.tokens import Tokens
from tests.support.clock import Clock

NOW = datetime.datetime(2026, 11, 21, 18, 0, tzinfo=datetime.UTC)


def methods():
    """Return every method of every service of the protocol, from its descriptors."""
    for module in pkgutil.iter_modules(hvpd.v1.__path__, "hvpd.v1."):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(module.name).DESCRIPTOR
            for service in file.services_by_name.values():
                for method in service.methods:
                    yield f"/{service.full_name}/{method.name}"


METHODS = sorted(methods())


@pytest.fixture
def clock():
    return Clock(NOW.timestamp())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.json"


Details = collections.namedtuple("Details", ["method", "invocation_metadata"])


class AbortedError(Exception):
    pass


class FakeContext:
    def __init__(self):
        self.cancelled = False
        self.callbacks = []
        self.status = None

    def peer(self):
        return "ipv4:10.0.0.1:5000"

    def abort_with_status(self, status):
        self.status = status
        raise AbortedError

    def add_callback(self, callback):
        self.callbacks.append(callback)
        return True

    def cancel(self):
        self.cancelled = True

    def time_remaining(self):
        return float("inf")


def passed(messages, call):
    return [call.tenant, list(messages)]


STREAM = grpc.stream_stream_rpc_method_handler(passed)


UNARY = grpc.unary_unary_rpc_method_handler(lambda request, call: [call.tenant, request])


@pytest.fixture
def tokens(path, clock):
    """Yield a token for each right, and the object that knows them."""
    made = {right: token_file.create(path, f"has-{right}", [right], label=right)[0] for right in token_file.RIGHTS}
    return made, Tokens(path, clock=clock)


@pytest.fixture
def gate(tokens):
    opened = Gate(tokens[1])
    opened.open = True
    return opened


def ask(gate, method, token=None, *, handler=STREAM, request=(), context=None, **metadata):
    """Return a call's answer, or the status code with which it ends."""
    pairs = list(metadata.items()) + ([("authorization", f"Bearer {token}")] if token is not None else [])
    found = gate.intercept_service(lambda details: handler, Details(method, pairs))
    context = context or FakeContext()
    if not handler.request_streaming and found.request_streaming:
        request = iter([request])
    behaviour = found.stream_stream or found.stream_unary or found.unary_stream or found.unary_unary
    try:
        return behaviour(request, GrpcCall(context, method=method.rpartition("/")[2]))
    except AbortedError:
        return context.status.code


def test_every_method_of_the_protocol_has_its_right():
    """A new method must state its right here; until then it needs `administer`."""
    assert len(METHODS) > 10
    assert set(METHODS) == set(RIGHT_OF) | {method for method in OPEN if method.startswith("/hvpd.")}
    assert not set(RIGHT_OF) & OPEN
    assert set(RIGHT_OF.values()) <= set(token_file.RIGHTS)


@pytest.mark.parametrize("method", [*METHODS, "/hvpd.v1.NewService/NewMethod", "/hvpd.v2.BlobService/UploadBlob"])
def test_each_method_needs_its_own_right(gate, tokens, method):
    if method in OPEN:
        assert ask(gate, method, None)[1] == []
        return
    needed = RIGHT_OF.get(method, "administer")
    assert ask(gate, method) is Code.UNAUTHENTICATED
    assert ask(gate, method, "wrong") is Code.UNAUTHENTICATED
    for right, token in tokens[0].items():
        expected = [f"has-{right}", []] if right == needed else Code.PERMISSION_DENIED
        assert ask(gate, method, token) == expected


def test_reflection_and_watching_health_take_any_token(gate, tokens):
    for method in ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Watch"):
        assert ask(gate, method) is Code.UNAUTHENTICATED
        for right, token in tokens[0].items():
            assert ask(gate, method, token) == [f"has-{right}", []]
    for method in ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"):
        assert ask(gate, method, handler=UNARY, request=1)[1] == 1


def test_services_of_others_get_grpcs_own_context(gate, tokens):
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: context)
    details = Details("/grpc.health.v1.Health/Watch", [("authorization", f"Bearer {tokens[0]['use']}")])
    context = FakeContext()
    assert gate.intercept_service(lambda details: handler, details).stream_unary(iter([1]), context) is context


def test_a_refusal_names_the_right_and_the_tenant_and_no_token(gate, tokens):
    context = FakeContext()
    token = tokens[0]["use"]
    assert ask(gate, "/hvpd.v1.BlobService/UploadBlob", token, context=context) is Code.PERMISSION_DENIED
    assert re.search(r"UploadBlob takes the right 'publish'.*tenant has-use has use", context.status.details)
    assert token not in str(context.status)


def test_an_unknown_method_is_unknown_to_all_callers(gate):
    """Unknown names of methods are refused, and make no series of metrics."""
    assert gate.intercept_service(lambda details: None, Details("/hvpd.v1.BlobService/Nothing", ())) is None


def test_the_gate_checks_the_protocol_then_the_token_then_readiness(gate, tokens):
    gate.open = False
    method, use = "/hvpd.v1.ObjectiveService/GetObjective", tokens[0]["use"]
    assert ask(gate, method, "wrong") is Code.UNAUTHENTICATED
    assert ask(gate, method, use) is Code.UNAVAILABLE
    assert ask(gate, method, "wrong", **{protocol.REVISION_KEY: "999"}) is Code.FAILED_PRECONDITION


def test_without_tokens_all_calls_are_allowed_and_a_tenant_is_a_connection():
    gate = Gate()
    gate.open = True
    for method in [*METHODS, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]:
        assert ask(gate, method, "whatever") == ["ipv4:10.0.0.1:5000", []]
        assert gate.intercept_service(lambda details: STREAM, Details(method, ())) is STREAM
    gate.sweep()


@pytest.mark.parametrize(
    "make",
    [
        grpc.unary_unary_rpc_method_handler,
        grpc.unary_stream_rpc_method_handler,
        grpc.stream_unary_rpc_method_handler,
        grpc.stream_stream_rpc_method_handler,
    ],
)
def test_the_gate_keeps_the_answers_of_each_call(gate, tokens, make):
    handler = make(lambda request, call: (list(request), call.tenant), list, repr)
    details = Details("/hvpd.v1.ObjectiveService/GetPlan", [("authorization", f"Bearer {tokens[0]['use']}")])
    found = gate.intercept_service(lambda details: handler, details)
    assert found.request_streaming
    assert found.response_streaming == handler.response_streaming
    assert found.request_deserializer is (list if handler.request_streaming else None)
    assert found.response_serializer is repr
    given = [1, 2] if handler.request_streaming else [(1, 2)]
    assert (found.stream_stream or found.stream_unary)(iter(given), GrpcCall(FakeContext())) == ([1, 2], "has-use")


STREAM_PRODUCTS = "/hvpd.v1.CurvatureService/StreamProducts"


def stream(gate, token, context):
    """Return an open stream: a function that gives it a message."""
    arriving = collections.deque()
    handler = grpc.stream_stream_rpc_method_handler(lambda messages, context: messages)
    messages = ask(gate, STREAM_PRODUCTS, token, handler=handler, request=iter(arriving.popleft, None), context=context)

    def give(message):
        arriving.append(message)
        return next(messages)

    return give


def test_a_stream_takes_no_more_messages_of_a_token_that_expired(path, clock):
    token, _ = token_file.create(path, "vision", ["use"], expires=NOW + datetime.timedelta(seconds=10))
    gate, context = Gate(Tokens(path, clock=clock)), FakeContext()
    gate.open = True
    give = stream(gate, token, context)
    assert give(1) == 1
    gate.sweep()
    assert not context.cancelled
    clock.now += 10
    with pytest.raises(ServiceError, match="was good until") as error:
        give(2)
    assert error.value.reason == "TOKEN_EXPIRED"
    gate.sweep()
    assert context.cancelled


def change(path, change):
    document = json.loads(path.read_text())
    for each in document["tokens"]:
        change(each)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda path: token_file.revoke(path, "use"), "TOKEN_UNKNOWN"),
        (lambda path: change(path, lambda each: each.update(rights=["publish"])), "RIGHT_MISSING"),
        (lambda path: change(path, lambda each: each.update(tenant="other")), "TOKEN_UNKNOWN"),
    ],
)
def test_an_idle_stream_ends_when_its_token_loses_the_right(gate, tokens, path, changed, reason):
    contexts = [FakeContext() for _ in range(3)]
    gives = [stream(gate, tokens[0]["use"], context) for context in contexts]
    contexts[2].callbacks[0]()  # This stream ended by itself.
    gate.sweep()
    changed(path)
    gate.sweep()
    assert [context.cancelled for context in contexts] == [True, True, False]
    with pytest.raises(ServiceError) as error:
        gives[0]("more")
    assert error.value.reason == reason


def test_a_change_of_other_tokens_leaves_a_stream_open(gate, tokens, path):
    context = FakeContext()
    give = stream(gate, tokens[0]["use"], context)
    token_file.create(path, "new", ["use"])
    token_file.revoke(path, "publish")
    gate.sweep()
    assert give(1) == 1
    assert not context.cancelled


def test_a_call_of_one_message_is_finished_although_its_token_is_revoked(gate, tokens, path):
    context, method = FakeContext(), "/hvpd.v1.CurvatureService/ComputeProduct"

    def answer(request, context):
        token_file.revoke(path, "use")
        gate.sweep()
        return request

    handler = grpc.unary_unary_rpc_method_handler(answer)
    assert ask(gate, method, tokens[0]["use"], handler=handler, request="answer", context=context) == "answer"
    assert not context.cancelled
    assert ask(gate, method, tokens[0]["use"], handler=UNARY) is Code.UNAUTHENTICATED


def test_a_refusal_is_logged_without_the_token_that_was_tried(tokens, caplog):
    gate = Gate(tokens[1])
    with caplog.at_level(logging.WARNING):
        assert ask(gate, METHODS[0], "guess") is Code.UNAUTHENTICATED
    (record,) = caplog.records
    assert record.fields["peer"] == "ipv4:10.0.0.1:5000"
    assert (record.fields["code"], record.fields["reason"]) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
    assert record.fields["method"] == METHODS[0].rpartition("/")[2]
    assert "guess" not in str(vars(record))


def test_a_tenant_has_half_of_the_calls_and_a_call_counts_until_it_ends(tokens):
    made, known = tokens
    gate = Gate(known, Calls(2))
    gate.open = True
    method = "/hvpd.v1.CurvatureService/StreamProducts"
    first = FakeContext()
    assert ask(gate, method, made["use"], context=first) == ["has-use", []]
    assert ask(gate, method, made["use"]) == grpc.StatusCode.RESOURCE_EXHAUSTED
    for method in OPEN:
        assert ask(gate, method, handler=UNARY) is not grpc.StatusCode.RESOURCE_EXHAUSTED
    for callback in first.callbacks:
        callback()
    assert ask(gate, "/hvpd.v1.CurvatureService/StreamProducts", made["use"]) == ["has-use", []]
