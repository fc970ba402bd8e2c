"""A connection as the user has it: register, find, list."""

import contextlib
import dataclasses
import datetime
import os
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hvpd import _codec, _pytree, _text
from hvpd._check import REGISTRATION_BYTES, verdict_of
from hvpd._errors import (
    HvpdError,
    IncompatibleError,
    InvalidArgumentError,
    MissingExtraError,
    NotFoundError,
    OverloadedError,
)
from hvpd._objective import Objective
from hvpd._tls import PathLike, encryption
from hvpd._transport import Statistics, Transport
from hvpd._usage import Usage, usage
from hvpd.v1 import blob_pb2, objective_pb2, server_pb2

if TYPE_CHECKING:
    from hvpd._registration.bundle import Export

DEFAULT_ADDRESS = "localhost:7070"

_MOST_PAGES = 10_000
_MOST_LISTED_BYTES = 256 << 20
"""Most pages of a list of objectives, and bytes of all of them: a million objectives."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """An objective in `Client.objectives()`."""

    name: str
    """Empty where it has none."""
    digest: str
    """SHA-256 of what was registered."""
    n: int
    """Number of elements of x."""
    dtype: str
    """float32 or float64."""
    precision: str
    """Matrix-multiplication precision; "exported" where somebody else's export has its own."""
    mode: str
    """How products are made."""
    platforms: tuple[str, ...]
    """Platforms that it has branches for; empty if it is the same on every platform."""
    data_bytes: int
    """Size of the data it was registered with."""
    created: datetime.datetime
    """When it was registered, UTC."""
    check: str = ""
    """What the server's check after registration found: passed, failed, undecided, pending; empty where there was none."""


