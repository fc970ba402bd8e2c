"""A failure's error and the operator's log have an id in common. The log is one object
a line.
"""

import contextlib
import json
import os
import signal
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import hvpd
from hvpd._transport.exchange import Asked
from hvpd._wire import request_id as _request_id
from hvpd.v1 import curvature_pb2, curvature_pb2_grpc, objective_pb2, objective_pb2_grpc
from hvpd_server.tenancy import token_file
from tests.support.waiting import until

WAIT = 60
FORGED = 'x"\n{"level":"ERROR","message":"forged"}\r\x1b[2J\u2028'


def cubic(x, a):
    return (a * x**3).sum()


@pytest.fixture(scope="module")
def logged(serve_module):
    """Yield a server that logs all it can as JSON. At the end all lines were JSON."""
    server = serve_module("--log-format", "json", "--log-level", "DEBUG")
    yield server
    assert server.terminate() == 0
    lines = [json.loads(line) for line in server.lines]
    assert [line["message"] for line in lines if line["logger"] == "hvpd"][-2:] == ["hvpd: stopping", "hvpd: stopped"]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


@pytest.fixture(scope="module")
def caller(logged):
    with hvpd.connect(logged.address) as client:
        yield client


@pytest.fixture(scope="module")
def objective(caller):
    return caller.register(cubic, np.ones(3), np.ones(3), name="cubic")


def said(server, **facts):
    """Return the lines with all of these fields, once there are some."""

    def find():
        lines = [json.loads(line) for line in tuple(server.lines)]
        return [line for line in lines if facts.items() <= line.items()]

    return until(find)


def test_the_line_that_says_it_is_ready_is_an_object_too(logged):
    (line,) = [line for line in said(logged, logger="hvpd") if line["message"].startswith("hvpd: serving on ")]
    assert line["message"] == f"hvpd: serving on {logged.address}"
    assert line["address"] == logged.address


def test_the_id_in_an_error_is_the_one_in_the_log(logged, caller):
    with pytest.raises(hvpd.NotFoundError) as error:
        caller.objective("nobody/registered-this")
    request_id = error.value.request_id
    assert _request_id.is_valid(request_id)
    assert str(error.value).endswith(f" [request {request_id}]")
    (line,) = said(logged, request_id=request_id)
    assert line["message"] == "request failed"
    assert (line["level"], line["code"], line["reason"]) == ("INFO", "NOT_FOUND", error.value.reason)
    assert (line["method"], line["objective"]) == ("GetObjective", "nobody/registered-this")
    assert line["error"] in str(error.value)
    assert line["peer"].startswith(("ipv4:127.0.0.1:", "ipv6:"))
    assert 0 <= line["duration_seconds"] < WAIT


def test_products_of_a_stream_have_the_streams_id_and_their_tag(logged, objective):
    point = objective.at(np.ones(3))
    asked = Asked(point._id, curvature_pb2.OPERATOR_GGN)
    ids = []
    pool = point._transport._vectors
    until(lambda: (point.hessian() @ np.ones(3)).any() and pool.ready)  # From then on products go past gRPC.
    for _ in range(2):
        with pytest.raises(hvpd.HvpdError) as error:
            point._transport.multiply(asked, np.ones((1, 3)), restore=point._restore)
        ids.append(error.value.request_id)
    (stream, first), (other, second) = (each.split("/") for each in ids)
    assert stream == other
    assert int(second) > int(first)
    for request_id in ids:
        (line,) = said(logged, request_id=request_id)
        assert (line["method"], line["reason"]) == ("StreamProducts", error.value.reason)
    np.testing.assert_allclose(point.hessian() @ np.ones(3), 6 * np.ones(3))


def test_blocks_too_wide_for_one_launch_have_ids_too(objective, caller):
    point = objective.at(np.ones(3))
    asked = Asked(point._id, curvature_pb2.OPERATOR_GGN)
    with pytest.raises(hvpd.HvpdError) as error:
        caller._transport.multiply(asked, np.ones((200, 3)), restore=point._restore)
    assert error.value.request_id.count("/") == 1


def test_answered_calls_are_lines_at_the_debug_level(logged, caller):
    caller.objectives()
    assert said(logged, message="request answered", method="ListObjectives", level="DEBUG")


def test_a_point_that_is_forgotten_is_no_news(logged, objective):
    point = objective.at(np.full(3, 2.0))
    point._id = "0" * 64
    with pytest.raises(hvpd.HvpdError):
        point._transport.multiply(
            Asked(point._id),
            np.ones((1, 3)),
            restore=lambda: (_ for _ in ()).throw(hvpd.HvpdError("once is enough")),
        )
    assert {line["level"] for line in said(logged, reason="POINT_NOT_RESIDENT")} == {"DEBUG"}


# Others' clients


def info(error):
    """Return the RequestInfo of an error."""
    found = error_details_pb2.RequestInfo()
    assert [detail for detail in rpc_status.from_call(error).details if detail.Unpack(found)]
    return found.request_id


