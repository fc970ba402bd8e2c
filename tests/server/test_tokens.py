"""Tokens, their file, the command that changes it, and the gate that demands them: no
server, no network.
"""

import collections
import datetime
import importlib
import json
import logging
import os
import pkgutil
import re
import stat
from pathlib import Path

import grpc
import pytest

import hvpd.v1
from hvpd._cli import main
from hvpd._wire import protocol
from hvpd_server.engine.lane import lanes_of
from hvpd_server.errors import Code, ServiceError
from hvpd_server.liveness import Liveness
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Calls
from hvpd_server.rpc.gate import OPEN, RIGHT_OF, Gate
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.tenancy import limits as _limits
from hvpd_server.tenancy import token_file
from hvpd_server.tenancy.limits import TenantLimits
from hvpd_server.tenancy.tokens import Tokens
from tests.support.clock import Clock

NOW = datetime.datetime(2026, 11, 21, 18, 0, tzinfo=datetime.UTC)
SHA = "ab" * 32


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


def bearer(token):
    return [f"Bearer {token}"]


def refused(tokens, authorization):
    with pytest.raises(ServiceError) as error:
        tokens.find(authorization)
    assert error.value.code is Code.UNAUTHENTICATED
    return error.value.reason


# Tokens


def test_a_token_is_found_again_with_its_tenant_and_rights(path, clock):
    token, grant = token_file.create(path, "vision", ["publish", "use"], expires=NOW, weight=2.5, label="nightly")
    other, _ = token_file.create(path, "speech", ["use"])
    clock.now -= 1
    tokens = Tokens(path, clock=clock)
    assert tokens.find(bearer(token)) == grant
    assert (grant.tenant, grant.rights, grant.label) == ("vision", {"use", "publish"}, "nightly")
    assert tokens.find([f"bearer  {other} "]).tenant == "speech"
    assert (tokens.weight("vision"), tokens.weight("speech"), tokens.weight("nobody")) == (2.5, 1.0, 1.0)


def test_a_token_is_256_random_bits_and_the_file_does_not_have_it(path):
    made = {token_file.create(path, "vision", ["use"])[0] for _ in range(5)}
    assert len(made) == 5
    for token in made:
        assert re.fullmatch(r"hvpd_[A-Za-z0-9_-]{43}", token)
        assert token.removeprefix("hvpd_") not in path.read_text()


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        ([], "TOKEN_MISSING"),
        (["Bearer "], "TOKEN_MALFORMED"),
        (["Bearer"], "TOKEN_MALFORMED"),
        ([""], "TOKEN_MALFORMED"),
        (["Basic dXNlcjpwYXNz"], "TOKEN_MALFORMED"),
        (["{token}"], "TOKEN_MALFORMED"),
        (["Bearer {token}", "Bearer {token}"], "TOKEN_MALFORMED"),
        (["Bearer {token}x"], "TOKEN_UNKNOWN"),
        (["Bearer {cut}"], "TOKEN_UNKNOWN"),
        (["Bearer {sha256}"], "TOKEN_UNKNOWN"),
        (["Bearer {token} {token}"], "TOKEN_UNKNOWN"),
        (["Bearer \u00e9\u4e16\U0001f511"], "TOKEN_UNKNOWN"),
        (["Bearer \ud800"], "TOKEN_UNKNOWN"),
        ([b"Bearer \xff\xfe"], "TOKEN_UNKNOWN"),
        (["Bearer " + "A" * (1 << 20)], "TOKEN_UNKNOWN"),
    ],
)
def test_every_other_authorization_is_refused(path, authorization, reason):
    token, grant = token_file.create(path, "vision", ["use"])
    tokens = Tokens(path)
    said = [
        each.format(token=token, cut=token[:-1], sha256=grant.sha256) if isinstance(each, str) else each
        for each in authorization
    ]
    assert refused(tokens, said) == reason


def test_a_token_ends_when_it_expires(path, clock):
    token, _ = token_file.create(path, "vision", ["use"], expires=NOW)
    clock.now -= 0.001
    tokens = Tokens(path, clock=clock)
    assert tokens.find(bearer(token))
    clock.now += 0.001
    with pytest.raises(ServiceError, match=r"tenant vision was good until 2026-11-21T18:00:00Z") as error:
        tokens.find(bearer(token))
    assert error.value.reason == "TOKEN_EXPIRED"
    assert token not in str(error.value)


