"""How a process becomes a rank of a group: it finds its place, meets the other ranks,
and connects jax with them.
"""

import dataclasses
import secrets
import socket
import ssl

from hvpd._wire import codec
from hvpd_server.config import Config, listening
from hvpd_server.device.device import Device, devices
from hvpd_server.device.group_device import GroupDevice
from hvpd_server.device.processes import Place, connect, detect, hardware, software
from hvpd_server.device.rank_mesh import RankMesh
from hvpd_server.errors import Code, ServiceError
from hvpd_server.group import channel, failure
from hvpd_server.group.follower import Follower
from hvpd_server.group.leader import Leader
from hvpd_server.store.store import Store
from hvpd_server.telemetry import logs


def placed(config: Config) -> Config:
    """Return the settings with the place of this process, as its launcher tells it. A
    group of one process is a server by itself.

    Raises:
        ValueError: The launcher does not tell the place.
    """
    if config.group:
        found = detect()
        config = dataclasses.replace(config, leader=found.leader, rank=found.rank, size=found.size)
    if config.size == 1:
        return dataclasses.replace(config, group=False, leader=None, rank=None, size=None)
    return config


def place_of(config: Config) -> Place:
    """Return the place of this process in its group."""
    assert config.leader is not None
    assert config.rank is not None
    assert config.size is not None
    return Place(config.leader, config.rank, config.size)


def lead(config: Config, store: Store) -> tuple[list[Device], GroupDevice]:
    """Form a group as its leader: wait for the other ranks. Return the devices of this
    process, and all devices of the group as one.

    Raises:
        OSError: The leader's address cannot be listened on.
        ServiceError: jax finds none of its devices, or the store cannot be written.
    """
    place, secret = place_of(config), secrets.token_bytes(channel.NONCE_BYTES)
    host, port = _address(place)
    context, _ = _tls(config)
    try:
        leader = Leader(
            (listening(host), port),
            place.size,
            software(),
            secret,
            context=context,
            silence=failure.silence_seconds(config.launch_timeout),
            patience=config.launch_timeout,
        )
    except OSError as error:
        raise OSError(f"--leader {place.leader}: cannot listen on port {port} ({error.strerror})") from None
    store.objects.put(_key(place), secret)
    logs.say(f"rank 0 of {place.size} waits for the others at {place.leader}", address=place.leader)
    coordinator = f"{place.leader.rpartition(':')[0]}:{_free_port(listening(host))}"
    leader.gather(coordinator)
    connect(coordinator, place, listening=listening(host), detected=config.group)
    found = devices(store.cache)
    if found[0].platform != "cpu":
        # Its programs would have to be compiled where all devices of the group are.
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "NO_GROUP",
            f"a group computes on CPUs so far, and this is {found[0].kind}: start one server with all devices of the machine, or set "
            "JAX_PLATFORMS=cpu on all ranks",
        )
    leader.confirm(hardware())
    device = GroupDevice(leader)
    logs.say(f"the group of {place.size} ranks with {len(device.parts)} devices is complete")
    return found, device


def follow(config: Config, store: Store) -> tuple[Follower, RankMesh]:
    """Join a group as a rank other than the leader. Return the connection to the
    leader, and the devices of this process.

    Raises:
        RefusedError: The leader does not admit this rank.
        ServiceError: jax finds none of its devices.
    """
    place = place_of(config)
    host, port = _address(place)
    follower = Follower(
        (host, port),
        place.rank,
        place.size,
        software(),
        lambda: store.objects.get(_key(place)),
        context=lambda: _tls(config)[1],
        silence=failure.silence_seconds(config.launch_timeout),
    )
    connect(follower.coordinator, place, detected=config.group)
    devices(store.cache)
    mesh = RankMesh(store)
    follower.confirm(hardware())
    return follower, mesh


def _tls(config: Config) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """Return the TLS of the leader, and that of another rank."""
    if config.tls_cert is None or config.tls_key is None:
        return None, None
    return channel.contexts(config.tls_cert, config.tls_key)


def _key(place: Place) -> str:
    """Return the key of the secret in the store: who can read the store may join."""
    return f"groups/{codec.digest(place.leader.encode())}"


def _address(place: Place) -> tuple[str, int]:
    host, _, port = place.leader.rpartition(":")
    return host.strip("[]"), int(port)


def _free_port(host: str) -> int:
    """Return a free port. jax's coordinator cannot choose one itself."""
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
