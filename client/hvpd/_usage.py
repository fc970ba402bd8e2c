"""The limits and the usage of a tenant."""

import dataclasses

from hvpd._transport.transport import Transport
from hvpd.v1 import server_pb2


@dataclasses.dataclass(frozen=True)
class Usage:
    """The limits and the current usage of a tenant. A limit of None does not limit.

    Example:
        >>> usage = client.usage()
        >>> usage.stored_bytes, usage.stored_bytes_limit
    """

    tenant: str
    """Name of the tenant; empty for all clients of a server without tenants."""
    weight: float
    """Share of the device, relative to the weights of the other waiting tenants."""
    vectors_per_second_limit: float | None
    """Most vectors that are multiplied in a second. A new point counts as one."""
    vectors_in_flight: int
    """Vectors that wait for the device or are multiplied now.

    They are counted only if they are limited."""
    vectors_in_flight_limit: int | None
    device_share_limit: float | None
    """Most seconds of device time in a second, averaged over ten seconds."""
    resident_bytes: int
    """Bytes of points, residuals and data on the device that has most."""
    resident_bytes_limit: int | None
    """Most bytes on each device."""
    stored_bytes: int
    """Bytes of blobs, names and registrations in the store."""
    stored_bytes_limit: int | None
    transit_bytes: int = 0
    """Bytes of vectors and answers in the host's memory; 0 from hvpd 0.1."""
    transit_bytes_limit: int | None = None
    program_bytes: int = 0
    """Bytes of compiled programs in the host's memory, estimated; 0 from hvpd 0.1."""
    program_bytes_limit: int | None = None
    """Most bytes in memory, and as many on the disk."""
    cached_program_bytes: int = 0
    """Bytes of compiled programs in the cache on the server's disk; 0 from hvpd 0.1."""


def usage(message: server_pb2.Usage) -> Usage:
    """Read the server's message."""
    fields = {field.name for field in dataclasses.fields(Usage)}
    limits = {name for name in fields if name.endswith("_limit")}
    values = {name: getattr(message, name) for name in fields}
    return Usage(**values | {name: None for name in limits if not message.HasField(name)})  # type: ignore[arg-type]


def usages(transport: Transport, *, all_tenants: bool = False) -> list[Usage]:
    """Ask for the usage of the own tenant, or of all tenants by name."""
    request = server_pb2.GetUsageRequest(all_tenants=all_tenants)
    response: server_pb2.GetUsageResponse = transport.unary(transport.channel.server.GetUsage, request)
    return list(map(usage, response.usages))
