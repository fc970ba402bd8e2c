"""The checks of the conformance suite, in the order in which they run."""

import contextlib
import queue
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from hvpd._conformance.golden import PLACE, Golden
from hvpd._transport.raw_calls import RawCalls, RefusedError
from hvpd._wire import codec, vector_protocol
from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2

_UNKNOWN: Final = bytes.fromhex("f27f0548656c6c6f")
"""A field with the number 2046, which no message has."""

_SOCKET_SECONDS: Final = 10.0
"""Seconds to wait for bytes of the vector port."""


class FailedError(Exception):
    """The server did something else than the protocol says."""


class SkippedError(Exception):
    """A check does not apply to this server, or needs an earlier one that failed."""


class Server:
    """The server under test, with what earlier checks left behind.

    Args:
        calls: Raw calls to it.
        golden: The golden frames.
        host: Its host.
        encrypted: Whether it uses TLS.
    """

    def __init__(self, calls: RawCalls, golden: Golden, host: str, *, encrypted: bool) -> None:
        self.calls = calls
        self.golden = golden
        self.host = host
        self.encrypted = encrypted
        self.name = f"hvpd-conformance/{secrets.token_hex(8)}"
        self.registered = False
        self.vector_port = 0
        self.point_id = ""

    def frame(self, name: str) -> bytes:
        """Return a golden frame, with the id of the point."""
        found = self.golden.frames[name]
        if PLACE not in found:
            return found
        if len(self.point_id) != len(PLACE):
            raise SkippedError("there is no point")
        return found.replace(PLACE, self.point_id.encode())


def _equal(found: codec.Array, expected: codec.Array, what: str) -> None:
    if found.shape != expected.shape:
        raise FailedError(f"{what} must have the shape {list(expected.shape)}, got {list(found.shape)}")
    error = np.abs(found - expected).max()
    if not error <= 1e-12 * max(1.0, np.abs(expected).max()):
        raise FailedError(f"{what} must be {expected.tolist()}, got {found.tolist()}")


def _doubles(data: bytes, what: str) -> codec.Array:
    if len(data) % 8:
        raise FailedError(f"{what} must be float64, got {len(data)} bytes")
    return np.frombuffer(data, "<f8")


def _refused(call: Callable[[], object], code: str, *reasons: str) -> None:
    """Check that a call fails with a code, and with one of the reasons."""
    try:
        call()
    except RefusedError as error:
        if error.code != code or (reasons and error.reason not in reasons):
            raise FailedError(f"the call must fail with {code} ({' or '.join(reasons)}), got {error}") from None
        return
    raise FailedError(f"the call must fail with {code} ({' or '.join(reasons)}), and it succeeded")


# Server and blobs


def server_states_its_revisions(server: Server) -> None:
    answer = server.calls.unary("hvpd.v1.ServerService/GetServer", server.frame("get_server"))
    found = server_pb2.GetServerResponse.FromString(answer)
    server.vector_port = found.vector_port
    if not found.min_protocol <= 1 <= found.max_protocol:
        raise FailedError(f"revision 1 must be served, got {found.min_protocol} to {found.max_protocol}")


def server_is_healthy(server: Server) -> None:
    answer = server.calls.unary("grpc.health.v1.Health/Check", b"")
    if answer != b"\x08\x01":
        raise FailedError(f"grpc.health.v1 must answer SERVING (0801), got {answer.hex()}")


def unknown_fields_are_ignored(server: Server) -> None:
    server.calls.unary("hvpd.v1.ServerService/GetServer", server.frame("get_server") + _UNKNOWN)


def malformed_messages_are_refused(server: Server) -> None:
    _refused(lambda: server.calls.unary("hvpd.v1.ObjectiveService/GetObjective", b"\xff\xff\xff"), "INVALID_ARGUMENT")


def unknown_methods_are_refused(server: Server) -> None:
    _refused(lambda: server.calls.unary("hvpd.v1.ServerService/Conform", b""), "UNIMPLEMENTED")