def test_a_new_token_is_good_at_once_and_a_revoked_one_after_the_next_look(path):
    first, grant = token_file.create(path, "vision", ["use"])
    tokens = Tokens(path)
    second, _ = token_file.create(path, "speech", ["use"])
    assert tokens.find(bearer(second)).tenant == "speech"
    assert token_file.revoke(path, grant.id) == grant
    tokens.refresh()
    assert refused(tokens, bearer(first)) == "TOKEN_UNKNOWN"
    assert tokens.find(bearer(second))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"tokens": {}}', b'{"tokens": [{}]}', b"[" * 100_000, None])
def test_a_broken_file_leaves_the_old_tokens_in_force_and_is_logged_once(path, content, caplog):
    token, _ = token_file.create(path, "vision", ["use"])
    tokens = Tokens(path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        tokens.refresh()
        tokens.refresh()
    assert tokens.find(bearer(token)).tenant == "vision"
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "stay in force" in record.getMessage()
    path.write_text('{"tokens": []}')
    tokens.refresh()
    assert refused(tokens, bearer(token)) == "TOKEN_UNKNOWN"


def entry(**changes):
    return {"sha256": SHA, "tenant": "a", "rights": ["use"]} | changes


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([entry(expire="2027-01-01T00:00:00Z")], r"token 1: unknown field 'expire'"),
        (
            [entry(), entry(sha256="cd" * 32, rights=["all"])],
            r"token 2: rights must be some of use, publish, administer, got 'all'",
        ),
        ([entry(rights=[])], "got none"),
        ([entry(rights="use")], "rights must be a list"),
        ([entry(rights=[["use"]])], "rights must be some of"),
        ([entry(sha256="AB" * 32)], "64 lower-case hexadecimal"),
        ([entry(sha256=5)], "64 lower-case hexadecimal"),
        ([entry(tenant="a/b")], "the name of a tenant must"),
        ([entry(tenant="")], "the name of a tenant must"),
        ([entry(tenant=None)], "the name of a tenant must"),
        ([entry(tenant="a" * 65)], "the name of a tenant must"),
        ([entry(expires="2027-01-01T00:00:00")], "with its offset"),
        ([entry(expires="soon")], "with its offset"),
        ([entry(expires=5)], "expires must be a date"),
        ([entry(weight=0)], "a weight must be a number"),
        ([entry(weight=float("nan"))], "a weight must be a number"),
        ([entry(weight=True)], "a weight must be a number"),
        ([entry(weight="2")], "a weight must be a number"),
        ([entry(label="a\nb")], "printable"),
        ([entry(), entry()], "twice"),
        (["token"], "expected an object"),
    ],
)
def test_an_entry_that_is_not_as_it_must_be_is_named(path, entries, says):
    path.write_text(json.dumps({"tokens": entries}))
    with pytest.raises(ValueError, match=says) as error:
        Tokens(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_an_error_at_the_start(path):
    with pytest.raises(ValueError, match=r"cannot read the tokens of .*tokens.json: No such file"):
        Tokens(path)


def test_the_weight_of_a_tenant_is_the_largest_of_its_tokens(path):
    for weight in (1.0, 3.0, 2.0):
        token_file.create(path, "vision", ["use"], weight=weight)
    assert Tokens(path).weight("vision") == 3


def test_a_file_is_never_readable_by_all(path):
    token_file.create(path, "vision", ["use"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    token_file.create(path, "vision", ["use"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [child.name for child in path.parent.iterdir()] == ["tokens.json"]


def test_a_file_behind_a_link_is_changed_where_it_is(path, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    token, _ = token_file.create(link, "vision", ["use"])
    assert link.is_symlink()
    assert Tokens(path).find(bearer(token))


def test_a_file_that_cannot_be_written_stays_as_it_was(path, monkeypatch):
    token_file.create(path, "vision", ["use"])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        token_file.create(path, "vision", ["use"])
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90d", NOW + datetime.timedelta(days=90)),
        ("30m", NOW + datetime.timedelta(minutes=30)),
        ("12h", NOW + datetime.timedelta(hours=12)),
        ("2w", NOW + datetime.timedelta(weeks=2)),
        ("2027-02-19T18:00:00+01:00", datetime.datetime(2027, 2, 19, 17, tzinfo=datetime.UTC)),
    ],
)
def test_an_expiry_is_parsed(text, expected):
    assert token_file.parse_expiry(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1.5d", "90 days", "never", "999999w", "2027-02-19"])
def test_a_malformed_expiry_is_refused(text):
    with pytest.raises(ValueError, match=r"such as 90d"):
        token_file.parse_expiry(text, NOW)


def test_weights_reach_the_queue_of_each_device(path, device, store):
    token_file.create(path, "vision", ["use"], weight=3.0)
    tokens = Tokens(path)
    limits = _limits.Limits(1 << 20, 4, max_pending=8, weights=tokens.weight)
    lanes = lanes_of([device] * 2, store, limits, Metrics(), Liveness())
    try:
        assert [lane.launches._batcher._backlog.queue._weigh("vision") for lane in lanes] == [3.0] * 3
        token_file.create(path, "vision", ["use"], weight=5.0)
        tokens.refresh()
        assert [lane.launches._batcher._backlog.queue._weigh("vision") for lane in lanes] == [5.0] * 3
    finally:
        for lane in lanes:
            lane.close()


# hvpd token


def command(capsys, *arguments):
    code = main.main(["token", *map(str, arguments)])
    return (code, *capsys.readouterr())


def test_the_command_makes_lists_and_revokes(path, capsys):
    code, out, err = command(
        capsys,
        "new",
        "--file",
        path,
        "--tenant",
        "vision",
        "--rights",
        "use,publish",
        "--expires",
        "90d",
        "--label",
        "CI",
    )
    token = out.strip()
    assert code == 0
    assert token not in err
    grant = Tokens(path).find(bearer(token))
    assert (grant.tenant, grant.rights) == ("vision", {"use", "publish"})
    lives = grant.expires - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=89, hours=23) < lives <= datetime.timedelta(days=90)
    token_file.create(path, "speech", ["use"], expires=NOW - datetime.timedelta(days=300))
    code, out, _ = command(capsys, "list", "--file", path)
    assert code == 0
    assert out.splitlines()[0].split() == ["ID", "TENANT", "RIGHTS", "EXPIRES", "WEIGHT", "LABEL"]
    assert out.splitlines()[1].split() == [
        grant.id,
        "vision",
        "use,publish",
        token_file.timestamp(grant.expires),
        "1",
        "CI",
    ]
    assert "(over)" in out.splitlines()[2]
    assert token not in out
    code, _, err = command(capsys, "revoke", "--file", path, "CI")
    assert (code, grant.id in err) == (0, True)
    assert [each.tenant for each in token_file.read(path).grants] == ["speech"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["new", "--tenant", "a/b"], "the name of a tenant must"),
        (["new", "--tenant", "a", "--rights", "use,all"], "rights must be some of use, publish, administer, got 'all'"),
        (["new", "--tenant", "a", "--expires", "soon"], "such as 90d"),
        (["new", "--tenant", "a", "--weight", "0"], "a weight must be"),
        (["new", "--tenant", "a", "--label", "a\tb"], "printable"),
        (["revoke", "nothing"], "no token is called 'nothing'"),
        (["revoke", ""], "no token is called ''"),
        (["revoke", "twice"], "2 tokens are called 'twice'"),
    ],
)
def test_a_wrong_command_explains_itself_and_changes_nothing(path, capsys, arguments, says):
    for _ in range(2):
        token_file.create(path, "a", ["use"], label="twice")
    before = path.read_bytes()
    code, out, err = command(capsys, *arguments, "--file", path)
    assert (code, out) == (1, "")
    assert says in err
    assert path.read_bytes() == before


def test_the_command_names_the_file_that_it_cannot_read_or_write(tmp_path, capsys):
    assert "No such file" in command(capsys, "list", "--file", tmp_path / "none.json")[2]
    code, _, err = command(capsys, "new", "--tenant", "a", "--file", tmp_path / "no" / "dir.json")
    assert (code, "No such file" in err) == (1, True)


# Limits


def test_a_tenant_without_limits_has_the_general_ones(path, clock):
    token_file.create(path, "vision", ["use"])
    token_file.limit(path, "*", {"vectors_per_second": 10, "stored_bytes": 5})
    token_file.limit(path, "vision", {"vectors_in_flight": 3, "stored_bytes": 50})
    tokens = Tokens(path, clock=clock)
    assert tokens.tenants() == ["vision"]
    assert tokens.limits("vision") == TenantLimits(vectors_per_second=10, vectors_in_flight=3, stored_bytes=50)
    assert tokens.limits("speech") == TenantLimits(vectors_per_second=10, stored_bytes=5)
    token_file.limit(path, "*", {"vectors_per_second": None, "device_share": 0.5})
    token_file.limit(path, "vision", {"device_share": None})
    tokens.refresh()
    assert tokens.limits("speech") == TenantLimits(device_share=0.5, stored_bytes=5)
    assert tokens.limits("vision") == TenantLimits(vectors_in_flight=3, stored_bytes=50)
    token_file.unlimit(path, "vision")
    tokens.refresh()
    assert tokens.limits("vision") == tokens.limits("speech")


def test_tokens_and_limits_of_a_file_do_not_lose_each_other(path):
    _, grant = token_file.create(path, "vision", ["use"])
    token_file.limit(path, "vision", {"stored_bytes": 5})
    token_file.create(path, "speech", ["use"])
    token_file.revoke(path, grant.id)
    found = token_file.read(path)
    assert [each.tenant for each in found.grants] == ["speech"]
    assert found.limits == {"vision": {"stored_bytes": 5}}


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ([], 'expected {"tokens": [...]}'),
        ({"a/b": {}}, "limits of 'a/b': the name of a tenant must"),
        ({"a": {"rate": 1}}, "limits of 'a': unknown limit 'rate'"),
        ({"a": {"vectors_per_second": -1}}, "vectors_per_second must be a number above 0"),
    ],
)
def test_a_file_with_wrong_limits_is_refused(path, limits, says):
    path.write_text(json.dumps({"tokens": [], "limits": limits}))
    with pytest.raises(ValueError, match="cannot be used") as error:
        token_file.read(path)
    assert says in str(error.value)


