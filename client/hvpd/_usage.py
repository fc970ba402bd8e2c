"""What a tenant may use of a server, and uses."""

import dataclasses

from hvpd.v1 import server_pb2


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a tenant may use, and uses now. A limit of None is as much as there is."""

    tenant: str
    """Who; empty where the server tells nobody apart, and then it is of all together."""
    weight: float
    """Share of the device, in proportion to those of the others who wait for it."""
    vectors_per_second_limit: float | None
    """Most vectors that are multiplied in a second; a point that is made counts as one."""
    vectors_in_flight: int
    """Vectors that wait for the device, or are being multiplied; counted only where something of this is limited."""
    vectors_in_flight_limit: int | None
    device_share_limit: float | None
    """Most seconds of device time in a second, on the average over ten."""
    resident_bytes: int
    """Points, their residuals and the data that they need, on the device that has most."""
    resident_bytes_limit: int | None
    """On each device."""
    stored_bytes: int
    """Blobs in the store."""
    stored_bytes_limit: int | None


def usage(message: server_pb2.Usage) -> Usage:
    """As the server tells it."""
    fields = {field.name for field in dataclasses.fields(Usage)}
    limits = {name for name in fields if name.endswith("_limit")}
    values = {name: getattr(message, name) for name in fields}
    return Usage(**values | {name: None for name in limits if not message.HasField(name)})  # type: ignore[arg-type]
