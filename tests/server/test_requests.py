"""Every failure is answered with the request's id, and logged once at its level."""

import logging

import grpc
import pytest

from hvpd._errors import failure_of_status
from hvpd._wire import request_id
from hvpd_server.errors import Code, ServiceError
from hvpd_server.telemetry import requests
from hvpd_server.telemetry.requests import Request

ID = "3f2a9c0d1b7e4a55"


@pytest.fixture
def request_():
    return Request(id=ID, method="CreatePoint", owner="vision", peer="ipv4:10.0.0.1:5000")


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.DEBUG, "hvpd_server.telemetry.requests")
    return lambda: caplog.records


@pytest.mark.parametrize(
    ("code", "reason", "level"),
    [
        (Code.INVALID_ARGUMENT, "SIZE_MISMATCH", logging.INFO),
        (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", logging.INFO),
        (Code.DEADLINE_EXCEEDED, "EXPIRED", logging.INFO),
        (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", logging.WARNING),
        (Code.UNAVAILABLE, "SHUTTING_DOWN", logging.WARNING),
        (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN", logging.WARNING),
        (Code.PERMISSION_DENIED, "RIGHT_MISSING", logging.WARNING),
        (Code.DATA_LOSS, "BLOB_CORRUPT", logging.ERROR),
        (Code.CANCELLED, "CANCELLED", logging.DEBUG),
        (Code.NOT_FOUND, "POINT_NOT_RESIDENT", logging.DEBUG),
        (Code.UNAVAILABLE, "WARMING_UP", logging.DEBUG),
    ],
)
def test_a_refusal_is_one_line_at_the_level_of_its_code(code, reason, level, request_, lines):
    failed = requests.failed(request_, ServiceError(code, reason, "what to do"))
    assert failure_of_status(failed.status).request_id == ID
    assert (failed.code, failed.reason, failed.cause) == (code, reason, None)
    (record,) = lines()
    assert record.levelno == level
    assert record.exc_info is None
    said = record.fields
    assert said.pop("duration_seconds") >= 0
    assert said == {
        "request_id": ID,
        "method": "CreatePoint",
        "tenant": "vision",
        "peer": "ipv4:10.0.0.1:5000",
        "objective": "",
        "code": code.name,
        "reason": reason,
        "error": "what to do",
    }


@pytest.mark.parametrize("error", [KeyError("k"), ZeroDivisionError("by zero")])
def test_an_unexpected_error_is_logged_with_its_traceback(error, request_, lines):
    failed = requests.failed(request_, error)
    assert failed.code is Code.INTERNAL
    assert failed.cause is error
    (record,) = lines()
    assert record.levelno == logging.ERROR
    assert record.exc_info[1] is error


def test_products_of_a_stream_are_told_apart_by_their_tags(request_, lines):
    failed = requests.failed(request_, ValueError("x"), tag=12, started=request_.started - 5, objective="d" * 64)
    assert failure_of_status(failed.status).request_id == f"{ID}/12"
    assert lines()[0].fields["request_id"] == f"{ID}/12"
    assert lines()[0].fields["objective"] == "d" * 64
    assert 5 <= lines()[0].fields["duration_seconds"] < 60


def test_an_answered_call_is_a_line_at_debug(request_, lines, caplog):
    requests.answered(request_)
    assert [record.levelno for record in lines()] == [logging.DEBUG]
    caplog.set_level(logging.INFO, "hvpd_server.telemetry.requests")
    requests.answered(request_)
    assert len(lines()) == 1


@pytest.mark.parametrize("sent", ["3f2a", "0192ab4e-77b0-7cc3-98c4-dc0c0c07398f", "A.b:1", "x" * 64])
def test_the_clients_id_is_taken(sent):
    assert requests.id_of([("hvpd-protocol", "1"), ("x-request-id", sent)]) == sent
    assert Request(id=sent).id == sent


@pytest.mark.parametrize(
    "sent",
    ["", "x" * 65, "a b", "a\nb", "a\x1b[31m", "größe", "a/1", "hvpd_abc", b"abc", '"', "a\n", "\u0661"],
)
def test_an_invalid_id_is_replaced(sent):
    assert requests.id_of([("x-request-id", sent)]) == ""
    made = Request().id
    assert request_id.is_valid(made)
    assert made != Request().id


def test_calls_without_metadata_have_ids():
    assert requests.id_of(None) == requests.id_of([]) == ""
    assert requests.id_of([("x-request-id", "a b"), ("x-request-id", "second")]) == "second"


def test_every_code_is_answered(request_):
    for code in grpc.StatusCode:
        assert requests.failed(request_, ServiceError(code, "R", "m")).status.code == code.value[0]
