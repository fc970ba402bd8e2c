"""Every status becomes one class of error, with its reason and its wait."""

import ast
import contextlib
import itertools
import pickle
import re
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import hvpd
from hvpd import _arguments, _errors
from hvpd_server import errors as server_errors
from hvpd_server.importer import refusals

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
    assert error.reason == (reason or code.name)
    assert "what happened" in str(error)


def test_an_unexplained_failure_names_the_server():
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


def test_the_error_and_its_message_have_the_request_id():
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
    assert _errors.Failure(Code.UNAVAILABLE, "connection refused").sent_as("ours").request_id == ""


def test_a_notebook_shows_no_frame_of_hvpd():
    """IPython calls the method, and shows what it returns."""

    @contextlib.contextmanager
    def inside():
        yield

    try:
        inside()(_arguments.integer)("five", "k", 0)
    except hvpd.HvpdError as error:
        lines = error._render_traceback_()
    assert lines[-1] == "InvalidArgumentError: k must be an integer of at least 0, got 'five'"
    assert any(__file__ in line for line in lines)
    assert not any("_arguments.py" in line or contextlib.__file__ in line for line in lines)


ROOT = Path(__file__).parents[2]

REASON = re.compile(r"[A-Z]+(_[A-Z]+)*")

OPERATORS = {"NO_DEVICE"}
"""Reasons for which a server does not start. No client sees them."""

STATES_REASON = {"ServiceError", "_invalid", "invalid", "_unauthenticated", "_refusal", "_too_many"}
"""Names of the functions whose arguments have a reason of the server."""


def calls(*folders):
    """Return each call in the files of some folders, with its function's name."""
    for path in itertools.chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield getattr(node.func, "id", getattr(node.func, "attr", "")), node


def constants(node):
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def kinds():
    return [getattr(hvpd, name) for name in hvpd.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("kind", kinds())
def test_every_error_has_a_reason(kind):
    assert REASON.fullmatch(kind("what happened").reason)
    assert kind("what happened", reason="TLS").reason == "TLS"


@pytest.mark.parametrize(("kind", "least"), [("HvpdError", 10), ("InvalidArgumentError", 200)])
def test_an_error_of_a_wide_class_states_its_reason(kind, least):
    """Otherwise errors that have nothing in common would share a reason."""
    bare = [node for name, node in calls("client/hvpd") if name == kind]
    assert len(bare) > least
    assert [ast.unparse(node) for node in bare if "reason" not in {word.arg for word in node.keywords}] == []


def test_the_page_lists_each_reason_of_client_and_server():
    page = (ROOT / "docs/reference/errors.md").read_text().partition("## Reasons")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`([A-Z_]+)`", " ".join(rows)))
    found = {"EXTRA_MISSING", "INCOMPATIBLE", "NOT_CONVERGED", "UNAVAILABLE"} | set(refusals.REASONS)
    found |= {reason for _, reason, *_ in [*server_errors._SYSTEM.values(), server_errors._UNKNOWN]}
    for name, node in calls("client/hvpd", "server/hvpd_server"):
        stated = [word.value for word in node.keywords if word.arg == "reason"]
        if name in STATES_REASON:
            stated += node.args[:2]
        found |= {text for each in stated for text in constants(each) if REASON.fullmatch(text)}
    assert listed == found - OPERATORS
