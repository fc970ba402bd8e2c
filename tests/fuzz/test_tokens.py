"""Any text as a token, and any text as a file of tokens."""

import dataclasses
import datetime
import hashlib
import json

import grpc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvpd.v1 import objective_pb2, objective_pb2_grpc
from hvpd_server.errors import Code, ServiceError
from hvpd_server.tenancy import token_file
from hvpd_server.tenancy.limits import TenantLimits
from hvpd_server.tenancy.tokens import Tokens

NOON = datetime.datetime(2027, 1, 1, 12, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Yield the file's path, and a token in it that ends at noon."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    token, _ = token_file.create(path, "vision", ["use"], expires=NOON)
    return path, token


HEADERS = st.one_of(
    st.text(max_size=100),
    st.binary(max_size=100),
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["Bearer", "bearer", "BEARER", "Basic", ""]),
        st.text(" \t", max_size=2),
        st.text(),
    ),
)


def message_of(tokens, said):
    with pytest.raises(ServiceError) as error:
        tokens.find(said)
    return str(error.value)


@settings(settings.get_profile("fuzz"))
@given(said=st.lists(HEADERS, max_size=3))
@example(said=["Bearer \ud800"])
@example(said=["Bearer"])
@example(said=[b"Bearer \xff"])
def test_nothing_else_is_a_token(known, tried, said):
    path, token = known
    tokens = Tokens(path, clock=lambda: NOON.timestamp() - 1)
    tried("authorizations")
    with pytest.raises(ServiceError) as error:
        tokens.find(said)
    assert error.value.code is Code.UNAUTHENTICATED
    # Hypothesis also tries pieces of the message itself, which it finds in the source.
    usual = [message_of(tokens, headers) for headers in ([], ["Basic"], ["Bearer"], ["Bearer x"])]
    told = [text for text in said if len(text) > 10 and not any(str(text) in message for message in usual)]
    assert not any(str(text) in str(error.value) for text in told)
    assert tokens.find([f"Bearer {token}"]).tenant == "vision"


@settings(settings.get_profile("fuzz"))
@given(
    where=st.integers(0, 47),
    to=st.characters(min_codepoint=33, max_codepoint=126),
    how=st.sampled_from(["set", "cut", "put"]),
)
def test_no_token_near_a_token_is_one(known, tried, where, to, how):
    path, token = known
    where = min(where, len(token) - 1)
    other = token[:where] + {"set": to, "cut": "", "put": to + token[where]}[how] + token[where + 1 :]
    tried("tokens that are nearly right")
    tokens = Tokens(path, clock=lambda: NOON.timestamp() - 1)
    if other == token:
        return
    with pytest.raises(ServiceError):
        tokens.find([f"Bearer {other}"])


