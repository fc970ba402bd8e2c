"""Who may do what: tokens, their tenants and rights, and the file that they are in. Knows no gRPC calls, and no token by its text.

The file is JSON, for people to read and for `hvpd token` to write:

    {"tokens": [{"sha256": "9f86...", "tenant": "vision", "rights": ["use", "publish"],
                 "expires": "2027-02-19T17:00:00Z", "weight": 2, "label": "nightly run"}],
     "limits": {"vision": {"vectors_per_second": 5000}, "*": {"resident_bytes": 4294967296}}}

A token is 256 random bits, so that its plain SHA-256 gives nothing away, and a look-up by that hash takes as long for a wrong token
as for a right one, as far as its text goes. `expires`, `weight` and `label` may be left out, and so may `limits`: of tenants, "*" being
everybody, for whatever is not said of a tenant by itself; null is none. See _limits.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvpd_server import _limits
from hvpd_server._errors import Code, ServiceError
from hvpd_server._limits import Said, TenantLimits

_log = logging.getLogger(__name__)

USE, PUBLISH, ADMINISTER = "use", "publish", "administer"

RIGHTS = (USE, PUBLISH, ADMINISTER)
"""Each stands for itself: none implies another."""

ID_DIGITS = 12
"""Digits of its SHA-256 by which a token is listed."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_LABEL_LENGTH = 100

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

_MOST_WEIGHT = 1e6

_MOST_BYTES = 16 << 20
"""Of a file of tokens."""


@dataclasses.dataclass(frozen=True)
class Grant:
    """What a token gives."""

    sha256: str
    """Of the token's text, 64 lower-case hexadecimal digits."""
    tenant: str
    """Who holds it."""
    rights: frozenset[str]
    """Of `RIGHTS`."""
    expires: datetime.datetime | None = None
    """When it ends, UTC; None: when it is revoked."""
    weight: float = 1.0
    """Of the tenant, in the queue of the device."""
    label: str = ""
    """For people."""

    @property
    def id(self) -> str:
        """By which it is listed, and revoked."""
        return self.sha256[:ID_DIGITS]


# The file


@dataclasses.dataclass(frozen=True)
class File:
    """What a file says."""

    grants: Sequence[Grant] = ()
    limits: Mapping[str, Said] = dataclasses.field(default_factory=dict)
    """By tenant; `_limits.EVERYBODY` for all others."""


