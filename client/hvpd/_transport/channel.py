"""A gRPC channel to one server: opening it, greeting the server, the methods on it."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from hvpd._errors import HvpdError, IncompatibleError, UnavailableError, failure_of_rpc, to_error
from hvpd._transport.credentials import CallMetadata, Pairs, Token
from hvpd._transport.interrupts import never_free
from hvpd._transport.reach import Unreachable, unreachable
from hvpd._transport.tls import Tls, diagnose
from hvpd._version import __version__
from hvpd._wire import frames, protocol
from hvpd._wire import request_id as _request_id
from hvpd.v1 import blob_pb2, curvature_pb2, krylov_pb2, objective_pb2_grpc, server_pb2, server_pb2_grpc

_T = TypeVar("_T")

_PATIENCE = 0.5
"""Seconds without an answer after which the client looks for the reason."""

_CONNECT_SECONDS = 10.0
"""Seconds to wait for a server by default."""

_LOOKS = 2
"""Looks in a row that must find nothing at the address before a client without a
connect_timeout gives up.
"""

_PAUSE = 0.1
"""Seconds before a server that ended while it answered is asked again."""

_ALIVE_SECONDS = 10.0
"""Seconds within which a living server answers."""

_MESSAGE_BYTES = 4 << 20
"""Largest message in either direction."""

_CODE = grpc.StatusCode


class Channel:
    """A gRPC channel, and the methods that are called on it.

    Args:
        address: "host:port".
        token: Bearer token of each call; None for none.
        tls: Certificates to trust and to show; None for plain text.
        local: Whether the server is on this machine. Then no proxy is used.

    Attributes:
        tls: Certificates to trust and to show; None for plain text.
    """

    def __init__(self, address: str, token: Token | None, tls: Tls | None, *, local: bool) -> None:
        self._address = address
        self.tls = tls
        self._local = local
        self._lock = threading.Lock()
        self._token = token
        self._revision = protocol.NEWEST
        self._told = set[Any]()
        """Calls that `close` waits for."""
        self._open()

    def token(self) -> str:
        """Return the token of new calls; empty for none."""
        return self._token.text if self._token is not None else ""

    def renew_token(self, refused: str) -> bool:
        """Return whether there is another token than the one that the server refused;
        see `Token.renew`.
        """
        return self._token is not None and self._token.renew(refused)

    @property
    def metadata(self) -> Pairs:
        """Return the metadata of each call, without its id."""
        said: Pairs = ((protocol.REVISION_KEY, str(self._revision)), (protocol.VERSION_KEY, __version__))
        return said if self._token is None else (*said, ("authorization", f"Bearer {self._token.text}"))

    def _open(self) -> None:
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # These find a dead network within half a minute, also while a product
            # computes.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_send_message_length", _MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            # A connection of its own, because an interrupt may have left others behind.
            ("grpc.use_local_subchannel_pool", 1),
            *([("grpc.enable_http_proxy", 0)] if self._local else []),
            *([("grpc.ssl_target_name_override", name)] if (name := self.tls and self.tls.server_name) else []),
        ]
        if self.tls is None:
            self._channel = grpc.insecure_channel(self._address, options)
        else:
            self._channel = grpc.secure_channel(self._address, self.tls.credentials, options)
        self.find_missing = _method(self._channel, blob_pb2, "FindMissingBlobs")
        self.upload = _method(self._channel, blob_pb2, "UploadBlob")
        self.prune_blobs = _method(self._channel, blob_pb2, "PruneBlobs")
        self.create_point = _method(self._channel, curvature_pb2, "CreatePoint")
        self.stream_products = _method(self._channel, curvature_pb2, "StreamProducts")
        self.create_vector_ticket = _method(self._channel, curvature_pb2, "CreateVectorTicket")
        self.compute_factors = _method(self._channel, curvature_pb2, "ComputeFactors")
        self.start_run = _method(self._channel, krylov_pb2, "StartRun")
        self.extend_run = _method(self._channel, krylov_pb2, "ExtendRun")
        self.append_run = _method(self._channel, krylov_pb2, "AppendRun")
        self.restart_run = _method(self._channel, krylov_pb2, "RestartRun")
        self.combine_run = _method(self._channel, krylov_pb2, "CombineRun")
        self.compute = _method(self._channel, krylov_pb2, "Compute")
        self.close_run = _method(self._channel, krylov_pb2, "CloseRun")
        self.server = server_pb2_grpc.ServerServiceStub(self._channel)
        self.objectives = objective_pb2_grpc.ObjectiveServiceStub(self._channel)
        self.check_health: Callable[..., bytes] = self._channel.unary_unary("/grpc.health.v1.Health/Check")

    def replace(self, *others: object) -> None:
        """Open another channel after an interrupt, and leave this one as it is.

        Calls of other threads continue on the old channel.

        Args:
            others: Objects of the old channel, which must never be freed either.
        """
        with self._lock:
            never_free((self._channel, others, self._told))
            self._told = set()
            self._open()

    @property
    def raw(self) -> grpc.Channel:
        """Return gRPC's channel, for calls with bytes."""
        return self._channel

    def await_at_end(self, call: Any) -> None:
        """Let `close` wait for a call, a future of gRPC that has a timeout."""
        self._told.add(call)
        call.add_done_callback(self._told.discard)

    def close(self) -> None:
        """End all calls and the connection."""
        for call in list(self._told):
            call.exception()
        self._channel.close()

    def new_call(self) -> tuple[CallMetadata, str]:
        """Return the metadata and the id of a new call."""
        request_id = _request_id.new()
        return CallMetadata(lambda: self.metadata, ((_request_id.KEY, request_id),)), request_id

    def greet(self, connect_timeout: float | None) -> server_pb2.GetServerResponse:
        """Ask for the server's facts, and choose the revision of the protocol.

        Args:
            connect_timeout: Seconds to wait for an answer. None for 10 seconds, and for
                one second if the port refuses connections or the host has no address.

        Raises:
            UnavailableError: No server answers, or client and server disagree on TLS.
            IncompatibleError: It is no hvpd server, or speaks other revisions.
            AccessError: The server does not know the token.
        """
        try:
            server = self._ask_server(connect_timeout)
        except grpc.RpcError as error:
            failure = failure_of_rpc(error)
            if failure.code in (_CODE.DEADLINE_EXCEEDED, _CODE.UNAVAILABLE):
                seconds = _CONNECT_SECONDS if connect_timeout is None else connect_timeout
                raise self._no_answer(unreachable(self._address, _PATIENCE), f" (waited {seconds:g} s)") from None
            raise to_error(failure, self._address) from None
        if not server.min_protocol <= protocol.NEWEST or not server.max_protocol >= protocol.OLDEST:
            raise IncompatibleError(
                f"the server at {self._address} (hvpd {server.version}) speaks protocol {server.min_protocol} to "
                f"{server.max_protocol}, this client (hvpd {__version__}) {protocol.OLDEST} to {protocol.NEWEST}: "
                "install the same version on both",
                reason="PROTOCOL_MISMATCH",
            )
        self._revision = min(protocol.NEWEST, server.max_protocol)
        if self._token is not None:
            self._check_token()
        return server

    def _check_token(self) -> None:
        """Raise AccessError if the server does not know the token.

        `greet` needs no token. The rights of a token are checked by each call.
        """
        token = self.token()
        metadata, request_id = self.new_call()
        try:
            self.server.GetUsage(server_pb2.GetUsageRequest(), metadata=tuple(metadata), timeout=_ALIVE_SECONDS)
        except grpc.RpcError as error:
            failure = failure_of_rpc(error)
            if failure.code is _CODE.UNAUTHENTICATED and not self.renew_token(token):
                raise to_error(dataclasses.replace(failure, request_id=request_id), self._address) from None

    def _no_answer(self, found: Unreachable | None, waited: str = "") -> UnavailableError:
        said = f"no hvpd server answers at {self._address}{waited}: "
        if found is not None:
            return UnavailableError(said + found.text, reason=found.reason)
        return UnavailableError(
            said + "is it running there (`hvpd serve`), and is the address right (argument, or $HVPD_ADDRESS)?"
        )

    def _ask_server(self, connect_timeout: float | None) -> server_pb2.GetServerResponse:
        """Ask for the server's facts; without an answer, look for the reason.

        Raises:
            UnavailableError: TLS is the reason, or nothing listens at the address and
                the caller stated no timeout.
            grpc.RpcError: There is no answer, for another reason.
            HvpdError: gRPC reports success, without an answer.
        """
        # A caller that states a timeout may wait for a server that starts.
        waits, looks = connect_timeout is not None, 0
        connect_timeout = _CONNECT_SECONDS if connect_timeout is None else connect_timeout
        ends, patience = time.monotonic() + connect_timeout, min(_PATIENCE, connect_timeout / 2)
        metadata, _ = self.new_call()
        ask = functools.partial(
            self.server.GetServer.future, server_pb2.GetServerRequest(), metadata=tuple(metadata), wait_for_ready=True
        )
        asked = ask(timeout=connect_timeout)
        while True:
            # gRPC would try again until the timeout, and give no other reason than the
            # timeout.
            left = ends - time.monotonic()
            try:
                answer: server_pb2.GetServerResponse = asked.result(timeout=patience if left > patience else None)
            except grpc.FutureTimeoutError:
                why = diagnose(self._address, self.tls, min(1.0, max(left, 0.1)))
                if why is not None and not asked.done():
                    asked.cancel()
                    raise UnavailableError(f"no connection to {self._address}: {why}", reason="TLS") from None
                found = None if waits else unreachable(self._address, patience)
                looks = 0 if found is None else looks + 1
                if looks == _LOOKS and not asked.done():
                    asked.cancel()
                    raise self._no_answer(found) from None
            except grpc.RpcError as error:  # gRPC does not repeat a call that reached a server.
                left = ends - time.monotonic() - _PAUSE
                if failure_of_rpc(error).code is not _CODE.UNAVAILABLE or left <= 0:
                    raise
                time.sleep(_PAUSE)
                asked = ask(timeout=left)
            else:
                return answered(answer, self._address)

    def is_alive(self) -> bool:
        """Return whether the server answers."""
        try:
            self.server.GetServer(server_pb2.GetServerRequest(), metadata=self.metadata, timeout=_ALIVE_SECONDS)
        except (grpc.RpcError, ValueError):  # ValueError: the channel was closed meanwhile.
            return False
        return True


def answered(answer: _T, address: str) -> _T:
    """Refuse None, which gRPC returns if a server ends a call with OK, but without an
    answer.

    Raises:
        HvpdError: There is no answer.
    """
    if answer is None:
        raise HvpdError(
            f"the server at {address} ended a call without an answer: it is no hvpd server", reason="BAD_ANSWER"
        )
    return answer


def _method(channel: grpc.Channel, file: Any, name: str) -> Callable[..., Any]:
    """Return a method as a stub has it, with messages that hold chunks as frames."""
    services = file.DESCRIPTOR.services_by_name.values()
    return frames.call(channel, next(service.methods_by_name[name] for service in services))