@settings(settings.get_profile("fuzz"))
@given(seconds=st.floats(-1e9, 1e9) | st.sampled_from([0.0, -1e-6, 1e-6, -0.5]))
def test_a_token_is_good_before_it_ends_and_never_after(known, tried, seconds):
    """This holds for any time on the clock, and any jump to it."""
    path, token = known
    now = NOON.timestamp() + seconds
    tokens = Tokens(path, clock=lambda: now)
    tried("moments around the end of a token")
    if now < NOON.timestamp():
        assert tokens.find([f"Bearer {token}"]).tenant == "vision"
    else:
        with pytest.raises(ServiceError, match="was good until"):
            tokens.find([f"Bearer {token}"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
VALUES = {
    "sha256": st.sampled_from(["0" * 64, "f" * 64, "F" * 64, "0" * 63, "", "0" * 64 + "\n"]),
    "tenant": st.sampled_from(["vision", "a" * 64, "a" * 65, "../x", "", ".x", "a/b", "a\n"]),
    "rights": st.lists(st.sampled_from(["use", "publish", "administer", "USE", "all"]), max_size=3),
    "expires": st.sampled_from(
        [
            "2027-02-19T17:00:00Z",
            "2027-02-19",
            "9999-12-31T23:59:59-14:00",
            "0001-01-01T00:00:00+14:00",
            "2027-02-30T00:00:00Z",
            "x",
        ]
    ),
    "weight": st.sampled_from([1, 0.5, 0, -1, 1e6, 1e7, True, float("nan"), float("inf"), 10**400]),
    "label": st.sampled_from(["", "x", "a" * 101, "\n", "\u202e"]),
    "expire": st.just("2027-02-19T17:00:00Z"),
}
ENTRY = st.fixed_dictionaries({}, optional={name: values | JSON for name, values in VALUES.items()})
LIMITS = st.dictionaries(
    VALUES["tenant"] | st.just("*"),
    JSON
    | st.dictionaries(
        st.sampled_from([*(field.name for field in dataclasses.fields(TenantLimits)), "x"]),
        VALUES["weight"] | JSON,
        max_size=3,
    ),
    max_size=3,
)
FILES = st.one_of(
    st.binary(max_size=100),
    JSON.map(lambda made: json.dumps(made).encode()),
    st.lists(ENTRY, max_size=4).map(lambda entries: json.dumps({"tokens": entries}).encode()),
    LIMITS.map(lambda limits: json.dumps({"tokens": [], "limits": limits}).encode()),
    st.lists(ENTRY, max_size=2).map(lambda entries: json.dumps({"tokens": entries}).encode("utf-16")),
)


@settings(settings.get_profile("fuzz"))
@given(content=FILES)
@example(content=b"[" * 100_000)
@example(content=b'{"tokens": [{"sha256": ' + b"1" * 5000 + b"}]}")
def test_a_token_file_is_accepted_or_refused_with_a_reason(known, tmp_path_factory, tried, content):
    """An accepted file is written back with the same content. A refused file changes
    nothing.
    """
    tried("files of tokens")
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    try:
        file = token_file.read(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 - either may be
        good, token = known
        path.write_bytes(good.read_bytes())
        tokens = Tokens(path, clock=lambda: NOON.timestamp() - 1)
        path.write_bytes(content)
        tokens.refresh()
        assert tokens.find([f"Bearer {token}"]).tenant == "vision"
        return
    for grant in file.grants:
        assert grant.rights <= set(token_file.RIGHTS)
        assert grant.rights
        assert grant.expires is None or grant.expires.tzinfo is not None
        assert 1e-6 <= grant.weight <= 1e6
    token_file._write(path, file)
    assert token_file.read(path) == file


@pytest.fixture(scope="module")
def guarded(serve_module, known):
    """Yield a server that asks for tokens. The tokens of this module have expired by
    then.
    """
    path, _ = known
    fresh = path.parent / "served.json"
    token, _ = token_file.create(fresh, "vision", ["use"])
    return serve_module("--tokens", str(fresh)), token


KEYS = st.sampled_from(
    ["authorization", "authorization-bin", "hvpd-protocol", "hvpd-version", "x", "x-bin", "te", "grpc-trace-bin"]
)


@settings(settings.get_profile("fuzz-calls"))
@given(
    metadata=st.lists(
        st.tuples(
            KEYS, st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60) | st.binary(max_size=60)
        ),
        max_size=5,
    )
)
def test_metadata_of_any_bytes_is_refused_or_ignored(guarded, tried, metadata):
    server, token = guarded
    said = [(key, value) for key, value in metadata if isinstance(value, bytes) == key.endswith("-bin")]
    tried("metadata")
    with grpc.insecure_channel(server.address) as channel:
        objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
        request = objective_pb2.ListObjectivesRequest()
        with pytest.raises(grpc.RpcError) as error:
            objectives.ListObjectives(request, metadata=said, timeout=30)
        assert error.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION)
        objectives.ListObjectives(request, metadata=[("authorization", f"Bearer {token}")], timeout=30)
    assert hashlib.sha256(token.encode()).hexdigest() not in "\n".join(server.lines)
    assert token not in "\n".join(server.lines)


@pytest.mark.parametrize("count", [1000, 20_000])
def test_too_much_metadata_is_refused_by_the_transport(guarded, count):
    server, token = guarded
    with grpc.insecure_channel(server.address) as channel:
        objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
        many = [(f"x-{index}", "y" * 10) for index in range(count)]
        with pytest.raises(grpc.RpcError) as error:
            objectives.ListObjectives(objective_pb2.ListObjectivesRequest(), metadata=many, timeout=60)
        assert error.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    with grpc.insecure_channel(server.address) as channel:
        objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
        objectives.ListObjectives(
            objective_pb2.ListObjectivesRequest(), metadata=[("authorization", f"Bearer {token}")], timeout=30
        )