def test_the_command_sets_lists_and_removes_limits(path, capsys):
    token_file.create(path, "vision", ["use"])

    def limit(*arguments):
        code = main.main(["limit", *map(str, arguments), "--file", str(path)])
        return code, *capsys.readouterr()

    assert limit("set", "vision", "--resident-bytes", "4G", "--vectors-per-second", 2.5) == (0, "", "")
    assert limit("set", "vision", "--vectors-per-second", "none", "--vectors-in-flight", 7) == (0, "", "")
    said = {"resident_bytes": 4 << 30, "vectors_per_second": None, "vectors_in_flight": 7}
    assert token_file.read(path).limits == {"vision": said}
    code, out, _ = limit("list")
    assert code == 0
    assert out.splitlines()[1].split() == ["vision", "none", "7", "-", "4294967296", "-", "-", "-"]
    assert limit("remove", "vision")[0] == 0
    assert limit("remove", "vision")[0] == 1
    code, _, err = limit("set", "vision")
    assert (code, "give at least one limit of 'vision'" in err) == (1, True)
    code, _, err = limit("set", "a/b", "--stored-bytes", "1K")
    assert (code, "the name of a tenant must" in err) == (1, True)
    before = path.read_bytes()
    code, _, err = limit("set", "vision", "--device-share", "-1")
    assert (code, "device_share must be a number above 0" in err) == (1, True)
    assert path.read_bytes() == before


def test_a_token_file_that_is_no_plain_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="it must be a plain file of at most 16777216 bytes"):
            token_file.read(Path(path))


# The gate

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
    assert gate.intercept_service(lambda details: handler, details).unary_unary(1, context) is context


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
def test_the_gate_keeps_the_kind_of_each_call(gate, tokens, make):
    handler = make(lambda request, call: (list(request), call.tenant), len, repr)
    details = Details("/hvpd.v1.ObjectiveService/GetPlan", [("authorization", f"Bearer {tokens[0]['use']}")])
    found = gate.intercept_service(lambda details: handler, details)
    assert (found.request_streaming, found.response_streaming) == (
        handler.request_streaming,
        handler.response_streaming,
    )
    assert (found.request_deserializer, found.response_serializer) == (len, repr)
    behaviour = found.stream_stream or found.stream_unary or found.unary_stream or found.unary_unary
    assert behaviour([1, 2], GrpcCall(FakeContext())) == ([1, 2], "has-use")


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
