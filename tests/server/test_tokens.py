"""The tokens that a server accepts, as it reads them from their file."""

import datetime
import logging
import re

import pytest

from hvpd_server.engine.lane import lanes_of
from hvpd_server.errors import Code, ServiceError
from hvpd_server.liveness import Liveness
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.tenancy import limits as _limits
from hvpd_server.tenancy import token_file
from hvpd_server.tenancy.limits import TenantLimits
from hvpd_server.tenancy.tokens import Tokens
from tests.support.clock import Clock

NOW = datetime.datetime(2026, 11, 21, 18, 0, tzinfo=datetime.UTC)


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


def test_a_token_is_found_again_with_its_tenant_and_rights(path, clock):
    token, grant = token_file.create(path, "vision", ["publish", "use"], expires=NOW, weight=2.5, label="nightly")
    other, _ = token_file.create(path, "speech", ["use"])
    clock.now -= 1
    tokens = Tokens(path, clock=clock)
    assert tokens.find(bearer(token)) == grant
    assert (grant.tenant, grant.rights, grant.label) == ("vision", {"use", "publish"}, "nightly")
    assert tokens.find([f"bearer  {other} "]).tenant == "speech"
    assert (tokens.weight("vision"), tokens.weight("speech"), tokens.weight("unknown")) == (2.5, 1.0, 1.0)


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


def test_a_file_that_is_not_there_is_an_error_at_the_start(path):
    with pytest.raises(ValueError, match=r"cannot read the tokens of .*tokens.json: No such file"):
        Tokens(path)


def test_the_weight_of_a_tenant_is_the_largest_of_its_tokens(path):
    for weight in (1.0, 3.0, 2.0):
        token_file.create(path, "vision", ["use"], weight=weight)
    assert Tokens(path).weight("vision") == 3


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
