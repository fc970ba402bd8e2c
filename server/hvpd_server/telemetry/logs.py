"""The server's log on stderr: text for people, or JSON with one object a line for log
collectors.

A line about a request has the request's fields (`requests`), also if the module that
logs knows no request. Text that clients send can neither begin a line nor fill the
disk. Control characters are escaped, long values are cut, and repeated failures are
counted (`log_rate_limit`).
"""

import datetime
import json
import logging
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from hvpd import _text
from hvpd_server.telemetry import requests
from hvpd_server.telemetry.log_rate_limit import LeftOut, LogRateLimit

_log = logging.getLogger(__name__)

_LONGEST: Final = 4096
_LONGEST_EXCEPTION: Final = 32768
"""Most characters of a message or value, and of a traceback."""

_CHATTY: Final = ("grpc", "opentelemetry")
"""Loggers of other packages that repeat a line when a client, or a collector of traces,
repeats its failure.
"""

_LEFT_OUT: Final = "more like this were left out"

_json = False
_facts: "Facts | None" = None


def configure(level: str, form: str) -> None:
    """Write this process's log, warnings and fatal errors on stderr.

    Args:
        level: The least level that is written.
        form: "text" or "json".
    """
    global _json, _facts  # noqa: PLW0603 - one per process, as stderr is
    _json = form == "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if _json else Text())
    _facts = Facts(handler)
    handler.addFilter(_facts)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level)
    logging.captureWarnings(True)
    sys.excepthook = _died
    threading.excepthook = _thread_died
    sys.unraisablehook = _unraisable


def say(line: str, level: int = logging.INFO, **fields: object) -> None:
    """Write one line for people and scripts, at every log level. In both formats it
    contains "hvpd: " and the line.

    Args:
        line: The event.
        level: The line's level, in JSON only.
        fields: Facts for programs, in JSON only.
    """
    record = logging.LogRecord("hvpd", level, "", 0, f"hvpd: {line}", (), None)
    record.facts = fields
    text = Json().format(record) if _json else _text.printable(record.getMessage())
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def finish() -> None:
    """Write the counts of left-out lines, before the process ends."""
    if _facts is not None:
        _facts.flush()
    logging.shutdown()


# Records


class Facts(logging.Filter):
    """Adds the fields of its request to each record, and leaves out records that repeat
    too often.

    Args:
        handler: Writes how many records were left out.
        limit: Counts the records.
    """

    def __init__(self, handler: logging.Handler, limit: "LogRateLimit[_Line] | None" = None) -> None:
        super().__init__()
        self._handler = handler
        self._limit: LogRateLimit[_Line] = limit or LogRateLimit(self.tell)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        own = getattr(record, "fields", None)
        request = requests.served()
        facts = request.fields() if request is not None else {}
        if isinstance(own, Mapping):
            facts |= own
        record.facts = facts
        chatty = record.name.startswith(_CHATTY)
        if (not facts and not chatty) or record.levelno <= logging.DEBUG:
            return True
        caller = facts.get("tenant") or str(facts.get("peer", "")).rpartition(":")[0]
        # Messages of other packages may contain text of clients. Ours have that in
        # `args`.
        kind = (record.name, record.levelno, "" if chatty else record.msg, facts.get("code"), facts.get("reason"))
        message = "" if chatty else f"{record.msg!s}: "
        line = _Line(record.name, record.levelno, f"{message}{_LEFT_OUT}", facts)
        return self._limit.admits(caller, kind, line, serious=record.levelno >= logging.ERROR)

    def flush(self) -> None:
        """Write now how many lines were left out."""
        self._limit.flush()

    def tell(self, found: "Sequence[LeftOut[_Line]]") -> None:
        """Write how many lines of each kind were left out, with the facts of the last
        one.
        """
        for count, last in found:
            record = logging.LogRecord(last.logger, last.level, "", 0, last.message, None, None)
            kept = {key: value for key, value in last.facts.items() if key not in ("error", "duration_seconds")}
            record.facts = kept | {"left_out": count}
            self._handler.acquire()
            try:
                self._handler.emit(record)
            finally:
                self._handler.release()


class _Line:
    """A line that was left out, without its exception, which would keep large arrays
    alive.
    """

    __slots__ = ("facts", "level", "logger", "message")

    def __init__(self, logger: str, level: int, message: str, facts: Mapping[str, object]) -> None:
        self.logger, self.level, self.message, self.facts = logger, level, message, facts


class Json(logging.Formatter):
    """Formats one JSON object a line: time, level, logger, message, the facts, and a
    traceback as `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        line |= {key: _plain(value) for key, value in _said(record).items() if key not in line}
        if exception := _exception(self, record):
            line["exception"] = exception
        # ASCII only, so that Unicode's line separators and lone surrogates are escaped,
        # too.
        return json.dumps(line, separators=(",", ":"))


class Text(logging.Formatter):
    """Formats a line as "time level logger: message key=value ...", with an indented
    traceback below.
    """

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {key}={_quoted(_plain(value))}" for key, value in _said(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {_text.printable(_cut(record.getMessage()))}{facts}"
        exception = _exception(self, record)
        return "\n    ".join([line, *map(_text.printable, exception.split("\n"))]) if exception else line


def _said(record: logging.LogRecord) -> dict[str, object]:
    facts = cast("Mapping[str, object]", getattr(record, "facts", {}))
    return {key: value for key, value in facts.items() if value not in ("", None)}


def _time(record: logging.LogRecord) -> str:
    """Return a record's time by RFC 3339, in UTC."""
    at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """Return the traceback, or nothing. A long one is cut in its middle."""
    text = ""
    if record.exc_info and record.exc_info[0] is not None:
        text = formatter.formatException(record.exc_info)
    if record.stack_info:
        text = f"{text}\n{record.stack_info}".strip("\n")
    if len(text) > _LONGEST_EXCEPTION:
        half = _LONGEST_EXCEPTION // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"
    return text


def _plain(value: object) -> str | int | float | bool:
    """Return a value that JSON can express."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    return _cut(str(value))


def _cut(text: str) -> str:
    return _text.cut(text, _LONGEST)


def _quoted(value: object) -> str:
    """Return a value as text, in JSON's quotes if it is not one word."""
    text = str(value)
    if not text.isprintable():
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(' "=\\') else text


# Errors that no code caught


def _died(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    _log.critical("the process ends with an error", exc_info=(kind, error, traceback))


def _thread_died(died: threading.ExceptHookArgs) -> None:
    if died.exc_value is None or isinstance(died.exc_value, SystemExit):
        return
    thread = died.thread.name if died.thread is not None else "unknown"
    _log.error("a thread ended with an error", exc_info=died.exc_value, extra={"fields": {"thread": thread}})


def _unraisable(unraisable: Any) -> None:
    message = unraisable.err_msg or "an error that could not be raised"
    _log.error("%s: %r", message, unraisable.object, exc_info=unraisable.exc_value)