class Client:
    """A connection to a server; also a context manager. Made by `hvpd.connect` and `hvpd.local`.

    Threads may share it. Calls ride through a restart of the server.

    Attributes:
        address: Where it is connected, "host:port".
    """

    def __init__(self, transport: Transport, on_close: Callable[[], None] = lambda: None) -> None:
        self._transport = transport
        self._on_close = on_close
        self.address: str = transport.address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        server = self._transport.server
        facts = f"hvpd {server.version} at {self.address}, {server.platform} ({server.device_kind})"
        return f"<Client of {_text.printable(facts)}>"

    def close(self) -> None:
        """Ends the connection, and the server where it is an embedded one."""
        self._transport.close()
        self._on_close()

    @property
    def server(self) -> server_pb2.GetServerResponse:
        """What the server said of itself when this client connected."""
        return self._transport.server

    def statistics(self) -> Statistics:
        """What this client's products were, so far."""
        return self._transport.statistics()

    def register(
        self,
        fun: Callable[..., Any],
        x: Any,
        *data: Any,
        name: str | None = None,
        platforms: Sequence[str] = ("cpu", "cuda"),
        precision: str = "highest",
        mode: str = "forward_over_reverse",
        any_rows: bool = False,
        row_reduction: str | None = None,
        blocks: Sequence[str | Sequence[str]] = (),
        fixed_bucket: int | None = None,
        sharded: bool = False,
        shared: bool = False,
    ) -> Objective:
        """Registers f(x, *data) -> scalar with the server, with its data.

        The client traces `fun` once for these shapes and lowers it to StableHLO; nothing runs here. The server differentiates it.
        Closed-over arrays above 16 KiB are stored like data. Registering the same again uploads and compiles nothing.
        The server then multiplies a few vectors at x, in the background: `objective.registration_check()` has the verdict.

        A float64 x is traced with 64-bit types whatever jax's x64 mode. With a float32 x and x64 off, 64-bit data is narrowed
        as jax itself narrows it; integers that 32 bits cannot hold are refused.

        Args:
            fun: Written in jax, pure; returns one real floating scalar.
            x: Any pytree of floating arrays: gives structure, shapes and dtypes. The server checks the products at its values,
                where they are 64 MiB at most.
            data: One pytree of arrays for each further argument of `fun`; integers and booleans are allowed.
            name: Points at the objective from now on, for teammates; letters, digits, `._-`, parts joined by `/`. Where the server
                tells tenants apart it is the tenant's own, called `tenant/name` by others.
            platforms: Of "cpu", "cuda", "rocm", "tpu": whose branches are kept, if `fun` has some (`jax.lax.platform_dependent`).
            precision: "highest", "high" or "default", for matrix products that do not say their own. On GPUs anything but
                "highest" means TF32, and errors of 1e-3.
            mode: How products are made:

                - "forward_over_reverse": jvp of grad (Pearlmutter 1994), linearized for single vectors where that pays;
                - "reverse_over_forward", "reverse_over_reverse": where forward mode is slow or forbidden;
                - "linearized": `jax.linearize` once at each point, its residuals kept, then only its linear part;
                - "finite_difference": central, from gradients alone, for functions that jax cannot differentiate twice;
                  good to about eps**(2/3);
                - "auto": fused or linearized, whichever the server measures to be faster for each block width.

                A function in which jax forbids forward mode (a custom_vjp) falls back to "reverse_over_reverse", with a
                warning; `objective.mode` says which it was.
            any_rows: Whether points can be bound to data of any number of rows: one program with a symbolic first axis, in the
                first leaf of data and all others that are as long. Such an objective keeps no residuals.
            row_reduction: "mean" or "sum", which implies any_rows: `fun` is a mean over rows of terms of one row each, plus perhaps what
                no row has part in (a penalty); or a sum over rows, and nothing else. Then data that is larger than the server's
                memory budget stays on its disk, and each product goes through it in chunks. The result is that of all rows at once.
                The server tries it on some rows first, and refuses what is no such mean or sum.
            blocks: Principal blocks that the server compiles at once, so that the first product of `H.block(...)` need not wait: each
                the name of a leaf of x or of what stands above several, or several names. See `CurvatureOperator.block`.
            fixed_bucket: The only width of blocks that are launched, a power of two: then the bits of a product do not depend on who
                else was asking, nor on what was measured. Wider ones share more work, and waste more where nobody shares.
            sharded: Whether data is split by rows over all devices of the server, for what is too large or too slow on one. Leaves
                whose number of rows the devices do not divide are on every device as a whole.
            shared: Whether tenants other than one's own may use it, where the server tells them apart by tokens. Registering it again
                says it anew.

        Raises:
            InvalidArgumentError: `fun`, `x`, `data` or `name` cannot be registered.
            MissingExtraError: jax is not installed here.
            IncompatibleError: The server cannot read what this version of jax writes, or `fun` has no branch for its device.
        """
        _export = self._exporting()
        if name is not None and not isinstance(name, str):
            raise InvalidArgumentError(f"a name is a string, got {name!r}")
        with self._transport.inside("hvpd.register", name=name):
            export = _export.export(
                fun,
                x,
                data,
                platforms=tuple(platforms),
                precision=precision,
                mode=mode,
                any_rows=any_rows,
                row_reduction=row_reduction,
                blocks=blocks,
                fixed_bucket=fixed_bucket,
                sharded=sharded,
                stablehlo_version=self.server.stablehlo_version,
            )
            return self._store(export, name, _export.flatten(x)[1], shared=shared)

    def register_exported(
        self, exported: bytes | bytearray, *data: Any, name: str | None = None, shared: bool = False
    ) -> Objective:
        """Registers an objective that was exported elsewhere: the bytes of

            jax.export.export(jax.jit(f), platforms=("cpu", "cuda"))(x, *data).serialize(vjp_order=2)

        Such a function can be differentiated by reverse mode only, so its mode is "reverse_over_reverse": the vjp of its
        gradient, which is the product, since a Hessian is symmetric. Its precision is what it was exported with, which
        nobody here knows: listings say "exported", and certificates measure it.

        Args:
            exported: What `serialize` returned.
            data: Values for each argument after the first, as for `register`.
            name: As for `register`.
            shared: As for `register`.

        Raises:
            InvalidArgumentError: It is no exported function, or has not both derivatives, or data does not fit it.
            MissingExtraError: jax is not installed here.
            IncompatibleError: It was exported for several platforms, and the server's is none of them.
        """
        _export = self._exporting()
        with self._transport.inside("hvpd.register", name=name):
            foreign = _export.foreign(exported)
            export = _export.export(
                foreign.fun,
                foreign.x,
                data,
                platforms=foreign.platforms,
                precision=_export.EXPORTED,
                mode="reverse_over_reverse",
                stablehlo_version=self.server.stablehlo_version,
            )
            return self._store(export, name, shared=shared)

    def register_stablehlo(
        self,
        module: Any,
        x: Any,
        *data: Any,
        name: str | None = None,
        mode: str = "forward_over_reverse",
        precision: str = "highest",
        shared: bool = False,
    ) -> Objective:
        """Register f(x, *data) -> scalar that any framework wrote as StableHLO; the server differentiates it.

        The entry function of the module takes the leaves of x, then the leaves of data, in flattening order (dicts by sorted
        keys), and returns one real floating scalar. StableHLO has no derivative rules. The server recognises functions and
        patterns whose rule it knows, and presumes jax's rule for everything else, such as the gradient of a maximum at a tie:
        `objective.derivative_rules()` lists both. `objective.registration_check()` compares products with central differences,
        at x and beside it.

        Args:
            module: A StableHLO portable artifact or MLIR bytecode as bytes; MLIR text; the bytes of a `jax.export.Exported`, of any
                vjp_order; or an object whose `str` is MLIR. All but portable artifacts need jax here, which converts them.
            x: A pytree of floating arrays: gives structure, shapes and dtypes. The server checks the products at its values.
            data: Values for each further argument, as for `register`.
            name: As for `register`.
            mode: As for `register`.
            precision: As for `register`, for matrix products that state none; "exported" leaves them as the module has them.
            shared: As for `register`.

        Raises:
            InvalidArgumentError: The module cannot be read, has an operation that is not served, does not take x and data, or is
                not differentiable. The message names the operation and its place.
            MissingExtraError: jax is needed to convert the module, and is not installed.

        Example:
            >>> with tf.device("CPU"):
            ...     ir = tf.function(loss, jit_compile=True).experimental_get_compiler_ir(w, X)
            >>> objective = client.register_stablehlo(ir(stage="stablehlo_serialized"), w0, X)
        """
        from hvpd._registration import stablehlo

        with self._transport.inside("hvpd.register", name=name):
            export = stablehlo.export(
                module, x, data, mode=mode, precision=precision, stablehlo_version=self.server.stablehlo_version
            )
            return self._store(export, name, _pytree.flatten(x)[1], shared=shared)

    def _exporting(self) -> Any:
        """The module that needs jax."""
        try:
            import flatbuffers  # type: ignore[import-untyped]  # noqa: F401 - jax.export needs it, and says so only later

            from hvpd._registration import export
        except ImportError as error:
            raise MissingExtraError(
                f"registering needs jax here (the server's is not enough): pip install 'hvpd[jax]' ({error})"
            ) from error
        return export

    def _store(
        self, export: "Export", name: str | None, x_leaves: Sequence[Any] = (), *, shared: bool = False
    ) -> Objective:
        """Uploads what the server does not have, and has it registered, and checked where there is an x."""
        self._check_platform(export.bundle)
        request = objective_pb2.CreateObjectiveRequest(digest=export.digest, name=name or "", shared=shared)
        blobs = dict(export.blobs)
        if x_leaves and export.bundle.n * np.dtype(export.bundle.dtype).itemsize <= REGISTRATION_BYTES:
            parts = [np.asarray(leaf).reshape(-1).astype(export.bundle.dtype) for leaf in x_leaves]
            x = _codec.payload(np.concatenate(parts))
            request.x_digest = _codec.digest(x)
            blobs[request.x_digest] = x
        # Each try may find one blob corrupt on the server's disk, or removed after it was found present, and send it anew.
        for last in [False] * len(export.blobs) + [True]:
            for digest in self._transport.missing(list(blobs)):
                try:
                    self._transport.upload(digest, blobs[digest])
                except OverloadedError:
                    if digest in export.blobs:
                        raise
                    request.x_digest = ""  # A check is nothing to fail for.
                    del blobs[digest]
            try:
                response = self._transport.unary(self._transport.objectives.CreateObjective, request)
                break
            except HvpdError as error:
                if last or error.reason not in ("BLOBS_MISSING", "BLOB_CORRUPT"):
                    raise
        mode = response.objective.derivation.mode
        if mode and mode != export.bundle.mode:
            warnings.warn(
                f"jax forbids mode {export.bundle.mode!r} for this function, which has a custom_vjp inside: it is registered with "
                f"mode {mode!r}",
                stacklevel=3,
            )
        return self._objective(response.objective, export.unflatten)

    def _check_platform(self, bundle: objective_pb2.Bundle) -> None:
        """Raise IncompatibleError if a program with branches for some platforms has none for the server's."""
        server = self._transport.server
        if bundle.platforms and server.platform not in bundle.platforms:
            raise IncompatibleError(
                f"the server at {self.address} computes on {server.platform}, and the objective has branches for "
                f"{', '.join(bundle.platforms)} only: register it with platforms=({server.platform!r}, ...)",
                reason="BUNDLE_INCOMPATIBLE",
            )

    def objective(self, name: str) -> Objective:
        """The objective of a name, or of a digest. Needs no jax.

        Where the server tells tenants apart: the tenant's own of this name, else one by its full name, `tenant/name`, that is shared.

        Raises:
            NotFoundError: There is none; the message suggests near names.
        """
        request = objective_pb2.GetObjectiveRequest(name=name)
        return self._objective(self._transport.unary(self._transport.objectives.GetObjective, request).objective)

    def _objective(
        self, message: objective_pb2.Objective, unflatten: "Callable[[Sequence[Any]], Any] | None" = None
    ) -> Objective:
        """What a server says that an objective is."""
        try:
            return Objective(self._transport, message, unflatten)
        except (TypeError, ValueError, LookupError) as error:
            raise HvpdError(
                f"the server at {self.address} answered with an objective that cannot be read ({error}): client and server "
                "may be of versions that do not fit"
            ) from error

    def objectives(self) -> list[Listing]:
        """All objectives, sorted by name, the nameless last."""
        found: list[Listing] = []
        token, room = "", _MOST_LISTED_BYTES
        for _ in range(_MOST_PAGES):
            request = objective_pb2.ListObjectivesRequest(page_token=token)
            response = self._transport.unary(self._transport.objectives.ListObjectives, request)
            try:
                found.extend(map(_listing, response.objectives))
            except (TypeError, ValueError, LookupError, OverflowError) as error:
                raise HvpdError(f"the server at {self.address} lists what cannot be read ({error})") from error
            if token and response.next_page_token == token:
                raise HvpdError(
                    f"the server at {self.address} lists the same page again and again: it is no hvpd server"
                )
            token, room = response.next_page_token, room - response.ByteSize()
            if not token:
                return found
            if room < 0:
                break
        raise HvpdError(
            f"the server at {self.address} lists objectives without end: {len(found)} of them so far, in pages that go on"
        )

    def delete(self, name: str) -> bool:
        """Takes a name off an objective on the server, and with the last one the objective, its points, and blobs that nothing else needs.

        Args:
            name: A name; or a digest, for all its names. Where the server tells tenants apart, they must be the tenant's own.

        Returns:
            Whether the objective is gone. It stays if it has other names. A tenant is not told whether others have registered it, too.

        Raises:
            NotFoundError: There is none.
            AccessError: It is another tenant's (reason `NOT_YOURS`), or the token has not the right `publish`.
        """
        request = objective_pb2.DeleteObjectiveRequest(name=name)
        with contextlib.suppress(NotFoundError):  # Who operates the server deletes what it cannot see.
            find = objective_pb2.GetObjectiveRequest(name=name)
            request.digest = self._transport.unary(self._transport.objectives.GetObjective, find).objective.digest
        try:
            return self._transport.unary(self._transport.objectives.DeleteObjective, request).deleted
        except NotFoundError:
            if not request.digest:
                raise
            return True  # It was there a moment ago: an earlier try of this call, perhaps, has done it.

    def prune(self, tenant: str = "") -> int:
        """Gives up what this tenant has stored and none of its objectives refers to, nor a resident point: what solves have left that are over.

        What is younger than an hour stays. Whoever needs something again sends it again, by itself.

        Args:
            tenant: Whose, for tokens with the right `administer`; empty: this one's.

        Returns:
            Bytes that are not the tenant's any more.
        """
        response: blob_pb2.PruneBlobsResponse
        response = self._transport.unary(self._transport.prune_blobs, blob_pb2.PruneBlobsRequest(tenant=tenant))
        return response.pruned_bytes

    def usage(self) -> Usage:
        """What this tenant may use of the server, and uses."""
        found = self._usages(all_tenants=False)
        if len(found) != 1:
            raise HvpdError(
                f"the server at {self.address} tells the usage of {len(found)} tenants, and was asked for one"
            )
        return found[0]

    def usages(self) -> list[Usage]:
        """The same of all tenants, by name. Takes a token with the right `administer`."""
        return self._usages(all_tenants=True)

    def _usages(self, *, all_tenants: bool) -> list[Usage]:
        request = server_pb2.GetUsageRequest(all_tenants=all_tenants)
        response: server_pb2.GetUsageResponse = self._transport.unary(self._transport.get_usage, request)
        return list(map(usage, response.usages))

    def release(self, name: str) -> int:
        """Has the server serve an objective again that ended it too often. Takes a token with the right `administer`.

        Args:
            name: Name or digest.

        Returns:
            How many times it had ended the server.
        """
        request = objective_pb2.ReleaseObjectiveRequest(name=name)
        return self._transport.unary(self._transport.objectives.ReleaseObjective, request).strikes