def blobs_are_stored(server: Server) -> None:
    blobs = server.golden.blobs
    for digest, content in blobs.items():
        half = len(content) // 2
        requests = [
            blob_pb2.UploadBlobRequest(digest=digest, size_bytes=len(content), chunk=content[:half]),
            blob_pb2.UploadBlobRequest(offset_bytes=half, chunk=content[half:]),
        ]
        messages = [request.SerializeToString() for request in requests]
        answer = server.calls.upload("hvpd.v1.BlobService/UploadBlob", messages)
        if blob_pb2.UploadBlobResponse.FromString(answer).size_bytes != len(content):
            raise FailedError(f"the answer of an upload must state {len(content)} bytes")
    request = blob_pb2.FindMissingBlobsRequest(digests=[*blobs, "1" * 64]).SerializeToString()
    answer = server.calls.unary("hvpd.v1.BlobService/FindMissingBlobs", request)
    missing = list(blob_pb2.FindMissingBlobsResponse.FromString(answer).missing_digests)
    if missing != ["1" * 64]:
        raise FailedError(f"only the blob that was not uploaded must be missing, got {missing}")


def blobs_with_wrong_digests_are_refused(server: Server) -> None:
    frame = server.frame("upload_wrong")
    _refused(
        lambda: server.calls.upload("hvpd.v1.BlobService/UploadBlob", [frame]), "INVALID_ARGUMENT", "DIGEST_MISMATCH"
    )


# Objectives


def objective_is_registered(server: Server) -> None:
    request = objective_pb2.CreateObjectiveRequest(digest=server.golden.bundle, name=server.name)
    answer = server.calls.unary("hvpd.v1.ObjectiveService/CreateObjective", request.SerializeToString())
    server.registered = True
    found = objective_pb2.CreateObjectiveResponse.FromString(answer).objective
    if found.digest != server.golden.bundle:
        raise FailedError(f"the digest must be {server.golden.bundle}, got {found.digest}")


def objective_is_found(server: Server) -> None:
    _need(server.registered, "the objective was not registered")
    by_name = objective_pb2.GetObjectiveRequest(name=server.name).SerializeToString()
    for request in (by_name, server.frame("get_objective")):
        answer = server.calls.unary("hvpd.v1.ObjectiveService/GetObjective", request)
        bundle = objective_pb2.GetObjectiveResponse.FromString(answer).objective.bundle
        if (bundle.n, bundle.dtype) != (server.golden.n, "float64"):
            raise FailedError(
                f"the bundle must state n = {server.golden.n} and float64, got {bundle.n}, {bundle.dtype}"
            )


def unknown_objectives_are_not_found(server: Server) -> None:
    frame = server.frame("get_unknown")
    _refused(lambda: server.calls.unary("hvpd.v1.ObjectiveService/GetObjective", frame), "NOT_FOUND")


# Points


def _created(server: Server, first: bytes, *chunks: bytes) -> tuple[bool, curvature_pb2.Point, codec.Array]:
    """Create a point.

    Returns:
        Whether the server asked for x, the point, and its gradient.
    """
    _need(server.registered, "the objective was not registered")
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    requests.put(first)
    wanted, point, gradient = False, None, b""
    for answer in server.calls.stream("hvpd.v1.CurvatureService/CreatePoint", iter(requests.get, None)):
        message = curvature_pb2.CreatePointResponse.FromString(answer)
        content = message.WhichOneof("content")
        if content == "x_wanted":
            wanted = True
            for chunk in chunks:
                requests.put(chunk)
            requests.put(None)
        elif content == "point":
            point = message.point
            requests.put(None)
        elif content == "chunk":
            gradient += message.chunk
    requests.put(None)
    if point is None:
        raise FailedError("CreatePoint must answer with the point, and it ended without one")
    return wanted, point, _doubles(gradient, "the gradient")


