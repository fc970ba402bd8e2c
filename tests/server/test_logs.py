"""Lines of the log are one JSON object each, or text that a client cannot forge."""

import datetime
import io
import json
import logging
import threading
import types
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvpd_server.errors import Code, ServiceError
from hvpd_server.telemetry import logs, requests
from hvpd_server.telemetry.requests import Request

FORGED = "x\n2026-01-01T00:00:00.000Z ERROR hvpd_server: forged\r\x1b[2J\u2028\u202e\x00"


def request_of(method):
    return Request(id="3f2a", method=method, owner="vision", peer="ipv4:10.0.0.1:5000")


@pytest.fixture(autouse=True)
def _serving_nobody():
    yield
    requests.serve(None)


@pytest.fixture(params=["text", "json"])
def form(request):
    return request.param


@pytest.fixture
def written(form, monkeypatch):
    """Configure the process for a format, and return a function that reads the log."""
    root = logging.getLogger()
    level = root.level
    ours = types.SimpleNamespace(stderr=io.StringIO(), __excepthook__=None)
    monkeypatch.setattr(logs, "sys", ours)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    logs.configure("DEBUG", form)
    yield ours.stderr.getvalue
    logging.captureWarnings(False)
    root.removeHandler(logs._facts._handler)
    root.setLevel(level)
    logs._json, logs._facts = False, None


def record(message, *args, level=logging.INFO, name="hvpd_server._x", died_of=None, **facts):
    exc_info = None if died_of is None else (type(died_of), died_of, died_of.__traceback__)
    made = logging.LogRecord(name, level, "", 0, message, args, exc_info)
    made.facts = facts
    return made


def fail(message):
    raise ValueError(message)


def raised(message):
    """Return an error with a traceback."""
    with pytest.raises(ValueError) as error:
        fail(message)
    return error.value


# One record


def test_json_is_one_object_with_time_level_logger_message_and_the_facts():
    made = record("compiled %s", "hvp", request_id="3f2a", duration_seconds=0.25, columns=3, tenant="", reason=None)
    made.created = 1_700_000_000.125
    assert json.loads(logs.Json().format(made)) == {
        "time": "2023-11-14T22:13:20.125Z",
        "level": "INFO",
        "logger": "hvpd_server._x",
        "message": "compiled hvp",
        "request_id": "3f2a",
        "duration_seconds": 0.25,
        "columns": 3,
    }


def test_text_has_the_same_facts():
    made = record("compiled %s", "hvp", request_id="3f2a", duration_seconds=0.25, tenant="", error='no "x"')
    made.created = 1_700_000_000.125
    assert logs.Text().format(made) == (
        "2023-11-14T22:13:20.125Z INFO hvpd_server._x: compiled hvp "
        'request_id=3f2a duration_seconds=0.25 error="no \\"x\\""'
    )


def test_times_are_utc_in_rfc_3339():
    said = json.loads(logs.Json().format(record("x")))["time"]
    parsed = datetime.datetime.fromisoformat(said)
    assert said.endswith("Z")
    assert abs((datetime.datetime.now(datetime.UTC) - parsed).total_seconds()) < 60


def test_a_traceback_is_one_string_in_json_and_indented_in_text():
    made = record("failed", level=logging.ERROR, died_of=raised("first\nsecond"))
    said = json.loads(logs.Json().format(made))
    assert said["exception"].startswith("Traceback (most recent call last):\n")
    assert said["exception"].endswith("ValueError: first\nsecond")
    first, *rest = logs.Text().format(made).split("\n")
    assert first.endswith("ERROR hvpd_server._x: failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-1] == "    second"
    assert all(line.startswith("    ") for line in rest)


@given(st.text(max_size=200), st.text(max_size=200), st.text(max_size=50))
def test_no_text_makes_a_second_line(message, value, tenant):
    made = record("%s", message, error=value, tenant=tenant)
    for formatter in (logs.Json(), logs.Text()):
        said = formatter.format(made)
        assert len(said.splitlines()) == 1
        assert said.isprintable()
    said = json.loads(logs.Json().format(made))
    assert said["message"] == message
    assert said.get("error", "") == value


def test_a_forged_line_is_escaped():
    made = record("%s", FORGED, level=logging.ERROR, objective=FORGED, died_of=raised(FORGED))
    first, *rest = logs.Text().format(made).split("\n")
    assert "\\n2026-01-01" in first
    assert not [line for line in rest if not line.startswith("    ")]
    assert all(line.isprintable() for line in [first, *rest])
    assert json.loads(logs.Json().format(made))["objective"] == FORGED


def test_a_fact_cannot_be_forged_in_a_value():
    said = logs.Text().format(record("failed", error="x request_id=forged", request_id="3f2a"))
    assert said.endswith('error="x request_id=forged" request_id=3f2a')


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), ["a"], {"a": 1}, b"x", "\ud800"])
def test_any_value_can_be_written(value):
    made = record("x", value=value)
    assert isinstance(json.loads(logs.Json().format(made))["value"], str)
    assert " value=" in logs.Text().format(made)
    logs.Text().format(made).encode()