def _listing(message: objective_pb2.Objective) -> Listing:
    bundle = message.bundle
    return Listing(
        name=message.name,
        digest=message.digest,
        n=bundle.n,
        dtype=bundle.dtype,
        precision=bundle.precision,
        mode=message.derivation.mode or bundle.mode,
        platforms=tuple(bundle.platforms),
        data_bytes=sum(_codec.count(tensor.shape) * _codec.dtype(tensor.dtype).itemsize for tensor in bundle.data),
        created=message.create_time.ToDatetime(datetime.UTC),
        check=verdict_of(message.check),
    )


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    connect_timeout: float = 10.0,
    retry_timeout: float = 60.0,
    timeout: float | None = None,
    priority: int = 0,
    tls: bool | None = None,
    ca: PathLike | None = None,
    cert: PathLike | None = None,
    key: PathLike | None = None,
    insecure: bool = False,
) -> Client:
    """Connects to a server.

    Args:
        address: "host:port"; $HVPD_ADDRESS without, then localhost:7070.
        token: Who calls, for servers that ask; $HVPD_TOKEN without. Where it is missing, or not good for a call, the call raises
            `AccessError`.
        connect_timeout: Seconds to wait for a server at the address.
        retry_timeout: Seconds for which calls are repeated while the server is away or overloaded.
        timeout: Seconds that one call may take at most; None: as long as it takes.
        priority: Of this client's products, from -100 to 100. Of what one tenant has waiting for the device the higher goes first,
            and the lower not at all for as long as higher keeps coming. Between tenants, which share the device fairly, it does
            nothing. A tenant is who the token belongs to; without tokens each connection is one.
        tls: Whether to encrypt, and to check whom one talks to; None: where ca or cert is given, here or in the environment.
        ca: PEM file of the CAs that the server's certificate may be of; $HVPD_CA without, then those that gRPC comes with.
        cert: PEM file of this client's certificate, for servers that ask for one; $HVPD_CERT without.
        key: PEM file of its key, unencrypted; $HVPD_KEY without.
        insecure: Whether the token may go to another machine as plain text, since something else encrypts it.

    Raises:
        InvalidArgumentError: An argument is not what it must be, or the token would be sent for everybody to read.
        UnavailableError: Nothing answers there within the connect timeout; with reason `TLS`: somebody does, and client and server
            do not agree on TLS.
        IncompatibleError: What answers is no hvpd server, or one of another version.
    """
    transport = Transport(
        address or os.environ.get("HVPD_ADDRESS") or DEFAULT_ADDRESS,
        token=token or os.environ.get("HVPD_TOKEN"),
        connect_timeout=connect_timeout,
        retry_timeout=retry_timeout,
        timeout=timeout,
        priority=priority,
        tls=encryption(tls, ca, cert, key),
        insecure=insecure,
    )
    return Client(transport)