def point_has_value_and_gradient(server: Server) -> None:
    golden = server.golden
    _, point, gradient = _created(server, server.frame("point"))
    _equal(np.array([point.value]), np.array([golden.value(golden.x)]), "the value")
    _equal(gradient, golden.gradient(golden.x), "the gradient")
    server.point_id = point.id
    if len(point.id) != len(PLACE):
        raise FailedError(f"a point's id must have {len(PLACE)} characters, got {point.id!r}")
    _, again, _ = _created(server, server.frame("point"))
    if again.id != point.id:
        raise FailedError("the same objective, data and x must give the same id")


def x_is_asked_for(server: Server) -> None:
    golden = server.golden
    chunks = (server.frame("point_far_begin"), server.frame("point_far_end"))
    _, point, gradient = _created(server, server.frame("point_far"), *chunks)
    _equal(np.array([point.value]), np.array([golden.value(golden.far)]), "the value")
    _equal(gradient, golden.gradient(golden.far), "the gradient")
    wanted, _, _ = _created(server, server.frame("point_far"))
    if wanted:
        raise FailedError("x must not travel again to a point that was just created")


# Products


def _product(server: Server, name: str) -> codec.Array:
    answer = server.calls.unary("hvpd.v1.CurvatureService/ComputeProduct", server.frame(name))
    return _doubles(curvature_pb2.ComputeProductResponse.FromString(answer).vectors, "the product")


def product_of_one_vector(server: Server) -> None:
    golden = server.golden
    _equal(_product(server, "product"), golden.product(golden.x, golden.vectors[0]), "the product")


def product_of_a_block(server: Server) -> None:
    golden = server.golden
    _equal(_product(server, "product_block"), golden.product(golden.x, golden.vectors).ravel(), "the product")


def quadratic_form(server: Server) -> None:
    golden = server.golden
    expected = np.sum(golden.vectors * golden.product(golden.x, golden.vectors), axis=1)
    _equal(_product(server, "quadratic_form"), expected, "the quadratic form")


def products_of_wrong_sizes_are_refused(server: Server) -> None:
    _refused(lambda: _product(server, "product_short"), "INVALID_ARGUMENT")


def unknown_points_are_not_resident(server: Server) -> None:
    frame = server.golden.frames["product"]  # its point is 0000...
    call = "hvpd.v1.CurvatureService/ComputeProduct"
    _refused(lambda: server.calls.unary(call, frame), "NOT_FOUND", "POINT_NOT_RESIDENT")


def _streamed(server: Server, *names: str) -> dict[int, tuple[bytes, int]]:
    """Send frames on one stream; return the bytes and the code of each tag's answer."""
    found: dict[int, tuple[bytes, int]] = {}
    frames = [server.frame(name) for name in names]
    for answer in server.calls.stream("hvpd.v1.CurvatureService/StreamProducts", frames):
        message = curvature_pb2.StreamProductsResponse.FromString(answer)
        data, _ = found.get(message.tag, (b"", 0))
        found[message.tag] = (data + message.chunk, message.error.code)
    return found


def interleaved_products_on_a_stream(server: Server) -> None:
    golden = server.golden
    found = _streamed(server, "stream_1_begin", "stream_2_begin", "stream_1_end", "stream_2_end")
    for tag, V in ((11, golden.vectors[:1]), (12, golden.vectors)):
        if tag not in found or found[tag][1]:
            raise FailedError(f"the product with tag {tag} must be answered, got {found.get(tag)}")
        _equal(
            _doubles(found[tag][0], "the product"), golden.product(golden.x, V).ravel(), f"the product with tag {tag}"
        )


def stream_goes_on_after_a_refusal(server: Server) -> None:
    golden = server.golden
    found = _streamed(server, "stream_refused", "stream_after")
    if found.get(13, (b"", 0))[1] != _INVALID:
        raise FailedError(f"a product with too many bytes must be refused with code {_INVALID}, got {found.get(13)}")
    expected = golden.product(golden.x, golden.vectors[0])
    _equal(_doubles(found.get(14, (b"", 0))[0], "the product"), expected, "the product after the refusal")


_INVALID: Final = 3
"""gRPC's number of INVALID_ARGUMENT."""


