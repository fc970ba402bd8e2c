"""The objectives and names of a store, in memory: a look-up reads no file.

Several servers can change one store. `changing` excludes the others for the time of a
change and counts it; `sync` takes in the changes of others, if there were any.

The mappings are replaced, never changed, so readers need no lock. The order of the
locks: the files, a change, the owners, the mappings.
"""

import collections
import contextlib
import difflib
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from hvpd import _text
from hvpd._wire import codec
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.objects import CHANGES, Objects

_log = logging.getLogger(__name__)

_PREFIX = 8
"""Least number of digits of a digest that can stand for an objective."""

_LONGEST = 300
"""Most characters of a name in an error, because HTTP/2 has 8 KiB for an error with its
details.
"""

_COMPARED = 1000
"""Most names to compare with a name that was not found."""


class Index:
    """The objectives and names of a store. Safe for many threads.

    Args:
        objects: The files of the store.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._changing = threading.RLock()
        self._unsaid = False
        """Whether a change was made that other servers cannot know of yet."""
        self._version = ""
        self._watchers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        """Held to replace the next five."""
        self._created: Mapping[str, int] = {}
        self._owned: frozenset[str] = frozenset()
        self._names: Mapping[str, str] = {}
        self._names_of: Mapping[str, frozenset[str]] = {}
        self._named: collections.Counter[str] = collections.Counter()
        self._records: dict[str, tuple[str, Mapping[str, Any]]] = {}  # By key: the tag, and what was read.
        self.revision = 0
        """A number that grows when objectives or names change."""

    # Changes, by this server and by others

    def watch(self, watcher: Callable[[], None]) -> None:
        """Have a function called when another server has changed the store."""
        self._watchers.append(watcher)

    def sync(self) -> None:
        """Take in the changes of other servers.

        Raises:
            OSError: The store cannot be read.
        """
        if self.objects.version(CHANGES) == self._version:
            return
        with self._changing:
            # Before the reading, so that a change meanwhile is read the next time.
            version = self.objects.version(CHANGES)
            if version == self._version:
                return
            # Owners come first: an objective that is new after them is closed to all
            # until its owner is read, too.
            for watcher in self._watchers:
                watcher()
            self._load()
            self._version = version

    def look(self) -> None:
        """Take in the changes of other servers, if that takes microseconds."""
        if self.objects.quick:
            self.sync()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Exclude changes by other threads and servers, and take in earlier ones.

        Raises:
            ServiceError: UNAVAILABLE: another server is at a change for too long.
        """
        with self.objects.locked(), self._changing:
            self.sync()
            try:
                yield
            finally:
                if self._unsaid:
                    version, alone = self.objects.bump(CHANGES, self._version)
                    self._unsaid = False
                    self._version = version if alone else ""

    def unsaid(self) -> None:
        """Note a change, within `changing`, that other servers must take in."""
        self._unsaid = True

    def _load(self) -> None:
        """Read the records that are new or have changed."""
        created, owned, names = {}, set(), {}
        for key, record in self.records("objectives"):
            when, digest = record.get("create_time_ns"), key.rpartition("/")[2]
            if isinstance(when, int):
                created[digest] = when
                if record.get("owned") is True:
                    owned.add(digest)
        for key, record in self.records("names"):
            name, to = record.get("name"), record.get("digest")
            if not (isinstance(name, str) and isinstance(to, str) and codec.is_digest(to)):
                continue
            if key != name_key(name):  # `remove_name` would miss it, so the next start would restore the name.
                _log.error("%s is damaged, and left aside: it is not the file of its name", key)
                continue
            names[name] = to
        by_digest = collections.defaultdict(set)
        for name, digest in names.items():
            by_digest[digest].add(name)
        with self._lock:
            self._created, self._owned, self._names = created, frozenset(owned), names
            self._names_of = {digest: frozenset(called) for digest, called in by_digest.items()}
            self._named = collections.Counter(map(_first_part, names))
            self.revision += 1

    def records(self, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the key and the JSON object of each record of a folder.

        A record is read again only if it has changed.
        """
        gone = {key for key in self._records if key.rpartition("/")[0] == folder}
        for entry in self.objects.list(folder):
            gone.discard(entry.key)
            known = self._records.get(entry.key)
            if known is None or known[0] != entry.tag:
                self._records[entry.key] = known = entry.tag, self.record(entry.key)
            yield entry.key, known[1]
        for key in gone:
            del self._records[key]

    def record(self, key: str) -> Mapping[str, Any]:
        """Return the JSON object of a file; empty if the file is missing or damaged.

        One damaged file must not stop others from being served.
        """
        try:
            content = self.objects.get(key)
            record = json.loads(content) if content is not None else {}
        except (OSError, ValueError, RecursionError) as error:
            _log.error("%s is damaged, and left aside: %s", key, error)
            return {}
        return record if isinstance(record, dict) else {}

    def keep(self, key: str, content: Mapping[str, Any]) -> None:
        """Write a record, in place of an older one."""
        self.objects.put(key, json.dumps(content).encode())

    # Objectives and names

    def add_objective(self, digest: str, name: str, *, owned: bool = False) -> None:
        """Record a bundle as an objective, and point a name at it unless the name is
        empty.

        Args:
            digest: Digest of the bundle.
            name: The full name.
            owned: Whether a new objective is open to its owners only. The caller has
                written the owners' records already.
        """
        with self.changing():
            if digest not in self._created:
                created = time.time_ns()
                self._unsaid = True
                self.keep(f"objectives/{digest}", {"create_time_ns": created} | ({"owned": True} if owned else {}))
                with self._lock:
                    self._created = {**self._created, digest: created}
                    self._owned |= {digest} if owned else set()
                    self.revision += 1
            if name and self._names.get(name) != digest:
                self._unsaid = True
                self.keep(name_key(name), {"name": name, "digest": digest})
                self._point(name, digest)

    def objective(
        self, name: str, *, own: str = "", visible: Callable[[str, str], bool] = lambda name, digest: True
    ) -> tuple[str, str, int]:
        """Return name, digest and time of registration (ns since 1970) of an objective.

        Args:
            name: A name, a digest, or the beginning of a digest.
            own: Another name, to look up before `name`.
            visible: Whether the caller may know of a name and its digest. The name is
                empty for a digest alone.

        Raises:
            ServiceError: There is no such objective. The message suggests similar
                names.
        """
        names, created = self._names, self._created

        def usable(other: str, to: str) -> bool:
            return to in created and visible(other, to)

        name = next((each for each in (own, name) if each in names and visible(each, names[each])), name)
        named = name in names and visible(name, names[name])
        digest = names[name] if named else name
        if not usable("", digest) and len(name) >= _PREFIX:
            beginning = [other for other in created if other.startswith(name) and usable("", other)]
            digest = beginning[0] if len(beginning) == 1 else name
        if not usable("", digest):
            raise _not_found(name, [other for other, to in names.items() if other != name and usable(other, to)])
        called = self._names_of.get(digest, frozenset())
        shown = name if named else min((other for other in called if visible(other, digest)), default="")
        return shown, digest, created[digest]

    def registered(self, digest: str) -> bool:
        """Return whether an objective is registered, as far as this server knows."""
        return digest in self._created

    def owned(self, digest: str) -> bool:
        """Return whether an objective was new when a tenant registered it."""
        return digest in self._owned

    def objectives(self) -> list[tuple[str, str, int]]:
        """Return (name, digest, time of registration) of all names, sorted.

        Objectives without a name follow, with an empty name.
        """
        names, named, created = self._names, self._names_of, self._created
        listed = sorted(names.items()) + sorted(("", digest) for digest in created.keys() - named.keys())
        return [(name, digest, created[digest]) for name, digest in listed if digest in created]

    def names_of(self, digest: str) -> Collection[str]:
        """Return the names that point at an objective."""
        return self._names_of.get(digest, frozenset())

    def has_name(self, name: str) -> bool:
        """Return whether a name points at an objective."""
        return name in self._names

    def digest_of(self, name: str) -> str | None:
        """Return the digest that a name points at; None if there is no such name."""
        return self._names.get(name)

    def count_names(self, tenant: str) -> int:
        """Return the number of names that begin with a tenant's own."""
        return self._named[f"{tenant}/"]

    def remove_name(self, name: str) -> None:
        """Remove a name."""
        with self.changing():
            self._unsaid = True
            self.objects.delete(name_key(name))
            self._point(name, "")

    def remove_objective(self, digest: str) -> None:
        """Remove an objective with its records. Its names and blobs stay."""
        with self.changing():
            self._unsaid |= digest in self._created
            with self._lock:
                self._created = {other: created for other, created in self._created.items() if other != digest}
                self._owned -= {digest}
                self.revision += 1
            # `objectives` comes first, so that a crash leaves nothing that is served.
            for folder in ("objectives", "checks", "derived"):
                self.objects.delete(f"{folder}/{digest}")

    def _point(self, name: str, digest: str) -> None:
        """Point a name at an objective in memory; at none if the digest is empty."""
        with self._lock:
            names, names_of = dict(self._names), dict(self._names_of)
            before = names.pop(name, None)
            self._named[_first_part(name)] += bool(digest) - (before is not None)
            if before is not None:
                names_of[before] -= {name}
                if not names_of[before]:
                    del names_of[before]
            if digest:
                names[name] = digest
                names_of[digest] = names_of.get(digest, frozenset()) | {name}
            self._names, self._names_of = names, names_of
            self.revision += 1


def name_key(name: str) -> str:
    """Return the key of a name, which can have slashes and exceed a file name's
    length.
    """
    return f"names/{codec.digest(name.encode())}"


def _first_part(name: str) -> str:
    """Return the tenant in a full name, with its slash; empty if there is none."""
    tenant, slash, _ = name.partition("/")
    return tenant + slash if slash else ""


def _not_found(name: str, usable: Sequence[str]) -> ServiceError:
    # No stored name is longer, and comparing long names takes time.
    near = difflib.get_close_matches(name, usable[:_COMPARED], n=3, cutoff=0.5) if len(name) <= _LONGEST else []
    hint = (
        f"; did you mean {' or '.join(map(repr, near))}?"
        if near
        else "; no stored name is similar, and client.objectives() lists the names"
    )
    kind = "name"
    if codec.is_digest(name):
        kind, hint = "digest", ": if it was deleted, register it again"
    return ServiceError(
        Code.NOT_FOUND,
        "OBJECTIVE_NOT_FOUND",
        f"no objective of {kind} {_text.quoted(name, _LONGEST)}{hint}",
        {"near": ",".join(near)},
    )
