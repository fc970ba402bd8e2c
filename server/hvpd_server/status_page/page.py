"""The status page: its files, and its data, for operators. It shows all tenants.

`/status.json` is for this page alone, and no contract. Programs should read the
metrics.
"""

import dataclasses
import functools
import json
import math
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from hvpd import _text
from hvpd_server.status_page.history import INTERVAL, MAX_SAMPLES, History, Rates, Sample, Spread
from hvpd_server.status_page.http_server import Answer, Page, Request
from hvpd_server.status_page.objectives import Catalogue, Entry, Facts
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.telemetry.readings import Totals, Use
from hvpd_server.telemetry.usage import OTHER

_OBJECTIVES = 50
_TENANTS = 20
_FAILURES = 50
"""Most rows of a table."""
_NAMES = 5
"""Most names of one objective in a row."""
_FILTER = 200
"""Most characters of a filter."""
_FRESH = 1.0
"""Seconds that the common data serves all readers."""

_FILES = {
    "/": ("status.html", "text/html; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

_EXPECTED = {"POINT_NOT_RESIDENT", "DIRECTION_NOT_RESIDENT", "RUN_NOT_RESIDENT", "QUEUE_FULL", "WARMING_UP"}
"""Reasons after which clients retry by themselves."""

_NOTHING = Use()

_Json = dict[str, Any]


class Status:
    """The data of the page.


    Args:
        facts: Facts about the server, in words.
        state: Returns "warming", "serving" or "draining".
        metrics: The metrics.
        history: Samples of the metrics.
        catalogue: The objectives.
        clock: Seconds, monotonic.
        wall: Seconds since 1970.
    """

    def __init__(
        self,
        facts: Mapping[str, str],
        state: Callable[[], str],
        metrics: Metrics,
        history: History,
        catalogue: Catalogue,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._facts = facts
        self._state = state
        self._metrics = metrics
        self._history = history
        self._catalogue = catalogue
        self._clock = clock
        self._wall = wall
        self._began = clock()
        self._instance = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._found: tuple[float, _Common] | None = None

    def pages(self) -> dict[str, Page]:
        """Return the pages by path."""
        return {path: _file(*file) for path, file in _FILES.items()} | {"/status.json": self._page}

    def _page(self, request: Request) -> Answer:
        asked = urllib.parse.parse_qs(request.query, max_num_fields=8)
        (since,) = asked.get("since", ["0"])
        if not (since.isascii() and since.isdecimal() and len(since) < 16):
            raise ValueError("since is the number of a sample")
        instance, wanted = asked.get("instance", [""])[0], asked.get("filter", [""])[0]
        known = int(since) if instance == self._instance else 0
        content = json.dumps(_printable(self.content(wanted[:_FILTER], known)), separators=(",", ":"), allow_nan=False)
        return Answer("application/json", content.encode())

    def content(self, wanted: str = "", since: int = 0) -> _Json:
        """Return the data of the page.


        Args:
            wanted: Part of a name, or beginning of a digest, of the objectives to
                return; empty for all.
            since: Number of the last sample that the page has.
        """
        common = self._common()
        wanted = wanted.strip().lower()
        matching = [row for row in common.rows if not wanted or row.matches(wanted)]
        return {
            **common.content,
            "uptime": self._clock() - self._began,
            "time": self._wall(),
            "samples": [_sample(sample) for sample in self._history.since(since)],
            "objectives": {
                "total": len(common.rows),
                "matching": len(matching),
                "rows": [row.content(self._catalogue.facts(row.entry.digest)) for row in matching[:_OBJECTIVES]],
            },
        }

    def _common(self) -> "_Common":
        """Return the data that is the same for all readers."""
        with self._lock:
            if self._found is None or self._clock() - self._found[0] >= _FRESH:
                self._found = self._clock(), self._look()
            return self._found[1]

    def _look(self) -> "_Common":
        totals, rates = self._metrics.totals(), self._history.rates()
        live, calls, streams = self._metrics.live()
        kinds = sorted({*live.resident_bytes, *live.hits, *live.misses, *totals.evictions})
        content = {
            "instance": self._instance,
            "state": self._state(),
            "facts": dict(self._facts),
            "interval": INTERVAL,
            "kept": MAX_SAMPLES,
            "width_bounds": list(self._history.width_bounds),
            "now": {
                "rate_seconds": rates.seconds,
                "products_per_second": rates.products,
                "columns_per_second": rates.columns,
                "failures_per_second": rates.failures,
                "width": rates.width,
                "products": totals.products,
                "columns": totals.columns,
                "failures": totals.failures,
                "launched_columns": totals.launched_columns,
                "padding_columns": totals.padding_columns,
                "pending": live.pending,
                "pending_limit": live.pending_limit,
                "in_flight": live.in_flight,
                "calls": calls,
                "streams": streams,
                "resident_bytes": sum(live.resident_bytes.values()),
                "budget_bytes": live.budget_bytes,
                "points": totals.points,
                "points_remade": totals.points_remade,
                "compiles": dict(totals.compiles),
            },
            "memory": [vars(memory) for memory in live.memory],
            "residency": [
                {
                    "kind": kind,
                    "bytes": live.resident_bytes.get(kind, 0),
                    "hits": live.hits.get(kind, 0),
                    "misses": live.misses.get(kind, 0),
                    "evictions": totals.evictions.get(kind, 0),
                }
                for kind in kinds
            ],
            "tenants": _tenants(totals, rates),
            "failures": [
                vars(failure) | {"expected": failure.reason in _EXPECTED}
                for failure in self._metrics.failures.recent()[:_FAILURES]
            ],
        }
        return _Common(content, self._rows(totals, rates))

    def _rows(self, totals: Totals, rates: Rates) -> "Sequence[_Row]":
        """Return all objectives: first those in trouble, then by their use of the
        device.
        """
        entries = self._catalogue.entries()
        troubled = self._catalogue.troubled()
        labels = self._metrics.counted_as(entry.digest for entry in entries)
        owner: dict[str, str] = {}  # A label counts for the objective that has the name now.
        for entry in entries:
            label = labels[entry.digest]
            if label not in owner or label in entry.names:
                owner[label] = entry.digest
        used, recent = _summed(totals.usage, 0), _summed(rates.usage, 0)
        rows = []
        for entry in entries:
            label = labels[entry.digest]
            counted = owner[label] == entry.digest
            rows.append(
                _Row(
                    entry,
                    used.get(label, _NOTHING) if counted else None,
                    _per_second(recent.get(label), rates) if counted else None,
                    "" if counted else label,
                    troubled.get(entry.digest),
                )
            )
        return sorted(rows, key=_Row.order)


class _Row(NamedTuple):
    """A row of an objective. There may be a thousand, each second."""

    entry: Entry
    use: Use | None
    """Use; None if the objective is counted with another."""
    rate: float | None
    """Products a second; None if the objective is counted with another."""
    counted_as: str
    """Name of the other objective that it is counted with; empty if there is none."""
    trouble: Facts | None

    def order(self) -> tuple[Any, ...]:
        use = self.use or _NOTHING
        name = self.entry.names[0] if self.entry.names else ""
        return self.trouble is None, -(self.rate or 0.0), -use.products, not name, name, self.entry.digest

    def matches(self, wanted: str) -> bool:
        return self.entry.digest.startswith(wanted) or any(wanted in name.lower() for name in self.entry.names)

    def content(self, facts: Facts) -> _Json:
        use = self.use
        return {
            **vars(facts),
            "digest": self.entry.digest,
            "names": list(self.entry.names[:_NAMES]),
            "more_names": max(len(self.entry.names) - _NAMES, 0),
            "created": self.entry.created,
            "products": use.products if use else None,
            "columns": use.columns if use else None,
            "device_seconds": use.device_seconds if use else None,
            "products_per_second": self.rate,
            "counted_as": self.counted_as,
            "trouble": self.trouble.trouble if self.trouble else "",
            "reason": self.trouble.reason if self.trouble else "",
        }


@dataclasses.dataclass(frozen=True)
class _Common:
    """Data for all readers within a second."""

    content: _Json
    rows: Sequence[_Row]


def _printable(content: Any) -> Any:
    """Return data with all its texts printable, because names and messages come from
    clients.
    """
    if isinstance(content, str):
        return _text.printable(content)
    if isinstance(content, dict):
        return {_text.printable(key): _printable(value) for key, value in content.items()}
    return [*map(_printable, content)] if isinstance(content, list | tuple) else content


def _tenants(totals: Totals, rates: Rates) -> _Json:
    used, recent = _summed(totals.usage, 1), _summed(rates.usage, 1)
    names = [name for name, use in used.items() if use.products or name != OTHER]
    names.sort(key=lambda name: (-used[name].device_seconds, name))
    return {
        "total": len(names),
        "rows": [
            {
                "name": name,
                "products": used[name].products,
                "columns": used[name].columns,
                "device_seconds": used[name].device_seconds,
                "products_per_second": _per_second(recent.get(name), rates),
                "device_share": recent[name].device_seconds / rates.seconds
                if rates.seconds and name in recent
                else 0.0,
            }
            for name in names[:_TENANTS]
        ],
    }


def _summed(usage: Mapping[tuple[str, str], Use], part: int) -> dict[str, Use]:
    """Return the use by objective, or by tenant."""
    found: dict[str, Use] = {}
    for labels, use in usage.items():
        before = found.get(labels[part], _NOTHING)
        found[labels[part]] = Use(
            before.products + use.products,
            before.columns + use.columns,
            before.device_seconds + use.device_seconds,
        )
    return found


def _per_second(use: Use | None, rates: Rates) -> float:
    return use.products / rates.seconds if use is not None and rates.seconds else 0.0


def _sample(sample: Sample) -> _Json:
    """Return a sample with short names, because there are hundreds."""
    return {
        "i": sample.number,
        "t": round(sample.time, 3),
        "s": round(sample.seconds, 3),
        "p": sample.products,
        "c": sample.columns,
        "f": sample.failures,
        "r": _rounded(sample.request),
        "q": _rounded(sample.queue),
        "k": _rounded(sample.compute),
        "w": list(sample.widths),
        "n": sample.pending,
        "l": sample.in_flight,
    }


def _rounded(spread: Spread | None) -> list[float] | None:
    """Return a number to three digits."""
    return None if spread is None else [float(f"{value:.3g}") for value in spread if math.isfinite(value)]


def _file(name: str, content_type: str) -> Page:
    read = functools.cache((resources.files("hvpd_server.status_page") / "static" / name).read_bytes)
    return lambda request: Answer(content_type, read())