def product_on_the_vector_port(server: Server) -> None:
    _need(bool(server.vector_port), "the server has no vector port")
    _need(not server.encrypted, "the vector port uses TLS, and this check sends plain bytes")
    answer = server.calls.unary("hvpd.v1.CurvatureService/CreateVectorTicket", b"")
    ticket = curvature_pb2.CreateVectorTicketResponse.FromString(answer)
    golden, spec = server.golden, server.frame("vector_spec")
    payload = golden.vectors[0].tobytes()
    with contextlib.closing(socket.create_connection((server.host, ticket.port), _SOCKET_SECONDS)) as sock:
        greeting = _read(sock, len(vector_protocol.MAGIC) + len(ticket.greeting))
        if greeting != vector_protocol.MAGIC + ticket.greeting:
            raise FailedError(f"the port must greet with the ticket's greeting, got {greeting.hex()}")
        sock.sendall(vector_protocol.MAGIC + ticket.id)
        if _read(sock, len(ticket.server_proof)) != ticket.server_proof:
            raise FailedError("the port must send the ticket's server_proof")
        sock.sendall(ticket.client_proof + vector_protocol.request(spec, len(payload), 0) + payload)
        size, kind, result = vector_protocol.RESPONSE.unpack(_read(sock, vector_protocol.RESPONSE.size))
        message = _read(sock, size)
        if kind != vector_protocol.ANSWERED or result != len(payload):
            raise FailedError(
                f"the port must answer with {len(payload)} bytes, got kind {kind}, {result} bytes, {message!r}"
            )
        curvature_pb2.ProductInfo.FromString(message)
        _equal(_doubles(_read(sock, result), "the product"), golden.product(golden.x, golden.vectors[0]), "the product")


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = sock.recv(size - len(data))
        if not received:
            raise FailedError(f"the vector port closed after {len(data)} of {size} bytes")
        data += received
    return data


def objective_is_deleted(server: Server) -> None:
    _need(server.registered, "the objective was not registered")
    request = objective_pb2.DeleteObjectiveRequest(name=server.name).SerializeToString()
    server.calls.unary("hvpd.v1.ObjectiveService/DeleteObjective", request)
    server.registered = False
    found = objective_pb2.GetObjectiveRequest(name=server.name).SerializeToString()
    _refused(lambda: server.calls.unary("hvpd.v1.ObjectiveService/GetObjective", found), "NOT_FOUND")


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise SkippedError(why)


CHECKS: Final[tuple[Callable[[Server], None], ...]] = (
    server_states_its_revisions,
    server_is_healthy,
    unknown_fields_are_ignored,
    malformed_messages_are_refused,
    unknown_methods_are_refused,
    blobs_are_stored,
    blobs_with_wrong_digests_are_refused,
    objective_is_registered,
    objective_is_found,
    unknown_objectives_are_not_found,
    point_has_value_and_gradient,
    x_is_asked_for,
    product_of_one_vector,
    product_of_a_block,
    quadratic_form,
    products_of_wrong_sizes_are_refused,
    unknown_points_are_not_resident,
    interleaved_products_on_a_stream,
    stream_goes_on_after_a_refusal,
    product_on_the_vector_port,
    objective_is_deleted,
)
"""All checks. The last one removes what the others registered."""


def names() -> Iterator[str]:
    """Yield the names of the checks, in words."""
    for check in CHECKS:
        yield check.__name__.replace("_", " ")


def run(server: Server, check: Callable[[Server], Any]) -> tuple[str, str]:
    """Return the outcome of a check, "ok", "FAIL" or "skip", and why."""
    try:
        check(server)
    except SkippedError as skipped:
        return "skip", str(skipped)
    except FailedError as failed:
        return "FAIL", str(failed)
    except RefusedError as refused:
        return "FAIL", f"the server refused: {refused}"
    except (OSError, ValueError, DecodeError) as error:
        return "FAIL", f"the answer cannot be read: {type(error).__name__}: {error}"
    return "ok", ""
