"""Rename and delete: calls that change which names a server has."""

import contextlib

from hvpd._errors import AccessError, InvalidArgumentError, NotFoundError
from hvpd._transport.transport import Transport
from hvpd.v1 import objective_pb2, server_pb2


def deleted(transport: Transport, name: str) -> bool:
    """Delete a name; return whether the objective is gone. See `Client.delete`."""
    request = objective_pb2.DeleteObjectiveRequest(name=name)
    with contextlib.suppress(NotFoundError):  # An operator can delete objectives that its own tenant cannot see.
        find = objective_pb2.GetObjectiveRequest(name=name)
        request.digest = transport.unary(transport.channel.objectives.GetObjective, find).objective.digest
    try:
        return transport.unary(transport.channel.objectives.DeleteObjective, request).deleted
    except NotFoundError:
        if not request.digest:
            raise
        return True  # It was there a moment ago, so an earlier try of this call may have deleted it.


def renamed(transport: Transport, name: str, new: str) -> objective_pb2.Objective:
    """Rename an objective; return its description. See `Client.rename`."""
    objectives = transport.channel.objectives
    found = transport.unary(objectives.GetObjective, objective_pb2.GetObjectiveRequest(name=name)).objective
    if found.name != name and not found.name.endswith(f"/{name}"):
        raise InvalidArgumentError(
            f"{name!r} is a digest: register the objective with the new name", reason="INVALID_NAME"
        )
    tenant = transport.unary(transport.channel.server.GetUsage, server_pb2.GetUsageRequest()).usages[0].tenant
    if tenant and not found.name.startswith(f"{tenant}/"):
        raise AccessError(
            f"objective {found.name!r} is not tenant {tenant}'s own: only its owner can rename it", reason="NOT_YOURS"
        )
    with contextlib.suppress(NotFoundError):
        there = transport.unary(objectives.GetObjective, objective_pb2.GetObjectiveRequest(name=new)).objective
        if there.digest != found.digest:
            raise InvalidArgumentError(
                f"the name {new!r} belongs to another objective ({there.digest[:12]}): delete that name first",
                reason="NAME_TAKEN",
            )
    create = objective_pb2.CreateObjectiveRequest(digest=found.digest, name=new)
    renamed = transport.unary(objectives.CreateObjective, create).objective
    if renamed.name != found.name:
        delete = objective_pb2.DeleteObjectiveRequest(name=name, digest=found.digest)
        transport.unary(objectives.DeleteObjective, delete)
    return renamed
