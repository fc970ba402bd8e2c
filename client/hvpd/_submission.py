"""Send a traced objective to the server: ask early, upload, register."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hvpd import _text
from hvpd._check.verdicts import REGISTRATION_BYTES
from hvpd._errors import HvpdError, IncompatibleError, InvalidArgumentError, OverloadedError
from hvpd._transport.transport import Transport
from hvpd._warnings import warn
from hvpd._wire import codec
from hvpd.v1 import objective_pb2

if TYPE_CHECKING:
    from hvpd._registration.bundle import Export

_log = logging.getLogger("hvpd")


def submit(
    transport: Transport, export: "Export", name: str | None, x_leaves: Sequence[Any] = (), *, shared: bool = False
) -> objective_pb2.Objective:
    """Upload missing blobs and register the objective, with its x for the check."""
    _check_platform(transport, export.bundle)
    request = objective_pb2.CreateObjectiveRequest(digest=export.digest, name=name or "", shared=shared)
    blobs: dict[str, codec.Buffer] = dict(export.blobs)
    if x_leaves and export.bundle.n * np.dtype(export.bundle.dtype).itemsize <= REGISTRATION_BYTES:
        parts = [np.asarray(leaf).reshape(-1).astype(export.bundle.dtype) for leaf in x_leaves]
        x = codec.payload(np.concatenate(parts))
        request.x_digest = codec.digest(x)
        blobs[request.x_digest] = x
    # Each try may find one blob corrupt on the server's disk, or removed since the
    # last look, and send it anew.
    create = transport.channel.objectives.CreateObjective
    began = time.monotonic()
    for last in [False] * len(export.blobs) + [True]:
        _upload(transport, name, blobs, request, export.blobs)
        try:
            with transport.reporter.stage("compiling on the server"):
                response = transport.unary(create, request)
            break
        except HvpdError as error:
            if last or error.reason not in ("BLOBS_MISSING", "BLOB_CORRUPT"):
                raise
    seconds = time.monotonic() - began
    _log.info("registered %s (%s), upload and compile took %.1f s", name or "an objective", export.digest, seconds)
    mode = response.objective.derivation.mode
    if mode and mode != export.bundle.mode:
        warn(
            f"jax forbids mode {export.bundle.mode!r} for this function, which has a custom_vjp inside: it is registered with "
            f"mode {mode!r}",
        )
    return response.objective


def _upload(
    transport: Transport,
    name: str | None,
    blobs: dict[str, codec.Buffer],
    request: objective_pb2.CreateObjectiveRequest,
    needed: "Mapping[str, codec.Buffer]",
) -> None:
    """Upload the blobs of a registration that the server lacks.

    If there is no room for the x of the check, leave x out of blobs and request.
    """
    missing = transport.missing(list(blobs))
    if not missing:
        return
    sizes = {digest: memoryview(blobs[digest]).nbytes for digest in missing}
    check_may_register(transport, name, [sizes[digest] for digest in missing if digest in needed])
    with transport.reporter.stage("uploading", sum(sizes.values()), "B") as stage:
        for digest in missing:
            try:
                transport.upload(digest, blobs[digest], stage)
            except OverloadedError:
                if digest in needed:
                    raise
                request.x_digest = ""  # A registration must not fail because of its check.
                del blobs[digest]
    _log.info("uploaded %d blobs of %d bytes", len(sizes), sum(sizes.values()))


def check_may_register(transport: Transport, name: str | None, upload_bytes: Sequence[int] = ()) -> None:
    """Ask whether the server would register a name, and store blobs of these sizes.

    The answer comes before the client traces or uploads anything.

    Raises:
        HvpdError: The server would refuse it.
    """
    if name is not None and not isinstance(name, str):
        raise InvalidArgumentError(f"a name must be a string, got {_text.described(name)}", reason="INVALID_NAME")
    if name == "":
        raise InvalidArgumentError(
            "the name is empty: leave out `name` for an objective without one", reason="INVALID_NAME"
        )
    request = objective_pb2.CreateObjectiveRequest(name=name or "", validate_only=True, upload_bytes=upload_bytes)
    try:
        transport.unary(transport.channel.objectives.CreateObjective, request)
    except HvpdError as error:
        # A server that does not know `validate_only` misses the digest.
        if error.reason not in ("BLOBS_MISSING", "INVALID_DIGEST"):
            raise


def check_has_room(transport: Transport, name: str | None, arrays: Sequence[codec.Array]) -> None:
    """Ask whether the server has room for data, before the client traces.

    Raises:
        HvpdError: The server would refuse it.
    """
    if not arrays:
        return
    try:
        check_may_register(transport, name, [array.nbytes for array in arrays])
    except OverloadedError:
        # Hashing takes long. So the client asks for what the server has only now.
        sizes = {codec.digest(codec.payload(array)): array.nbytes for array in arrays}
        check_may_register(transport, name, [sizes[digest] for digest in transport.missing(list(sizes))])


def _check_platform(transport: Transport, bundle: objective_pb2.Bundle) -> None:
    """Raise IncompatibleError if a program has no branch for the server's
    platform.
    """
    server = transport.server
    if bundle.platforms and server.platform not in bundle.platforms:
        raise IncompatibleError(
            f"the server at {transport.address} computes on {server.platform}, and the objective has branches for "
            f"{', '.join(bundle.platforms)} only: register it with platforms=({server.platform!r}, ...)",
            reason="BUNDLE_INCOMPATIBLE",
        )