@pytest.mark.parametrize("sent", ["0192ab4e-77b0-7cc3-98c4-dc0c0c07398f", None, "not an id", "x" * 65])
def test_a_sent_id_is_logged_and_a_missing_id_is_made(logged, sent):
    metadata = [] if sent is None else [("x-request-id", sent)]
    with grpc.insecure_channel(logged.address) as channel:
        unary = objective_pb2_grpc.ObjectiveServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            unary.GetObjective(objective_pb2.GetObjectiveRequest(name="nothing"), metadata=metadata)
        ids = [info(error.value)]
        stub = curvature_pb2_grpc.CurvatureServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            list(stub.CreatePoint(iter([curvature_pb2.CreatePointRequest()]), metadata=metadata))
        ids.append(info(error.value))
        (answer,) = stub.StreamProducts(iter([curvature_pb2.StreamProductsRequest(tag=7)]), metadata=metadata)
        found = error_details_pb2.RequestInfo()
        assert [detail for detail in answer.error.details if detail.Unpack(found)]
        stream, tag = found.request_id.split("/")
        assert tag == "7"
        ids.append(stream)
    taken = sent is not None and _request_id.is_valid(sent)
    assert (set(ids) == {sent}) == taken
    for request_id in [*ids[:2], found.request_id]:
        assert _request_id.is_valid(request_id.split("/")[0])
        assert said(logged, request_id=request_id)


def test_a_clients_text_makes_no_log_line(logged, caller):
    with pytest.raises(hvpd.HvpdError) as error:
        caller.objective(FORGED)
    (line,) = said(logged, request_id=error.value.request_id)
    assert line["objective"] == FORGED
    assert not [line for line in map(json.loads, tuple(logged.lines)) if line["message"] == "forged"]


def test_it_is_none_in_text_either(serve):
    server = serve("--log-level", "DEBUG")
    forged = "x\n2026-01-01T00:00:00.000Z ERROR hvpd_server: forged"
    with hvpd.connect(server.address) as client, pytest.raises(hvpd.HvpdError) as error:
        client.objective(forged)
    (line,) = until(lambda: [line for line in tuple(server.lines) if f"request_id={error.value.request_id}" in line])
    assert " INFO hvpd_server.telemetry.requests: request failed " in line
    assert "forged" in line
    assert server.terminate() == 0
    assert not [line for line in server.lines if line.startswith("2026-01-01")]
    assert "hvpd: stopped" in server.lines


def test_tokens_are_in_no_line(serve, tmp_path):
    path = tmp_path / "tokens.json"
    token, _ = token_file.create(path, "vision", ["use"])
    wrong = token[:-4] + "AAAA"
    server = serve("--tokens", str(path), "--log-level", "DEBUG", "--log-format", "json")
    with hvpd.connect(server.address, token=token) as client:
        client.objectives()
        with pytest.raises(hvpd.AccessError) as missing:
            client.register(cubic, np.ones(3), np.ones(3))
    with pytest.raises(hvpd.AccessError) as unknown:
        hvpd.connect(server.address, token=wrong)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
        metadata = [("authorization", f"Bearer {wrong}"), ("x-request-id", wrong)]
        request = objective_pb2.ListObjectivesRequest()
        objective_pb2_grpc.ObjectiveServiceStub(channel).ListObjectives(request, metadata=metadata)
    assert said(server, request_id=unknown.value.request_id)[0]["level"] == "WARNING"
    assert said(server, request_id=missing.value.request_id)[0]["reason"] == "RIGHT_MISSING"
    assert said(server, message="request answered", method="ListObjectives")[0]["tenant"] == "vision"
    assert server.terminate() == 0
    lines = "\n".join(server.lines)
    assert token not in lines
    assert wrong not in lines


# Processes


def test_both_processes_speak_it(serve):
    server = serve("--log-format", "json", supervised=True)
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    (line,) = said(server, level="WARNING", logger="hvpd")
    assert line["message"].startswith("hvpd: the server was ended by SIGKILL")
    serving = f"hvpd: serving on {server.address}"
    until(lambda: [json.loads(line)["message"] for line in tuple(server.lines)].count(serving) == 2)
    assert server.terminate() == 0
    assert [json.loads(line) for line in server.lines]


def test_an_embedded_server_is_not_confused_by_the_variable(monkeypatch):
    monkeypatch.setenv("HVPD_LOG_FORMAT", "json")
    with contextlib.closing(hvpd.local()) as client:
        assert client.objectives() == []
    with pytest.raises(hvpd.InvalidArgumentError, match="log_format"):
        hvpd.local(log_format="json")


def test_an_absent_server_has_no_id_to_quote(serve):
    server = serve()
    with hvpd.connect(server.address, retry_timeout=0.1) as client:
        server.kill()
        with pytest.raises(hvpd.UnavailableError) as error:
            client.objectives()
    assert error.value.request_id == ""
    assert "[request" not in str(error.value)
