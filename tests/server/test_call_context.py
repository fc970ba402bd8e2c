"""A call by gRPC has a tenant, a deadline, and several ways to end."""

import time

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import GrpcCall


class AbortedError(Exception):
    pass


class Context:
    """A gRPC context of a call that has ten seconds."""

    def __init__(self, lives=False):
        self.status = None
        self.cancelled = False
        self._lives = lives

    def peer(self):
        return "ipv4:10.0.0.1:5000"

    def time_remaining(self):
        return 10.0

    def add_callback(self, callback):
        return self._lives

    def cancel(self):
        self.cancelled = True

    def abort_with_status(self, status):
        self.status = status
        raise AbortedError


def test_without_tokens_the_tenant_is_the_connection_and_nothing_has_an_owner():
    call = GrpcCall(Context(), "3f2a", "GetPlan")
    assert (call.id, call.method, call.owner) == ("3f2a", "GetPlan", "")
    assert call.tenant == call.peer == "ipv4:10.0.0.1:5000"
    assert call.may_administer


def test_the_deadline_counts_from_the_calls_beginning():
    before = time.monotonic()
    call = GrpcCall(Context())
    assert before + 10 <= call.deadline <= time.monotonic() + 10


def test_a_jump_of_the_wall_clock_moves_no_deadline_of_a_call_that_has_begun(monkeypatch):
    """gRPC computes the rest of the time by the wall clock. The server asks once."""
    jump, context, real = [0.0], Context(), time.time
    ends = real() + 10
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])
    context.time_remaining = lambda: max(ends - time.time(), 0.0)
    call = GrpcCall(context)
    deadline = call.deadline
    jump[0] = 3600.0
    assert call.deadline == deadline > time.monotonic() + 5
    assert GrpcCall(context).deadline <= time.monotonic()  # The jump came before the server asked.


def test_the_call_of_the_observer_is_kept_and_others_get_one():
    call, context = GrpcCall(Context()), Context()
    assert GrpcCall.of(call) is call
    assert GrpcCall.of(context, "Watch").method == "Watch"


@pytest.mark.parametrize(("lives", "code"), [(True, Code.INVALID_ARGUMENT), (False, Code.CANCELLED)])
def test_a_body_that_ends_early_is_cancelled_if_its_client_has_left(lives, code):
    with pytest.raises(ServiceError, match="3 of 8 bytes") as error, GrpcCall(Context(lives)).reading():
        raise ServiceError(Code.INVALID_ARGUMENT, "SIZE_MISMATCH", "3 of 8 bytes came")
    assert error.value.code is code


def test_an_abort_sends_the_status_with_the_request_id_and_keeps_the_failure():
    context = Context()
    call = GrpcCall(context, "3f2a")
    with pytest.raises(AbortedError):
        call.abort(ServiceError(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", "register it"))
    assert (context.status.code, context.status.details) == (grpc.StatusCode.NOT_FOUND, "register it")
    ((_, encoded),) = context.status.trailing_metadata
    request = error_details_pb2.RequestInfo()
    assert status_pb2.Status.FromString(encoded).details[1].Unpack(request)
    assert request.request_id == "3f2a"
    assert call.error.reason == "OBJECTIVE_NOT_FOUND"


def test_a_call_that_grpc_has_ended_is_left_alone():
    context = Context()
    call = GrpcCall(context)
    with pytest.raises(grpc.RpcError):
        call.abort(grpc.RpcError())
    assert context.status is call.error is None


def test_a_call_ends_although_grpc_has_no_call_beneath_it():
    context = Context()
    GrpcCall(context).end("the client did not read")
    assert context.cancelled
