"""Every failure becomes a google.rpc.Status: a constant for programs, and a sentence
for people.
"""

import errno
import os

import grpc
import pytest
from google.rpc import error_details_pb2

from hvpd import AccessError, HvpdError, InvalidArgumentError
from hvpd._errors import DOMAIN, failure_of_status
from hvpd_server.errors import Code, ServiceError, to_status


def detail(status, kind):
    """Return the one detail of a kind, or None."""
    found = [each for each in status.details if each.Is(kind.DESCRIPTOR)]
    if not found:
        return None
    assert len(found) == 1
    message = kind()
    found[0].Unpack(message)
    return message


def info(status):
    return detail(status, error_details_pb2.ErrorInfo)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_a_refusal_keeps_its_code_reason_message_and_facts(code):
    status = to_status(ServiceError(code, "SOME_REASON", "what to do", {"digests": "ab,cd"}))
    assert status.code == code.value[0]
    assert status.message == "what to do"
    assert info(status) == error_details_pb2.ErrorInfo(
        reason="SOME_REASON", domain=DOMAIN, metadata={"digests": "ab,cd"}
    )
    assert detail(status, error_details_pb2.RetryInfo) is None


@pytest.mark.parametrize("seconds", [0.0, 0.05, 2.5])
def test_a_refusal_says_when_to_retry(seconds):
    status = to_status(ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "later", retry_after=seconds))
    retry = detail(status, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToNanoseconds() == pytest.approx(seconds * 1e9)


def test_the_client_reads_the_servers_error():
    status = to_status(ServiceError(Code.UNAVAILABLE, "WARMING_UP", "soon", {"a": "b"}, retry_after=0.25))
    failure = failure_of_status(status)
    assert (failure.code, failure.reason, failure.message) == (Code.UNAVAILABLE, "WARMING_UP", "soon")
    assert failure.metadata == {"a": "b"}
    assert failure.retry_after == pytest.approx(0.25)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_resource_that_is_exhausted(number):
    status = to_status(OSError(number, os.strerror(number), "/srv/store/incoming/tmp1"))
    assert status.code == Code.RESOURCE_EXHAUSTED.value[0]
    assert info(status).reason == "DISK_FULL"
    assert os.strerror(number) in status.message
    assert "/srv/store" not in status.message


@pytest.mark.parametrize("error", [KeyError("k"), ZeroDivisionError("by zero")])
def test_an_unexpected_error_is_internal(error):
    status = to_status(error)
    assert status.code == Code.INTERNAL.value[0]
    assert info(status).reason == "INTERNAL"
    assert type(error).__name__ in status.message


def test_the_answer_names_the_request():
    status = to_status(ServiceError(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", "no such objective"), "3f2a/7")
    assert detail(status, error_details_pb2.RequestInfo).request_id == "3f2a/7"
    assert failure_of_status(status).request_id == "3f2a/7"
    nameless = to_status(ServiceError(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", "no such objective"))
    assert detail(nameless, error_details_pb2.RequestInfo) is None


@pytest.mark.parametrize("error", [InvalidArgumentError("bad leaf"), HvpdError("bad leaf"), AccessError("bad leaf")])
def test_errors_of_the_shared_code_are_the_callers_fault_and_keep_their_reason(error):
    status = to_status(error)
    assert status.code == Code.INVALID_ARGUMENT.value[0]
    assert status.message == "bad leaf"
    assert info(status).reason == error.reason
    assert info(to_status(HvpdError("bad leaf", reason="LEAF"))).reason == "LEAF"