def test_a_long_text_is_cut():
    made = record("%s", "m" * (4 << 20), died_of=raised("e" * (4 << 20)), objective="o" * (4 << 20))
    assert len(logs.Json().format(made)) < 50_000
    assert len(logs.Text().format(made)) < 50_000
    assert "(4194304 characters)" in logs.Text().format(made)


# The process


def parsed(text, form):
    lines = text.splitlines()
    return [json.loads(line) for line in lines] if form == "json" else lines


def test_lines_for_scripts_are_found_in_either_format(written, form):
    logs.say("serving on 127.0.0.1:7070", address="127.0.0.1:7070")
    (line,) = parsed(written(), form)
    if form == "text":
        assert line == "hvpd: serving on 127.0.0.1:7070"
    else:
        assert line["message"] == "hvpd: serving on 127.0.0.1:7070"
        assert line["address"] == "127.0.0.1:7070"
        assert (line["level"], line["logger"]) == ("INFO", "hvpd")


def test_they_are_said_at_any_level(written, form):
    logging.getLogger().setLevel("ERROR")
    logging.getLogger("hvpd_server").warning("not this")
    logs.say("serving on 127.0.0.1:7070")
    assert len(parsed(written(), form)) == 1


def test_lines_within_a_request_are_about_it(written, form):
    requests.serve(request_of("UploadBlob"))
    logging.getLogger("hvpd_server.store.store").error("blob %s is corrupt", "ab12")
    (line,) = parsed(written(), form)
    if form == "text":
        assert line.endswith(
            "blob ab12 is corrupt request_id=3f2a method=UploadBlob tenant=vision peer=ipv4:10.0.0.1:5000"
        )
    else:
        assert (line["request_id"], line["method"], line["tenant"]) == ("3f2a", "UploadBlob", "vision")


def test_threads_do_not_mix(written, form):
    requests.serve(request_of("UploadBlob"))
    thread = threading.Thread(target=logging.getLogger("hvpd_server").info, args=("in the background",))
    thread.start()
    thread.join()
    assert "3f2a" not in written()


def test_a_client_that_fails_ten_thousand_times_is_a_few_lines(written, form):
    request = request_of("CreatePoint")
    for _ in range(10_000):
        requests.failed(request, ServiceError(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", FORGED))
    logs.finish()
    lines = parsed(written(), form)
    assert 11 <= len(lines) <= 20
    last = lines[-1]
    if form == "json":
        said = [line["left_out"] for line in lines if "left_out" in line]
    else:
        said = [int(line.rpartition("left_out=")[2]) for line in lines if "left_out=" in line]
    # A slow machine says it every few seconds.
    assert len(lines) - len(said) + sum(said) == 10_000
    if form == "json":
        assert last["message"] == "request failed: more like this were left out"
        assert (last["reason"], last["tenant"], last["request_id"]) == ("OBJECTIVE_NOT_FOUND", "vision", "3f2a")


def test_the_servers_own_lines_are_never_left_out(written, form):
    for number in range(1000):
        logging.getLogger("hvpd_server.engine.objectives").error("objective %s cannot be served", number)
    assert len(parsed(written(), form)) == 1000


def test_grpcs_complaints_about_bytes_that_clients_send_are(written, form):
    for number in range(1000):
        logging.getLogger("grpc._common").error("Exception deserializing message! %s", number)
        logging.getLogger("grpc._server").error(f"Exception calling application: {number}")  # noqa: G004
    logs.finish()
    assert len(parsed(written(), form)) < 30


def test_the_error_that_ends_a_thread_is_logged(written, form):
    thread = threading.Thread(target=lambda: 1 / 0, name="hvpd-doomed")
    thread.start()
    thread.join()
    text = written()
    assert "ZeroDivisionError" in text
    assert "hvpd-doomed" in text
    if form == "json":
        (line,) = parsed(text, form)
        assert "ZeroDivisionError: division by zero" in line["exception"]


def test_the_error_that_ends_the_process_is_logged(written, form):
    logs.sys.excepthook(ValueError, ValueError("the end"), None)
    assert "ValueError: the end" in written()


def test_warnings_are_lines(written, form):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn_explicit("old\nways", DeprecationWarning, "x.py", 1)
    (line,) = parsed(written(), form)
    assert "old" in (line["message"] if form == "json" else line)
