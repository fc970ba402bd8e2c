"""The file of tokens and of tenants' limits, which `hvpd token` and `hvpd limit` write.

The file is JSON. It holds hashes of tokens, never their texts:

    {"tokens": [{"sha256": "9f86...", "tenant": "vision", "rights": ["use", "publish"],
                 "expires": "2027-02-19T17:00:00Z", "weight": 2, "label": "nightly"}],
     "limits": {"vision": {"vectors_per_second": 5000},
                "*": {"resident_bytes": 4294967296}}}

A token is 256 random bits, so its plain SHA-256 gives nothing away. The time that a
look-up by the hash takes says nothing about the text of a known token.

`expires`, `weight` and `label` are optional, and so is `limits`. The limits of "*"
apply to every tenant, unless the tenant has its own value; null is no limit. See
`tenancy.limits`.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvpd_server.files import atomic_file
from hvpd_server.tenancy import limits as _limits
from hvpd_server.tenancy.limits import Said

USE, PUBLISH, ADMINISTER = "use", "publish", "administer"

RIGHTS = (USE, PUBLISH, ADMINISTER)
"""Rights of a token. No right implies another."""

ID_DIGITS = 12
"""Digits of a token's SHA-256 that identify the token in listings."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_LABEL_LENGTH = 100

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

_MOST_WEIGHT = 1e6

_MOST_BYTES = 16 << 20
"""Largest file of tokens, in bytes."""


@dataclasses.dataclass(frozen=True)
class Grant:
    """A token's tenant and rights."""

    sha256: str
    """SHA-256 of the token's text, 64 lower-case hexadecimal digits."""
    tenant: str
    """Tenant that holds the token."""
    rights: frozenset[str]
    """Some of `RIGHTS`."""
    expires: datetime.datetime | None = None
    """Time at which the token ends, UTC; None if it ends only when it is revoked."""
    weight: float = 1.0
    """Tenant's weight in the queue of the device."""
    label: str = ""
    """Text for people."""

    @property
    def id(self) -> str:
        """Identifier in listings, by which the token is revoked."""
        return self.sha256[:ID_DIGITS]


@dataclasses.dataclass(frozen=True)
class File:
    """Content of a file."""

    grants: Sequence[Grant] = ()
    limits: Mapping[str, Said] = dataclasses.field(default_factory=dict)
    """Limits by tenant; `limits.ALL_TENANTS` is the key for all other tenants."""