def read(path: Path) -> File:
    """What a file says.

    Raises:
        ValueError: It cannot be read, or is not as it must be; the message has the file, the entry and what is wrong with it.
    """
    try:
        return _parse(_content(path))
    except OSError as error:
        raise ValueError(f"cannot read the tokens of {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"the tokens of {path} cannot be used: {error}") from None


def _content(path: Path) -> bytes:
    """Not of a pipe, which may have no end, or never begin."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
        raise ValueError(f"it is no plain file of {_MOST_BYTES} bytes at most")
    return path.read_bytes()


def _parse(content: bytes) -> File:
    try:
        document = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # Also what is not UTF-8.
        raise ValueError(f"it is not JSON ({error})") from None
    if (
        not isinstance(document, dict)
        or not {"tokens"} <= set(document) <= {"tokens", "limits"}
        or not isinstance(document["tokens"], list)
        or not isinstance(document.get("limits", {}), dict)
    ):
        raise ValueError('expected {"tokens": [...]}, or {"tokens": [...], "limits": {...}}')
    grants = []
    for number, entry in enumerate(document["tokens"], 1):
        try:
            grants.append(_grant(entry))
        except ValueError as error:
            raise ValueError(f"token {number}: {error}") from None
    if len({grant.sha256 for grant in grants}) != len(grants):
        raise ValueError("a sha256 is there twice")
    limits = {}
    for tenant, entry in document.get("limits", {}).items():
        try:
            limits[check_limited(tenant)] = _limits.parse(entry)
        except ValueError as error:
            raise ValueError(f"limits of {tenant!r}: {error}") from None
    return File(grants, limits)


def _grant(entry: object) -> Grant:
    """One entry. What is misspelled is refused: "expire" would otherwise be a token that never ends."""
    if not isinstance(entry, dict):
        raise ValueError("expected an object")  # noqa: TRY004 - all that can be wrong with a file is one kind of error
    known = {"sha256", "tenant", "rights", "expires", "weight", "label"}
    if unknown := sorted(entry.keys() - known):
        raise ValueError(f"no field is called {', '.join(map(repr, unknown))}; there are {', '.join(sorted(known))}")
    sha256, rights, expires = entry.get("sha256"), entry.get("rights"), entry.get("expires")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("sha256 is 64 lower-case hexadecimal digits")
    if not isinstance(rights, list):
        raise ValueError(f"rights is a list, of {', '.join(RIGHTS)}")  # noqa: TRY004 - likewise
    if expires is not None and not isinstance(expires, str):
        raise ValueError("expires is a date and time, such as 2027-02-19T17:00:00Z")
    return Grant(
        sha256,
        check_tenant(entry.get("tenant")),
        check_rights(rights),
        None if expires is None else _moment(expires),
        check_weight(entry.get("weight", 1.0)),
        check_label(entry.get("label", "")),
    )


def _moment(text: str) -> datetime.datetime:
    try:
        found = datetime.datetime.fromisoformat(text)
        if found.tzinfo is not None:
            return found.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"expires is a date and time with its offset, such as 2027-02-19T17:00:00Z, got {text!r}")


def check_tenant(tenant: object) -> str:
    """A tenant's name, or ValueError."""
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ValueError(
            f"a tenant is called by letters, digits, '.', '_' and '-', 64 at most, beginning with one of the first two, got {tenant!r}"
        )
    return tenant


def check_limited(tenant: str) -> str:
    """Whose limits there can be, or ValueError: a tenant's, or `_limits.EVERYBODY`."""
    return tenant if tenant == _limits.EVERYBODY else check_tenant(tenant)


def check_rights(rights: Sequence[object]) -> frozenset[str]:
    """Rights, at least one, or ValueError."""
    wrong = [right for right in rights if right not in RIGHTS]
    if wrong or not rights:
        raise ValueError(f"rights are some of {', '.join(RIGHTS)}, got {', '.join(map(repr, wrong)) or 'none'}")
    return frozenset(str(right) for right in rights)


def check_weight(weight: object) -> float:
    """A tenant's weight, or ValueError."""
    if (
        not isinstance(weight, int | float)
        or isinstance(weight, bool)
        or not 1 / _MOST_WEIGHT <= weight <= _MOST_WEIGHT
    ):
        raise ValueError(f"a weight is a number from {1 / _MOST_WEIGHT:g} to {_MOST_WEIGHT:g}, got {weight!r}")
    return float(weight)


def check_label(label: object) -> str:
    """A label, or ValueError."""
    if not isinstance(label, str) or not (label.isprintable() and len(label) <= _LABEL_LENGTH):
        raise ValueError(f"a label has {_LABEL_LENGTH} printable characters at most, got {label!r}")
    return label


def parse_expiry(text: str, now: datetime.datetime) -> datetime.datetime:
    """When a token ends that lives for a time such as 90d, or until a date; to the second."""
    if found := re.fullmatch(r"(\d{1,6})([mhdw])", text):
        with contextlib.suppress(OverflowError):
            return (now + datetime.timedelta(**{_UNITS[found[2]]: int(found[1])})).replace(microsecond=0)
    else:
        with contextlib.suppress(ValueError):
            return _moment(text)
    raise ValueError(
        f"a token lives for a time such as 90d (m, h, d, w), or until one such as 2027-02-19T17:00:00Z, got {text!r}"
    )


def create(
    path: Path,
    tenant: str,
    rights: Sequence[str],
    *,
    expires: datetime.datetime | None = None,
    weight: float = 1.0,
    label: str = "",
) -> tuple[str, Grant]:
    """Makes a token and adds it to a file, which is created where it is missing. Its text is nowhere but in what this returns.

    Raises:
        ValueError: An argument is wrong, or the file is.
        OSError: The file cannot be written.
    """
    token = f"hvpd_{secrets.token_urlsafe(32)}"  # The beginning is for those who look for secrets in what they publish.
    grant = Grant(
        _hash(token), check_tenant(tenant), check_rights(rights), expires, check_weight(weight), check_label(label)
    )
    with _changing(path) as target:
        known = read(target) if target.exists() else File()
        _write(target, dataclasses.replace(known, grants=[*known.grants, grant]))
    return token, grant


def limit(path: Path, tenant: str, changes: Mapping[str, float | None]) -> None:
    """Sets limits of a tenant, or of everybody; those that are None are lifted, others stay as they are.

    Raises:
        ValueError: An argument is wrong, or the file is.
        OSError: The file cannot be written.
    """
    check_limited(tenant)
    if not changes:
        raise ValueError(f"say which limit of {tenant!r}: {', '.join(_limits.FIELDS)}")
    said = _limits.parse(changes)
    with _changing(path) as target:
        known = read(target)
        own = {**known.limits.get(tenant, {}), **said}
        _write(target, dataclasses.replace(known, limits={**known.limits, tenant: own}))


def unlimit(path: Path, tenant: str) -> None:
    """Takes a tenant's own limits out: those of everybody are its from now on.

    Raises:
        ValueError: It has none, or the file is wrong.
        OSError: The file cannot be written.
    """
    with _changing(path) as target:
        known = read(target)
        if tenant not in known.limits:
            raise ValueError(f"{path} has no limits of {tenant!r}: see `hvpd limit list --file {path}`")
        rest = {other: limits for other, limits in known.limits.items() if other != tenant}
        _write(target, dataclasses.replace(known, limits=rest))


def revoke(path: Path, which: str) -> Grant:
    """Takes out the token with this id (or more of its SHA-256), or this label.

    Raises:
        ValueError: None is called so, or several are, or the file is wrong.
        OSError: The file cannot be written.
    """
    with _changing(path) as target:
        known = read(target)
        found = [
            grant
            for grant in known.grants
            if grant.label == which or (len(which) >= ID_DIGITS and grant.sha256.startswith(which))
        ]
        if len(found) != 1:
            how_many = f"{len(found)} tokens are" if found else "no token is"
            raise ValueError(f"{how_many} called {which!r} in {path}: say an ID of `hvpd token list --file {path}`")
        _write(target, dataclasses.replace(known, grants=[grant for grant in known.grants if grant is not found[0]]))
    return found[0]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """Keeps other `hvpd token` commands waiting; gives the file itself where the path is a link."""
    target = path.resolve()
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield target
    finally:
        os.close(directory)


def _write(path: Path, file: File) -> None:
    """Replaces the file at once. It is its owner's alone; what owner and group could do with an older one stays."""
    entries = []
    for grant in file.grants:
        entry: dict[str, Any] = {"sha256": grant.sha256, "tenant": grant.tenant}
        entry["rights"] = [right for right in RIGHTS if right in grant.rights]
        if grant.expires is not None:
            entry["expires"] = _text(grant.expires)
        if grant.weight != 1:
            entry["weight"] = grant.weight
        if grant.label:
            entry["label"] = grant.label
        entries.append(entry)
    document: dict[str, Any] = {"tokens": entries}
    if file.limits:
        document["limits"] = dict(file.limits)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(document, out, indent=2)
            out.write("\n")
            if path.exists():
                before = path.stat()
                with contextlib.suppress(PermissionError):  # Only root can, and only for root it is of use.
                    os.fchown(out.fileno(), before.st_uid, before.st_gid)
                os.fchmod(out.fileno(), stat.S_IMODE(before.st_mode) & 0o660 | 0o600)
            out.flush()
            os.fsync(out.fileno())
        Path(name).rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def _text(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")


def describe(grants: Sequence[Grant], now: datetime.datetime) -> Sequence[Sequence[str]]:
    """A table of grants for people, its titles first."""
    rows = [("ID", "TENANT", "RIGHTS", "EXPIRES", "WEIGHT", "LABEL")]
    for grant in grants:
        rights = ",".join(right for right in RIGHTS if right in grant.rights)
        ends = "-" if grant.expires is None else _text(grant.expires)
        ended = grant.expires is not None and grant.expires <= now
        rows.append(
            (
                grant.id,
                grant.tenant,
                rights,
                f"{ends} (over)" if ended else ends,
                f"{grant.weight:g}",
                grant.label or "-",
            )
        )
    return rows


# The server's view


class Tokens:
    """The tokens of a file, as it is now: it is read again when it changes. Safe for many threads.

    Args:
        path: The file.
        clock: Seconds since 1970.

    Raises:
        ValueError: The file cannot be used. A later version that cannot be used is logged, and the one before it stays in force.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = version(path)
        self._take(read(path))

    def _take(self, file: File) -> None:
        weights: dict[str, float] = {}
        for grant in file.grants:
            weights[grant.tenant] = max(grant.weight, weights.get(grant.tenant, 0.0))
        self._weights: Mapping[str, float] = weights
        everybodys = file.limits.get(_limits.EVERYBODY, {})
        self._limits = {tenant: _limits.combined(own, everybodys) for tenant, own in file.limits.items()}
        self._others = _limits.combined({}, everybodys)
        self._grants: Mapping[str, Grant] = {grant.sha256: grant for grant in file.grants}
        _log.info("%d tokens of %d tenants are in %s", len(file.grants), len(weights), self._path)

    def refresh(self) -> None:
        """Reads the file again if it changed."""
        with self._lock:
            now = version(self._path)
            if now == self._seen:
                return
            self._seen = now  # Before reading: what changes meanwhile is another version.
            try:
                self._take(read(self._path))
            except ValueError as error:
                _log.error("%s; the tokens that were read before stay in force", error)

    def weight(self, tenant: str) -> float:
        """Of a tenant, in the queue of the device: the largest that one of its tokens gives."""
        return self._weights.get(tenant, 1.0)

    def tenants(self) -> list[str]:
        """All that have a token."""
        return sorted(self._weights)

    def limits(self, tenant: str) -> TenantLimits:
        """Of a tenant."""
        return self._limits.get(tenant, self._others)

    def find(self, authorization: Sequence[str | bytes]) -> Grant:
        """The grant of the token in a call's `authorization`, of which there must be one.

        Raises:
            ServiceError: UNAUTHENTICATED.
        """
        if not authorization:
            raise _unauthenticated(
                "TOKEN_MISSING",
                "this server asks who calls: give a token (connect(token=...) or $HVPD_TOKEN); "
                "who operates it makes one with `hvpd token new`",
            )
        said = authorization[0] if len(authorization) == 1 else ""
        text = said if isinstance(said, str) else said.decode("latin-1")
        scheme, _, token = text.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _unauthenticated(
                "TOKEN_MALFORMED", "expected one `authorization: Bearer TOKEN` in the call's metadata"
            )
        sha256 = _hash(token.strip())
        if sha256 not in self._grants:
            self.refresh()  # A new token is good at once.
        return self.current(sha256)

    def current(self, sha256: str) -> Grant:
        """The grant of a token, by its hash.

        Raises:
            ServiceError: UNAUTHENTICATED: it is none, or not any more.
        """
        grant = self._grants.get(sha256)
        if grant is None:
            raise _unauthenticated(
                "TOKEN_UNKNOWN",
                "the token is not one of this server's, or was revoked: ask who operates it for one (`hvpd token new`)",
            )
        if grant.expires is not None and grant.expires.timestamp() <= self._clock():
            raise _unauthenticated(
                "TOKEN_EXPIRED",
                f"the token of tenant {grant.tenant} was good until {_text(grant.expires)}: ask who operates the server for another",
            )
        return grant


def _unauthenticated(reason: str, message: str) -> ServiceError:
    return ServiceError(Code.UNAUTHENTICATED, reason, message)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def version(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does, or what a link stands for; None where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
