"""Checks settings together with the files, ports and directories that they name,
without serving.
"""

import contextlib
import errno
import secrets
import socket
import tempfile
from collections.abc import Iterator

from hvpd_server import config as _config
from hvpd_server.config import Config
from hvpd_server.errors import ServiceError
from hvpd_server.rpc.tls import Certificates, Files
from hvpd_server.store.location import local_directory, objects_of
from hvpd_server.tenancy import token_file


def problems(config: Config) -> Iterator[str]:
    """Yield a line for each fault that would keep a server from serving."""
    if config.tokens is not None:
        try:
            if not token_file.read(config.tokens).grants:
                yield f"--tokens {config.tokens} has no token, so that no call is let in: make one with `hvpd token new`"
        except ValueError as error:
            yield f"--tokens: {error}"
    if config.tls_cert is not None and config.tls_key is not None:
        try:
            Certificates(Files(config.tls_cert, config.tls_key, config.tls_client_ca))
        except ValueError as error:
            yield f"--tls-cert, --tls-key: {error}"
    yield from _store(config)
    if config.rank:
        yield from _unknown_leader(config)
    yield from taken_ports(config)


def warnings(config: Config) -> Iterator[str]:
    """Yield a line for each fault that will keep a server from serving soon."""
    if config.tls_cert is not None and config.tls_key is not None:
        with contextlib.suppress(ValueError):  # That is one of the problems.
            if warning := Certificates(Files(config.tls_cert, config.tls_key, config.tls_client_ca)).warning():
                yield warning


def taken_ports(config: Config) -> Iterator[str]:
    """Yield a line for each port on which a server cannot listen, and for a leader
    whose own name has no address.
    """
    if config.rank:  # The leader has the ports of its group.
        return
    yield from _unknown_leader(config)
    ports: dict[int, str] = {}
    leader, _, leader_port = (config.leader or "").rpartition(":")
    for flag, host, port in (
        ("--leader", _config.listening(leader.strip("[]")), int(leader_port or 0)),
        ("--port", config.host, config.port),
        ("--vector-port", config.host, _config.vector_port(config)),
        ("--metrics-port", config.metrics_host, config.metrics_port),
    ):
        if not port:
            continue
        if port in ports:
            yield f"{flag} {port}: {ports[port]} has the same port"
        elif why := _taken(host.strip("[]"), port):
            yield f"{flag} {port}: {why}"
        ports[port] = flag


def _unknown_leader(config: Config) -> Iterator[str]:
    if config.leader is not None:
        host, _, port = config.leader.rpartition(":")
        try:
            socket.getaddrinfo(host.strip("[]"), port)
        except OSError as error:
            yield f"--leader {config.leader}: the host {host} has no address ({error.strerror})"


def _store(config: Config) -> Iterator[str]:
    """Yield the problems of the store, and leave nothing in it."""
    store = config.store
    if isinstance(store, str):
        try:
            objects = objects_of(config)
            key = f"incoming/{secrets.token_hex(8)}"
            objects.put(key, b"")
            objects.delete(key)
            objects.folders("owners")
        except ServiceError as error:
            yield f"--store {store}: {error}"
        store = local_directory(config)
    there = next(path for path in (store, *store.absolute().parents) if path.exists())
    if not there.is_dir():
        yield f"--store {store}: {there} is no directory"
        return
    try:
        tempfile.TemporaryDirectory(prefix=".hvpd-check-", dir=there).cleanup()
    except OSError as error:
        yield f"--store {store}: this user cannot write to {there} ({error.strerror})"


def _taken(host: str, port: int) -> str | None:
    """Return why a server cannot listen on a port; None if it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        return f"the host {host} has no address ({error.strerror})"
    with contextlib.closing(socket.socket(family, kind, protocol)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "another program listens on it: choose another port, or stop that program"
            return f"cannot listen on it ({error.strerror})"
    return None