def read(path: Path) -> File:
    """Read a file.

    Raises:
        ValueError: The file cannot be read, or an entry is wrong. The message names
            both.
    """
    try:
        return _parse(_content(path))
    except OSError as error:
        raise ValueError(f"cannot read the tokens of {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"the tokens of {path} cannot be used: {error}") from None


def _content(path: Path) -> bytes:
    status = path.stat()
    # A pipe may have no end, or never begin.
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
        raise ValueError(f"it must be a plain file of at most {_MOST_BYTES} bytes")
    return path.read_bytes()


def _parse(content: bytes) -> File:
    try:
        document = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # Raised for bytes that are not UTF-8, too.
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
        raise ValueError("a sha256 occurs twice")
    limits = {}
    for tenant, entry in document.get("limits", {}).items():
        try:
            limits[check_limited(tenant)] = _limits.parse(entry)
        except ValueError as error:
            raise ValueError(f"limits of {tenant!r}: {error}") from None
    return File(grants, limits)


def _grant(entry: object) -> Grant:
    """Return the grant of an entry, or raise ValueError.

    Unknown fields are refused, otherwise a misspelled "expire" makes a token that never
    ends.
    """
    if not isinstance(entry, dict):
        raise ValueError("expected an object")  # noqa: TRY004 - one kind of error for a file
    known = {"sha256", "tenant", "rights", "expires", "weight", "label"}
    if unknown := sorted(entry.keys() - known):
        raise ValueError(f"unknown field {', '.join(map(repr, unknown))}; the fields are {', '.join(sorted(known))}")
    sha256, rights, expires = entry.get("sha256"), entry.get("rights"), entry.get("expires")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("sha256 must be 64 lower-case hexadecimal digits")
    if not isinstance(rights, list):
        raise ValueError(f"rights must be a list of {', '.join(RIGHTS)}")  # noqa: TRY004 - one kind of error for a file
    if expires is not None and not isinstance(expires, str):
        raise ValueError("expires must be a date and time, such as 2027-02-19T17:00:00Z")
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
    raise ValueError(f"expires must be a date and time with its offset, such as 2027-02-19T17:00:00Z, got {text!r}")


def check_tenant(tenant: object) -> str:
    """Return a tenant's name if it is valid; else raise ValueError."""
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ValueError(
            "the name of a tenant must have at most 64 letters, digits, '.', '_' and '-', and begin with a letter or a digit, "
            f"got {tenant!r}"
        )
    return tenant


def check_limited(tenant: str) -> str:
    """Return a key of limits, a tenant or `limits.ALL_TENANTS`, if it is valid; else
    raise ValueError.
    """
    return tenant if tenant == _limits.ALL_TENANTS else check_tenant(tenant)


def check_rights(rights: Sequence[object]) -> frozenset[str]:
    """Return rights if there is at least one and all are known; else raise an error."""
    wrong = [right for right in rights if right not in RIGHTS]
    if wrong or not rights:
        raise ValueError(f"rights must be some of {', '.join(RIGHTS)}, got {', '.join(map(repr, wrong)) or 'none'}")
    return frozenset(str(right) for right in rights)


def check_weight(weight: object) -> float:
    """Return a tenant's weight if it is valid; else raise ValueError."""
    if (
        not isinstance(weight, int | float)
        or isinstance(weight, bool)
        or not 1 / _MOST_WEIGHT <= weight <= _MOST_WEIGHT
    ):
        raise ValueError(f"a weight must be a number from {1 / _MOST_WEIGHT:g} to {_MOST_WEIGHT:g}, got {weight!r}")
    return float(weight)


def check_label(label: object) -> str:
    """Return a label if it is valid; else raise ValueError."""
    if not isinstance(label, str) or not (label.isprintable() and len(label) <= _LABEL_LENGTH):
        raise ValueError(f"a label must have at most {_LABEL_LENGTH} printable characters, got {label!r}")
    return label


def parse_expiry(text: str, now: datetime.datetime) -> datetime.datetime:
    """Return a token's end, to the second, given a lifetime such as 90d or a date."""
    if found := re.fullmatch(r"(\d{1,6})([mhdw])", text):
        with contextlib.suppress(OverflowError):
            return (now + datetime.timedelta(**{_UNITS[found[2]]: int(found[1])})).replace(microsecond=0)
    else:
        with contextlib.suppress(ValueError):
            return _moment(text)
    raise ValueError(
        f"a token's lifetime must be a time such as 90d (m, h, d, w), or a date such as 2027-02-19T17:00:00Z, got {text!r}"
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
    """Create a token and add its hash to a file, which is created if it is missing.

    Returns:
        The token's text, which is stored nowhere, and its grant.

    Raises:
        ValueError: An argument is wrong, or the file is.
        OSError: The file cannot be written.
    """
    token = f"hvpd_{secrets.token_urlsafe(32)}"  # Secret scanners look for the prefix.
    grant = Grant(
        digest_of(token), check_tenant(tenant), check_rights(rights), expires, check_weight(weight), check_label(label)
    )
    with _changing(path) as target:
        known = read(target) if target.exists() else File()
        _write(target, dataclasses.replace(known, grants=[*known.grants, grant]))
    return token, grant


def limit(path: Path, tenant: str, changes: Mapping[str, float | None]) -> None:
    """Set limits of a tenant, or of `limits.ALL_TENANTS`; None removes a limit.

    Raises:
        ValueError: An argument is wrong, or the file is.
        OSError: The file cannot be written.
    """
    check_limited(tenant)
    if not changes:
        raise ValueError(f"give at least one limit of {tenant!r}: {', '.join(_limits.FIELDS)}")
    said = _limits.parse(changes)
    with _changing(path) as target:
        known = read(target)
        own = {**known.limits.get(tenant, {}), **said}
        _write(target, dataclasses.replace(known, limits={**known.limits, tenant: own}))


def unlimit(path: Path, tenant: str) -> None:
    """Remove a tenant's own limits, so that those of `limits.ALL_TENANTS` apply to it.

    Raises:
        ValueError: The tenant has no limits of its own, or the file is wrong.
        OSError: The file cannot be written.
    """
    with _changing(path) as target:
        known = read(target)
        if tenant not in known.limits:
            raise ValueError(f"{path} has no limits of {tenant!r}: see `hvpd limit list --file {path}`")
        rest = {other: limits for other, limits in known.limits.items() if other != tenant}
        _write(target, dataclasses.replace(known, limits=rest))


def revoke(path: Path, which: str) -> Grant:
    """Remove the token with this id (or more of its SHA-256), or with this label.

    Raises:
        ValueError: No token or several tokens match, or the file is wrong.
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
            raise ValueError(f"{how_many} called {which!r} in {path}: give an ID from `hvpd token list --file {path}`")
        _write(target, dataclasses.replace(known, grants=[grant for grant in known.grants if grant is not found[0]]))
    return found[0]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """Lock out other `hvpd token` commands; yield the path of the file, with links
    resolved.
    """
    target = path.resolve()
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield target
    finally:
        os.close(directory)


def _write(path: Path, file: File) -> None:
    """Replace the file. A new file is readable by its owner only."""
    entries = []
    for grant in file.grants:
        entry: dict[str, Any] = {"sha256": grant.sha256, "tenant": grant.tenant}
        entry["rights"] = [right for right in RIGHTS if right in grant.rights]
        if grant.expires is not None:
            entry["expires"] = timestamp(grant.expires)
        if grant.weight != 1:
            entry["weight"] = grant.weight
        if grant.label:
            entry["label"] = grant.label
        entries.append(entry)
    document: dict[str, Any] = {"tokens": entries}
    if file.limits:
        document["limits"] = dict(file.limits)
    with atomic_file(path.parent) as (out, commit):
        out.write(json.dumps(document, indent=2).encode() + b"\n")
        with contextlib.suppress(FileNotFoundError):
            _keep_access(out.fileno(), path.stat())
        commit(path)


def _keep_access(descriptor: int, before: os.stat_result) -> None:
    """Give a new file the owner, the group and the group's rights of the file that it
    replaces.
    """
    with contextlib.suppress(PermissionError):  # Only root may, and only root needs to.
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode) & 0o660 | 0o600)


def timestamp(moment: datetime.datetime) -> str:
    """Return a time in ISO 8601, UTC."""
    return moment.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")


def describe(grants: Sequence[Grant], now: datetime.datetime) -> Sequence[Sequence[str]]:
    """Return a table of grants for people, titles first."""
    rows = [("ID", "TENANT", "RIGHTS", "EXPIRES", "WEIGHT", "LABEL")]
    for grant in grants:
        rights = ",".join(right for right in RIGHTS if right in grant.rights)
        ends = "-" if grant.expires is None else timestamp(grant.expires)
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


def digest_of(token: str) -> str:
    """Return the SHA-256 of a token's text."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
