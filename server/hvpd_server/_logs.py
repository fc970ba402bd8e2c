"""What the server writes on stderr, and how: as text for people, or as JSON, an object a line, for what collects logs.

A line that is about a request carries its fields (`_requests`), also where the module that logs knows of no request. What clients send can
neither begin a line nor fill the disk: control characters are escaped, long values cut, and repeated failures counted (`_flood`).
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
from hvpd_server import _requests
from hvpd_server._flood import Flood, LeftOut

_log = logging.getLogger(__name__)

_LONGEST: Final = 4096
_LONGEST_EXCEPTION: Final = 32768
"""Most characters of a message or value, and of a traceback."""

_CHATTY: Final = ("grpc", "opentelemetry")
"""Loggers of others that repeat themselves when clients, or collectors of traces, do."""

_LEFT_OUT: Final = "more like this were left out"

_json = False
_facts: "Facts | None" = None


def configure(level: str, form: str) -> None:
    """Has all that this process logs, warns of and dies of written on stderr.

    Args:
        level: Least level that is written.
        form: "text" or "json".
    """
    global _json, _facts  # noqa: PLW0603 - of the process, as stderr is
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
    """One line for people and scripts, whatever the log level. In either format it has "hvpd: " and the line in it.

    Args:
        line: What happened.
        level: How serious that is; told in JSON only.
        fields: Facts for programs; likewise.
    """
    record = logging.LogRecord("hvpd", level, "", 0, f"hvpd: {line}", (), None)
    record.facts = fields
    text = Json().format(record) if _json else _text.printable(record.getMessage())
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def finish() -> None:
    """Writes what is still to be told, before the process ends."""
    if _facts is not None:
        _facts.flush()
    logging.shutdown()


# What a record says


class Facts(logging.Filter):
    """Adds the fields of its request to each record, and leaves out those that come too often.

    Args:
        handler: Where it is told how many were left out.
        flood: Counts them.
    """

    def __init__(self, handler: logging.Handler, flood: "Flood[_Line] | None" = None) -> None:
        super().__init__()
        self._handler = handler
        self._flood: Flood[_Line] = flood or Flood(self.tell)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be written."""
        own = getattr(record, "fields", None)
        request = _requests.served()
        facts = _fields(request) if request is not None else {}
        if isinstance(own, Mapping):
            facts |= own
        record.facts = facts
        chatty = record.name.startswith(_CHATTY)
        if (not facts and not chatty) or record.levelno <= logging.DEBUG:
            return True
        who = facts.get("tenant") or str(facts.get("peer", "")).rpartition(":")[0]
        # The messages of others may be made of what clients send; ours are made of `args`.
        kind = (record.name, record.levelno, "" if chatty else record.msg, facts.get("code"), facts.get("reason"))
        message = "" if chatty else f"{record.msg!s}: "
        line = _Line(record.name, record.levelno, f"{message}{_LEFT_OUT}", facts)
        return self._flood.admits(who, kind, line, serious=record.levelno >= logging.ERROR)

    def flush(self) -> None:
        """Tells now what was left out."""
        self._flood.flush()

    def tell(self, found: "Sequence[LeftOut[_Line]]") -> None:
        """Writes how many lines were left out, with the facts of the last of each kind."""
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
    """What is kept of a line that was left out: not its exception, which holds on to all that was computed."""

    __slots__ = ("facts", "level", "logger", "message")

    def __init__(self, logger: str, level: int, message: str, facts: Mapping[str, object]) -> None:
        self.logger, self.level, self.message, self.facts = logger, level, message, facts


def _fields(request: _requests.Request) -> dict[str, object]:
    try:
        return request.fields()
    except Exception:  # noqa: BLE001 - the call has ended; what is logged of it must not fail for that
        return {"request_id": request.id}


class Json(logging.Formatter):
    """One object a line: time, level, logger, message, then the facts, and a traceback as `exception`."""

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
        # ASCII only: separators of lines that Unicode has, and halves of characters, are escaped, too.
        return json.dumps(line, separators=(",", ":"))


class Text(logging.Formatter):
    """Time, level, logger: message key=value ... A traceback follows, indented, so that nothing in it looks like a line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {key}={_quoted(_plain(value))}" for key, value in _said(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {_text.printable(_cut(record.getMessage()))}{facts}"
        exception = _exception(self, record)
        return "\n    ".join([line, *map(_text.printable, exception.split("\n"))]) if exception else line


def _said(record: logging.LogRecord) -> dict[str, object]:
    facts = cast("Mapping[str, object]", getattr(record, "facts", {}))
    return {key: value for key, value in facts.items() if value not in ("", None)}


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC."""
    at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback, where there is one; of a long one the beginning and the end."""
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
    """What JSON has a form for."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    return _cut(str(value))


def _cut(text: str) -> str:
    return _text.cut(text, _LONGEST)


def _quoted(value: object) -> str:
    """A value as text; in quotes, as in JSON, where it would not be one word otherwise."""
    text = str(value)
    if not text.isprintable():
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(' "=\\') else text


# What nobody caught


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
