"""`hvpd conformance`: our server passes, and servers that err are found."""

import json

import pytest

from hvpd._cli import main
from hvpd._conformance import checks, golden
from hvpd._conformance.checks import FailedError, Server
from hvpd._transport.raw_calls import RawCalls, RefusedError
from hvpd.v1 import curvature_pb2, server_pb2
from tests.compat import write_golden

GOLDEN = golden.load()


def test_our_server_passes_every_check(server, client, capsys):
    before = [listing.name for listing in client.objectives()]
    assert main.main(["conformance", server.address, "--json"]) == 0
    outcomes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [outcome["name"] for outcome in outcomes] == list(checks.names())
    assert {outcome["result"] for outcome in outcomes} == {"ok"}, outcomes
    assert [listing.name for listing in client.objectives()] == before


def test_it_prints_a_line_for_each_check(server, capsys):
    assert main.main(["conformance", "--address", server.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok    server states its revisions"
    assert lines[-1] == f"{len(checks.CHECKS)} ok, 0 failed, 0 skipped"
    assert main.main(["conformance", server.address, "--address", server.address]) == 1
    assert "not both" in capsys.readouterr().err


def test_the_golden_frames_are_those_of_the_messages():
    frames = {
        name: message.SerializeToString(deterministic=True)
        for name, message in write_golden.frames(GOLDEN.bundle).items()
    }
    assert dict(GOLDEN.frames) == frames
    assert GOLDEN.vectors.tolist() == write_golden.V.tolist()


class Liar:
    """Calls of a server that is right, except for one change."""

    def __init__(self, calls, change):
        self._calls, self._change = calls, change

    def unary(self, path, request):
        return self._change(path, self._calls.unary(path, request))

    def upload(self, path, requests):
        return self._calls.upload(path, requests)

    def stream(self, path, requests):
        for answer in self._calls.stream(path, requests):
            yield self._change(path, answer)


def outcomes(client, change):
    """Return the results of all checks against a server with a change, by name."""
    calls = RawCalls(client._transport.channel)
    host = client.address.rpartition(":")[0]
    lying = Server(Liar(calls, change), GOLDEN, host, encrypted=False)
    return {check.__name__: checks.run(lying, check) for check in checks.CHECKS}


def changed(kind, path, edit):
    """Return a change of the answers of one method."""

    def change(called, answer):
        if not called.endswith(path):
            return answer
        message = kind.FromString(answer)
        edit(message)
        return message.SerializeToString()

    return change


def wrong_product(message):
    message.vectors = b"\0" * len(message.vectors)


def wrong_tag(message):
    message.tag += 1


def wrong_value(message):
    if message.HasField("point"):
        message.point.value += 1e-6


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (
            changed(curvature_pb2.ComputeProductResponse, "ComputeProduct", wrong_product),
            {"product_of_one_vector", "product_of_a_block", "quadratic_form"},
        ),
        (
            changed(curvature_pb2.StreamProductsResponse, "StreamProducts", wrong_tag),
            {"interleaved_products_on_a_stream", "stream_goes_on_after_a_refusal"},
        ),
        (
            changed(server_pb2.GetServerResponse, "GetServer", lambda m: setattr(m, "min_protocol", 2)),
            {"server_states_its_revisions"},
        ),
        (lambda path, answer: b"\xff" if path.endswith("GetObjective") else answer, {"objective_is_found"}),
    ],
)
def test_an_error_of_a_server_is_found(client, change, failing):
    found = outcomes(client, change)
    assert {name for name, (result, _) in found.items() if result == "FAIL"} == failing


def test_a_wrong_value_skips_the_checks_that_need_the_point(client):
    found = outcomes(client, changed(curvature_pb2.CreatePointResponse, "CreatePoint", wrong_value))
    assert found["point_has_value_and_gradient"][0] == "FAIL"
    assert "the value must be" in found["point_has_value_and_gradient"][1]
    assert found["product_of_one_vector"] == ("skip", "there is no point")
    assert found["objective_is_deleted"][0] == "ok"


def test_a_refusal_with_another_code_fails():
    def call():
        raise RefusedError("INTERNAL", "", "oh")

    with pytest.raises(FailedError, match=r"must fail with NOT_FOUND \(A or B\), got INTERNAL: oh"):
        checks._refused(call, "NOT_FOUND", "A", "B")
    with pytest.raises(FailedError, match="and it succeeded"):
        checks._refused(lambda: None, "NOT_FOUND")
