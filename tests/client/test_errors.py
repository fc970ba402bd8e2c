"""Every status becomes one class of error, with its reason and its wait."""

import pickle

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import hvpd
from hvpd import _errors

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "reason", "kind", "builtin"),
    [
        (Code.INVALID_ARGUMENT, "", hvpd.InvalidArgumentError, ValueError),
        (Code.NOT_FOUND, "", hvpd.NotFoundError, LookupError),
        (Code.UNAVAILABLE, "", hvpd.UnavailableError, ConnectionError),
        (Code.UNAUTHENTICATED, "TOKEN_EXPIRED", hvpd.AccessError, PermissionError),
        (Code.PERMISSION_DENIED, "RIGHT_MISSING", hvpd.AccessError, PermissionError),
        (Code.UNAUTHENTICATED, "", hvpd.AccessError, PermissionError),
        (Code.DEADLINE_EXCEEDED, "", hvpd.DeadlineError, TimeoutError),
        (Code.RESOURCE_EXHAUSTED, "", hvpd.OverloadedError, Exception),
        (Code.UNIMPLEMENTED, "", hvpd.IncompatibleError, Exception),
        (Code.FAILED_PRECONDITION, "PROTOCOL_MISMATCH", hvpd.IncompatibleError, Exception),
        (Code.INVALID_ARGUMENT, "BUNDLE_INCOMPATIBLE", hvpd.IncompatibleError, Exception),
        (Code.INTERNAL, "", hvpd.HvpdError, Exception),
    ],
)
def test_classes(code, reason, kind, builtin):
    error = _errors.to_error(_errors.Failure(code, "what happened", reason), "gpu-box:7070")
    assert type(error) is kind
    assert isinstance(error, builtin)
    assert isinstance(error, hvpd.HvpdError)
    assert error.reason == reason
    assert "what happened" in str(error)


def test_what_the_server_does_not_explain_names_the_server():
    for code in (Code.INTERNAL, Code.UNAVAILABLE, Code.UNIMPLEMENTED):
        assert "gpu-box:7070" in str(_errors.to_error(_errors.Failure(code, "?"), "gpu-box:7070"))


def test_details_of_a_status():
    details = [any_pb2.Any(), any_pb2.Any()]
    details[0].Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="hvpd", metadata={"pending": "7"}))
    details[1].Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=50_000_000)))
    failure = _errors.failure_of_status(status_pb2.Status(code=8, message="full", details=details))
    assert failure == _errors.Failure(Code.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", {"pending": "7"}, 0.05)
    assert _errors.failure_of_status(status_pb2.Status(code=99, message="?")).code is Code.UNKNOWN


def test_the_picture_in_the_module_shows_every_class():
    named = {name for name in hvpd.__all__ if name.endswith("Error")}
    assert _errors.__doc__ is not None
    assert all(name in _errors.__doc__ for name in named)
    assert all(issubclass(getattr(hvpd, name), hvpd.HvpdError) for name in named)


def test_the_id_of_the_request_is_in_the_error_and_at_the_end_of_its_message():
    for code in Code:
        error = _errors.to_error(_errors.Failure(code, "what happened", request_id="3f2a/12"), "gpu-box:7070")
        assert error.request_id == "3f2a/12"
        assert str(error).endswith(" [request 3f2a/12]")
        nameless = _errors.to_error(_errors.Failure(code, "what happened"), "gpu-box:7070")
        assert nameless.request_id == ""
        assert "[request" not in str(nameless)


def test_errors_keep_it_when_they_go_to_another_process():
    error = _errors.to_error(_errors.Failure(Code.NOT_FOUND, "gone", "OBJECTIVE_NOT_FOUND", request_id="3f2a"), "x:1")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.reason, copy.request_id) == (
        hvpd.NotFoundError,
        str(error),
        "OBJECTIVE_NOT_FOUND",
        "3f2a",
    )


def test_an_old_server_tells_no_id_and_the_clients_own_stands_in():
    told = _errors.Failure(Code.INTERNAL, "?", request_id="theirs")
    assert told.sent_as("ours") == told
    assert _errors.Failure(Code.DEADLINE_EXCEEDED, "?").sent_as("ours").request_id == "ours"
    assert _errors.Failure(Code.UNAVAILABLE, "nobody is there").sent_as("ours").request_id == ""
