"""Solves and streams end when their token ends."""

import datetime
import functools
import threading
import time

import grpc
import numpy as np
import pytest

import hvpd
from hvpd._cli import main
from hvpd.v1 import (
    curvature_pb2,
    curvature_pb2_grpc,
)
from hvpd_server.tenancy import token_file
from tests.support.security import N, channel, connect, metadata, product
from tests.support.waiting import until


def ends(client, name):
    """Multiply until that is refused; return the reason."""
    deadline = time.monotonic() + 30
    with pytest.raises(hvpd.AccessError) as error:
        H = client.objective(name).at(np.ones(N)).hessian()
        while time.monotonic() < deadline:
            H @ np.ones(N)
    return error.value


def test_a_solve_ends_when_its_token_is_revoked(place, secured, quartic, capsys):
    token, listed = place.token("speech", "use")
    other, _ = place.token("speech", "use")
    with connect(place, secured, token) as client, connect(place, secured, other) as stays:
        product(client, quartic)
        product(stays, quartic)
        assert main.main(["token", "revoke", listed, "--file", str(place.tokens)]) == 0
        error = ends(client, quartic)
        assert error.reason == "TOKEN_UNKNOWN"
        assert "was revoked" in str(error)
        product(stays, quartic)
        assert stays.statistics().retries == 0


def test_a_solve_goes_on_when_its_token_file_has_another_token(place, secured, quartic, tmp_path, monkeypatch):
    old, listed = place.token("speech", "use")
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(old)
    profiles = tmp_path / "config.toml"
    profiles.write_text(f'[profile.lab]\naddress = "{secured.address}"\nca = "{place.trust}"\ntoken_file = "{file}"\n')
    monkeypatch.setenv("HVPD_PROFILES", str(profiles))
    with hvpd.connect(profile="lab") as client:
        H = client.objective(quartic).at(np.full(N, 2.0)).hessian()
        for _ in range(2):
            new, coming = place.token("speech", "use")
            file.write_text(new)
            token_file.revoke(place.tokens, listed)
            # The server looks once a second; until then, it takes the old token.
            until(functools.partial(_is_refused, place, secured, old))
            np.testing.assert_array_equal(H @ np.arange(N), 4.0 * np.arange(N))
            product(client, quartic)
            old, listed = new, coming
        token_file.revoke(place.tokens, listed)
        assert ends(client, quartic).reason == "TOKEN_UNKNOWN"


def _is_refused(place, server, token):
    """Return whether the server refuses a token."""
    try:
        connect(place, server, token).close()
    except hvpd.AccessError:
        return True
    return False


def test_a_solve_ends_when_its_token_expires(place, secured, quartic):
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
    token, _ = place.token("speech", "use", expires=soon)
    with connect(place, secured, token) as client:
        error = ends(client, quartic)
    assert datetime.datetime.now(datetime.UTC) >= soon
    assert error.reason == "TOKEN_EXPIRED"
    assert "tenant speech was good until" in str(error)


def seconds_to_end(place, server):
    """Return the seconds from the revocation of a token to the end of its idle
    stream.
    """
    token, listed = place.token("speech", "use")
    silent = threading.Event()
    with channel(place, server) as opened:
        stub = curvature_pb2_grpc.CurvatureServiceStub(opened)
        request = curvature_pb2.StreamProductsRequest(tag=1, spec=curvature_pb2.ProductSpec())
        requests = iter([request])

        def messages():
            yield from requests
            silent.wait()

        call = stub.StreamProducts(messages(), metadata=metadata(token), timeout=60)
        assert next(call).error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]  # The stream is open, and answers.
        began = time.monotonic()
        token_file.revoke(place.tokens, listed)
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        silent.set()
        assert error.value.code() is grpc.StatusCode.CANCELLED
        return time.monotonic() - began


def test_a_stream_that_is_idle_ends_within_two_seconds_of_its_token(place, secured):
    """A busy machine may delay one try. The server looks once a second."""
    assert any(seconds_to_end(place, secured) < 2 for _ in range(5))


def test_a_broken_file_of_tokens_changes_nothing(place, secured, publisher, quartic):
    whole = place.tokens.read_bytes()
    place.write("tokens.json", whole[:-20])
    until(lambda: any("stay in force" in line for line in secured.lines))
    with connect(place, secured, publisher) as client:
        product(client, quartic)
    place.write("tokens.json", whole)
