"""ObjectiveService: objectives by name and digest."""

import contextlib
import logging

from google.protobuf import timestamp_pb2

from hvpd import _text
from hvpd.v1 import objective_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.engine.objective import Objective
from hvpd_server.errors import ServiceError, invalid
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.methods import unary
from hvpd_server.rpc.products import Cancellation

_log = logging.getLogger(__name__)

_MESSAGE_BYTES = 4 << 20
"""Most bytes of a reply that a client accepts."""

_REST_BYTES = 64 << 10
"""Bytes in a reply for an objective's name, time and check, which are not known before
it is registered.
"""

_PAGE_BYTES = 2 << 20
"""Bytes of objectives after which a page ends. Their structures count, because they
take time to read.
"""

_PAGE = 100
"""Most objectives of a page."""

_ERROR_CHARACTERS = 1000
"""Most characters of a compile's error in a plan."""


class ObjectiveService:
    """Objectives by name and digest."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @unary
    def CreateObjective(  # noqa: N802
        self, request: objective_pb2.CreateObjectiveRequest, call: GrpcCall
    ) -> objective_pb2.CreateObjectiveResponse:
        owner = call.owner
        call.objective = request.name or request.digest
        if request.validate_only:
            self._engine.registration.validate(request.name, request.upload_bytes, owner)
            return objective_pb2.CreateObjectiveResponse()
        cancellation = Cancellation.of(call)
        registered = self._engine.registration.register(
            request.digest,
            request.name,
            request.x_digest,
            tenant=owner,
            shared=request.shared,
            accept=_check_fits,
            on_wait=cancellation.on_queue,
        )
        name, digest, created = self._engine.owners.find(owner, request.name or request.digest)
        # Another call may have given the name to another objective meanwhile.
        bundle = registered.bundle if digest == registered.digest else self._engine.objectives.bundle(digest)
        return objective_pb2.CreateObjectiveResponse(objective=self._message(name, digest, created, owner, bundle))

    @unary
    def GetObjective(  # noqa: N802
        self, request: objective_pb2.GetObjectiveRequest, call: GrpcCall
    ) -> objective_pb2.GetObjectiveResponse:
        call.objective = request.name
        name, digest, created = self._engine.owners.find(call.owner, request.name)
        objectives = self._engine.objectives
        if objectives.derivation(digest) is None:  # A server of another version has registered it.
            cancellation = Cancellation.of(call)
            with contextlib.suppress(ServiceError):  # The client's next call gets the error.
                objectives.load(digest, call.owner, on_wait=cancellation.on_queue)
        objectives.prepare(digest)
        objective = self._message(name, digest, created, call.owner, self._engine.objectives.bundle(digest))
        return objective_pb2.GetObjectiveResponse(objective=objective)

    @unary
    def ListObjectives(  # noqa: N802
        self, request: objective_pb2.ListObjectivesRequest, call: GrpcCall
    ) -> objective_pb2.ListObjectivesResponse:
        size = min(request.page_size or _PAGE, _PAGE)
        if size < 0:
            raise invalid(
                "INVALID_PAGE",
                f"page_size must be from 0 to {_PAGE}, where 0 and more than {_PAGE} mean {_PAGE}; got {size}",
            )
        if len(request.page_token) > 9 or not (request.page_token or "0").isdecimal():
            raise invalid(
                "INVALID_PAGE",
                f"page_token must be a next_page_token of this server, or empty for the first page; got "
                f"{_text.quoted(request.page_token, 40)}",
            )
        start = int(request.page_token or 0)
        owner = call.owner
        known = self._engine.owners.listing(owner)
        response = objective_pb2.ListObjectivesResponse()
        used, end = 0, min(start + size, len(known))
        for index in range(start, end):
            name, digest, created = known[index]
            try:
                objective = self._message(name, digest, created, owner, self._engine.objectives.bundle(digest))
            except ServiceError as error:
                _log.error("objective %s cannot be listed: %s", name or digest, error)
                continue
            used += objective.ByteSize()
            if response.objectives and used > _PAGE_BYTES:
                end = index
                break
            for structure in ("x_tree", "x_leaves", "data_tree"):
                objective.bundle.ClearField(structure)
            for long in ("residuals", "dense_layers", "recognised", "presumed"):
                objective.derivation.ClearField(long)
            if objective.ByteSize() > _MESSAGE_BYTES - _REST_BYTES // 2:  # An older server has registered it.
                _log.error("objective %s cannot be listed: it is larger than a message", name or digest)
                continue
            response.objectives.append(objective)
        if end < len(known):
            response.next_page_token = str(end)
        return response

    @unary
    def GetPlan(  # noqa: N802
        self, request: objective_pb2.GetPlanRequest, call: GrpcCall
    ) -> objective_pb2.GetPlanResponse:
        call.objective = request.digest
        plan = self._engine.choices(request.digest, call.owner)
        for compile_ in plan.compiles:
            compile_.error = _text.cut(compile_.error, _ERROR_CHARACTERS)
        excess = plan.ByteSize() - _MESSAGE_BYTES
        while excess > 0:
            excess -= plan.compiles.pop().ByteSize()
        return plan

    @unary
    def DeleteObjective(  # noqa: N802
        self, request: objective_pb2.DeleteObjectiveRequest, call: GrpcCall
    ) -> objective_pb2.DeleteObjectiveResponse:
        call.objective = request.name
        found = self._engine.registration.delete(
            request.name,
            call.owner,
            expected=request.digest,
            every_tenant=call.may_administer,
        )
        return objective_pb2.DeleteObjectiveResponse(digest=found.digest, deleted=found.gone)

    @unary
    def ReleaseObjective(  # noqa: N802
        self, request: objective_pb2.ReleaseObjectiveRequest, call: GrpcCall
    ) -> objective_pb2.ReleaseObjectiveResponse:
        call.objective = request.name
        return objective_pb2.ReleaseObjectiveResponse(strikes=self._engine.registration.release(request.name))

    def _message(
        self, name: str, digest: str, created: int, owner: str, bundle: objective_pb2.Bundle
    ) -> objective_pb2.Objective:
        created_at = timestamp_pb2.Timestamp()
        created_at.FromNanoseconds(created)
        tenant, _ = self._engine.owners.told(owner, digest)
        check = self._engine.checks.found(digest, bundle, tenant)
        return objective_pb2.Objective(
            name=name,
            digest=digest,
            bundle=bundle,
            create_time=created_at,
            check=check,
            derivation=self._engine.objectives.derivation(digest),
        )


def _check_fits(objective: Objective) -> None:
    """Raise ServiceError if no reply has room for an objective."""
    bundle, derived = objective.bundle.ByteSize(), objective.described.ByteSize()
    if bundle + derived > _MESSAGE_BYTES - _REST_BYTES:
        raise invalid(
            "BUNDLE_INVALID",
            f"the bundle has {bundle} bytes and its derived programs have {derived}, together at most "
            f"{_MESSAGE_BYTES - _REST_BYTES} are allowed: x or data must have fewer leaves, with shorter names",
        )
