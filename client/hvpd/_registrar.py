"""Registration as the user calls it: trace, upload, compile on the server."""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hvpd import _modules, _text
from hvpd._check.watch import Watch
from hvpd._composite import Composite
from hvpd._errors import HvpdError, InvalidArgumentError, MissingExtraError
from hvpd._objective import Objective
from hvpd._submission import check_has_room, check_may_register, submit
from hvpd._transport.transport import Transport
from hvpd._wire import protocol, pytree
from hvpd.v1 import objective_pb2

if TYPE_CHECKING:
    from hvpd._registration.bundle import Export


class Registrar:
    """The part of `Client` that registers objectives."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._watches: dict[str, Watch] = {}

    def register(
        self,
        fun: Callable[..., Any],
        x: Any,
        *data: Any,
        name: str | None = None,
        platforms: Sequence[protocol.Platform] = ("cpu", "cuda"),
        precision: protocol.ProductPrecision = "highest",
        mode: protocol.Mode = "forward_over_reverse",
        any_rows: bool = False,
        row_reduction: protocol.Reduction | None = None,
        blocks: Sequence[str | Sequence[str]] = (),
        fixed_bucket: int | None = None,
        sharded: bool | Literal["parameters"] = False,
        shared: bool = False,
    ) -> Objective:
        """Register f(x, *data) -> scalar with its data.

        The client traces `fun` once for these shapes and lowers it to StableHLO. It
        evaluates nothing. The server differentiates the program. Closed-over arrays
        above 16 KiB are stored like data. Registering the same objective again uploads
        and compiles nothing. The server then multiplies a few vectors at x in the
        background: `objective.registration_check()` has the verdict.

        A float64 x is traced with 64-bit types in any x64 mode of jax. With a float32 x
        and x64 off, 64-bit data is narrowed as jax itself narrows it. Integers that 32
        bits cannot hold are refused.

        Args:
            fun: A pure jax function that returns one real floating scalar.
            x: Any pytree of floating arrays. It gives structure, shapes and dtypes. The
                server checks the products at its values, if they have at most 64 MiB.
            data: One pytree of arrays for each further argument of `fun`; integers and
                booleans are allowed.
            name: Name of the objective from now on: letters, digits, `._-`, and parts
                joined by `/`. On a server with tenants the name is the tenant's own.
                Other tenants find it as `tenant/name`. Without a name, `objective.name`
                is a name that the same objective has already, or empty.
            platforms: Some of "cpu", "cuda", "rocm", "tpu". If `fun` has branches for
                platforms (`jax.lax.platform_dependent`), those of these platforms are
                kept.
            precision: "highest", "high" or "default", for matrix products that state
                none. On GPUs, "high" and "default" use TF32, with errors of 1e-3.
            mode: How products are made:

                - "forward_over_reverse": jvp of grad (Pearlmutter 1994), linearized for
                  single vectors if that is faster;
                - "reverse_over_forward", "reverse_over_reverse": if forward mode is
                  slow or forbidden;
                - "linearized": `jax.linearize` once at each point. The residuals are
                  kept, and a product is only its linear part;
                - "finite_difference": central differences of gradients, for functions
                  that jax cannot differentiate twice; relative error about eps**(2/3);
                - "auto": the faster one of `hvp` and `apply`, as the server measured
                  for each block width.

                If jax forbids forward mode in a function (a custom_vjp), the mode
                becomes "reverse_over_reverse", with a warning. `objective.mode` has the
                result.
            any_rows: Whether points can be bound to data of any number of rows. One
                program then has a symbolic first axis, in the first leaf of data and
                all others of the same length. Such an objective keeps no residuals.
            row_reduction: "mean" or "sum", which implies any_rows. For "mean", `fun` is
                a mean over rows of terms of one row each, plus a term without rows,
                such as a penalty. For "sum" it is a sum over rows, and nothing else.
                Data above the server's memory budget then stays on its disk, and each
                product reads it in chunks. The result is the same as for all rows at
                once. The server tests `fun` on some rows first, and refuses it if it is
                no such mean or sum.
            blocks: Principal blocks that the server compiles at once, so that the first
                product of `H.block(...)` need not wait. Each is a name, or a sequence
                of names; see `CurvatureOperator.block`.
            fixed_bucket: The only block width of launches, a power of two. The bits of
                a product then depend neither on other callers nor on measurements. A
                larger width shares more work between callers, and wastes more work for
                a single caller.
            sharded: Whether the server splits data by rows over all of its devices,
                because one is too small or too slow. If the number of devices does not
                divide the rows of a leaf, each device has the whole leaf. With
                "parameters", it splits x and all vectors by leaf, too, for an x that
                does not fit on one device.
            shared: Whether other tenants may use the objective, on a server with
                tokens. Another registration can change it.

        Raises:
            InvalidArgumentError: `fun`, `x`, `data` or `name` cannot be registered.
            MissingExtraError: jax is not installed here.
            IncompatibleError: The server cannot read the output of this version of jax,
                or `fun` has no branch for its device.

        Example:
            >>> objective = client.register(loss, params, X, y, name="demo/logistic")
        """
        if _modules.is_module(fun):
            raise InvalidArgumentError(
                f"fun must be a jax function, got the PyTorch module {type(fun).__name__}: call hvpd.torch.register(client, module, "
                "loss, inputs, targets)",
                reason="INVALID_OPTION",
            )
        given: Any = fun
        if not callable(given) and not isinstance(given, Composite):
            raise InvalidArgumentError(
                f"fun must be a function, got {_text.described(given)}: register(fun, x, *data, name=...)",
                reason="INVALID_OPTION",
            )
        tracing = _tracing_modules()
        with self._transport.inside("hvpd.register", name=name):
            check_may_register(self._transport, name)
            with self._transport.reporter.stage("tracing"):
                export = tracing.export.export(
                    fun,
                    x,
                    data,
                    platforms=platforms if isinstance(platforms, str) else tuple(platforms),
                    precision=precision,
                    mode=mode,
                    any_rows=any_rows,
                    row_reduction=row_reduction,
                    blocks=blocks,
                    fixed_bucket=fixed_bucket,
                    sharded=sharded,
                    stablehlo_version=self._transport.server.stablehlo_version,
                    before_tracing=lambda data: check_has_room(self._transport, name, data),
                )
            try:
                return self._store(export, name, tracing.trees.flatten(x)[1], shared=shared)
            except InvalidArgumentError as error:
                if error.reason != "NOT_DIFFERENTIABLE":
                    raise
                raise InvalidArgumentError(
                    f"{_defined(fun)}: {error}", reason=error.reason, request_id=error.request_id
                ) from None

    def register_exported(
        self, exported: bytes | bytearray, *data: Any, name: str | None = None, shared: bool = False
    ) -> Objective:
        """Register an objective that `jax.export` wrote elsewhere.

        Only reverse mode can differentiate such a function, so its mode is
        "reverse_over_reverse": the vjp of the gradient at v. It equals H v, because H
        is symmetric. Matrix products keep the precision of the export, which is not
        known here. So listings say "exported", and certificates measure it.

        Args:
            exported: The bytes of `Exported.serialize(vjp_order=2)`.
            data: Values for each argument after the first, as for `register`.
            name: As for `register`.
            shared: As for `register`.

        Raises:
            InvalidArgumentError: The bytes are no exported function, or lack a
                derivative, or data does not fit.
            MissingExtraError: jax is not installed here.
            IncompatibleError: It was exported for several platforms, but not for the
                server's.

        Example:
            >>> export = jax.export.export(jax.jit(f), platforms=("cpu", "cuda"))
            >>> client.register_exported(export(x, X).serialize(vjp_order=2), X)
        """
        tracing = _tracing_modules()
        with self._transport.inside("hvpd.register", name=name):
            check_may_register(self._transport, name)
            foreign = tracing.foreign.foreign(exported)
            export = tracing.export.export(
                foreign.fun,
                foreign.x,
                data,
                platforms=foreign.platforms,
                precision=protocol.EXPORTED,
                mode="reverse_over_reverse",
                stablehlo_version=self._transport.server.stablehlo_version,
            )
            return self._store(export, name, shared=shared)

    def register_stablehlo(
        self,
        module: Any,
        x: Any,
        *data: Any,
        name: str | None = None,
        mode: protocol.Mode = "forward_over_reverse",
        precision: protocol.Precision = "highest",
        shared: bool = False,
    ) -> Objective:
        """Register f(x, *data) -> scalar that any framework wrote as StableHLO.

        The server differentiates it.

        The entry function of the module takes the leaves of x, then the leaves of data,
        in flattening order (dicts by sorted keys). It returns one real floating scalar.
        StableHLO has no derivative rules. The server recognises functions and patterns
        whose rule it knows. For everything else it presumes jax's rule, for example for
        the gradient of a maximum at a tie. `objective.derivative_rules()` lists both.
        `objective.registration_check()` compares products with central differences, at
        x and beside it.

        Args:
            module: A StableHLO portable artifact or MLIR bytecode as bytes; MLIR text;
                the bytes of a `jax.export.Exported` of any vjp_order; or an object
                whose `str` is MLIR. All but portable artifacts need jax here for a
                conversion.
            x: A pytree of floating arrays. It gives structure, shapes and dtypes. The
                server checks the products at its values.
            data: Values for each further argument, as for `register`.
            name: As for `register`.
            mode: As for `register`.
            precision: As for `register`, for matrix products that state none;
                "exported" leaves them as the module has them.
            shared: As for `register`.

        Raises:
            InvalidArgumentError: The module cannot be read, has an operation that is
                not served, does not take x and data, or is not differentiable. The
                message names the operation. If the module is text, it has the line,
                too.
            MissingExtraError: The module must be converted, and jax is not installed.

        Example:
            >>> compiled = tf.function(loss, jit_compile=True)
            >>> with tf.device("CPU"):
            ...     ir = compiled.experimental_get_compiler_ir(w, X)
            >>> module = ir(stage="stablehlo_serialized")
            >>> objective = client.register_stablehlo(module, w0, X)
        """
        from hvpd._registration import stablehlo

        with self._transport.inside("hvpd.register", name=name):
            check_may_register(self._transport, name)
            export = stablehlo.export(
                module,
                x,
                data,
                mode=mode,
                precision=precision,
                stablehlo_version=self._transport.server.stablehlo_version,
            )
            return self._store(export, name, pytree.flatten(x)[1], shared=shared)

    def _store(
        self, export: "Export", name: str | None, x_leaves: Sequence[Any] = (), *, shared: bool = False
    ) -> Objective:
        stored = submit(self._transport.placed(export.digest), export, name, x_leaves, shared=shared)
        return self._objective(stored, export.unflatten)

    def _objective(
        self, message: objective_pb2.Objective, unflatten: "Callable[[Sequence[Any]], Any] | None" = None
    ) -> Objective:
        """Make an objective from the server's message."""
        before = self._watches.get(message.digest)
        try:
            objective = Objective(
                self._transport.placed(message.digest), message, unflatten, warned=before is not None and before.warned
            )
        except (TypeError, ValueError, LookupError) as error:
            raise HvpdError(
                f"the server at {self._transport.address} answered with an objective that cannot be read ({error}): the versions of client "
                "and server may not fit",
                reason="BAD_ANSWER",
            ) from error
        self._watches[objective.digest] = objective.watch
        return objective


def _defined(fun: Any) -> str:
    """Return the name of a function, after the place of its definition if known."""
    inner = inspect.unwrap(fun)
    name = getattr(inner, "__name__", type(fun).__name__)
    code = getattr(inner, "__code__", None)
    return name if code is None else f"{code.co_filename}:{code.co_firstlineno}, {name}"


def _tracing_modules() -> Any:
    """Return `hvpd._registration` with its modules that need jax.

    Raises:
        MissingExtraError: jax or flatbuffers is not installed.
    """
    try:
        import flatbuffers  # type: ignore[import-untyped]  # noqa: F401 - jax.export needs it, and says so only later

        import hvpd._registration.export
        import hvpd._registration.foreign
    except ImportError as error:
        raise MissingExtraError(
            f"registering needs jax here (the server's is not enough): pip install 'hvpd[jax]' ({error})"
        ) from error
    return hvpd._registration  # noqa: SLF001 - our own
