"""A point of an objective, with its value, gradient and curvature. Needs no jax."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from hvpd import _html
from hvpd._arguments import finite, integer
from hvpd._errors import HvpdError, InvalidArgumentError, OverloadedError
from hvpd._transport.creation import Step
from hvpd._transport.exchange import Asked
from hvpd._transport.transport import Transport
from hvpd._wire import codec, protocol
from hvpd.v1 import curvature_pb2, krylov_pb2, tensor_pb2

if TYPE_CHECKING:
    from hvpd._krylov.results import Origin
    from hvpd._krylov.runner import Runner
    from hvpd._krylov.space import Multiply
    from hvpd._objective import Objective
    from hvpd._operators.curvature import CurvatureOperator, HessianOperator
    from hvpd._operators.kronecker import KroneckerOperator


class Point:
    """A point (objective, data, x), resident on the server's device.

    Made by `Objective.at`.

    The server may forget the point, to make room or in a restart. Then the client makes
    it again, without an error.

    Attributes:
        objective: The objective.
        x: The flat vector, of shape (n,); read-only.
        value: f(x, *data).
        gradient: The gradient, of shape (n,), in the objective's dtype; read-only.
        mode: How products are made: the objective's mode.
        default_data: Whether the point is bound to the registered data.
        nonfinite: Those of "x", "value" and "gradient" that hold NaN or infinity.

    Example:
        >>> point = objective.at(x)
        >>> H = point.hessian(shift=1e-3)
        >>> step, info = scipy.sparse.linalg.cg(H, -point.gradient)
    """

    def __init__(
        self,
        objective: "Objective",
        transport: Transport,
        spec: curvature_pb2.PointSpec,
        x: codec.Array,
        *,
        step: Step | None = None,
        pin: int | None = None,
        data: Mapping[str, codec.Buffer] = MappingProxyType({}),
    ) -> None:
        self.objective = objective
        self.mode = objective.mode
        self.n = objective.n
        self.dtype = objective.dtype
        self._transport = transport
        self.reporter = transport.reporter
        self._spec = spec
        self.default_data = spec.default_data
        self.x = x.copy()
        self.x.flags.writeable = False
        self._pin = None if pin is None else integer(pin, "pin", 0, protocol.MAX_PIN_SECONDS)
        self._data = data
        message, gradient = self._create(self._pin, step)
        gradient.flags.writeable = False
        self._id = message.id
        self.value: float = message.value
        self.gradient: codec.Array = gradient
        counts = {"x": message.nonfinite_x, "value": message.nonfinite_value, "gradient": message.nonfinite_gradient}
        self.nonfinite: tuple[str, ...] = tuple(name for name, count in counts.items() if count)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this object: copies of estimators and of settings share it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        data = {digest: bytes(content) for digest, content in self._data.items()}
        parts = (self._spec.SerializeToString(), self.x, self._pin, data)
        return _again, (self.objective, *parts)

    def _has_data(self, data: Sequence[tensor_pb2.Tensor]) -> bool:
        """Return whether the point is bound to these tensors; none for the registered
        data.
        """
        return self.default_data if not data else list(self._spec.data) == list(data)

    def moved(self, alpha: float, direction: Any) -> "Point":
        """Return the point x + alpha * direction with the same data, for a line search.

        The result equals `objective.at(point.x + alpha * direction)`. The server makes
        x from this point, if it still has it, and from the direction. The direction is
        sent with the first step along it only. x is sent only if it has 64 KiB at most.

        Args:
            alpha: Length of the step, rounded to the objective's dtype.
            direction: A flat vector of shape (n,), or a pytree of the registered
                structure.

        Raises:
            InvalidArgumentError: The direction does not fit, or alpha is not finite.

        Example:
            >>> step = point.moved(0.5, -point.gradient)
            >>> step.value < point.value
        """
        alpha = finite(alpha, "alpha")
        p = self.objective.vector(direction, "the direction")
        # Rounded as the server rounds, because otherwise the digests would differ.
        # Overflow becomes infinity, which `nonfinite` reports.
        with np.errstate(over="ignore", invalid="ignore"):
            x = p * self.dtype.type(alpha)
            x += self.x
        spec = curvature_pb2.PointSpec()
        spec.CopyFrom(self._spec)
        spec.x_digest = codec.digest(codec.payload(x))
        step = Step(self._id, alpha, p)
        transport = self._transport.staying()  # A fleet's server may be there again.
        return self.objective._remember(Point(self.objective, transport, spec, x, step=step, data=self._data))  # noqa: SLF001 - its own objective

    def pin(self, seconds: int) -> None:
        """Keep the point and its data on the device for seconds after its last use.

        The server pins at most half of its memory. Points without a pin come back by
        themselves too. A pin saves the time that this takes.

        Args:
            seconds: From 0 to 604800, a week. 0 removes the pin.

        Raises:
            OverloadedError: Too much is pinned already (reason `PINNED`).

        Example:
            >>> point.pin(600)
        """
        pin = integer(seconds, "seconds", 0, protocol.MAX_PIN_SECONDS)
        self._transport.create_point(self._spec, self.x, pin_seconds=pin)
        self._pin = pin

    def hessian(
        self,
        shift: float = 0.0,
        *,
        mode: protocol.ProductMode | Literal[""] = "",
        precision: protocol.ProductPrecision | Literal[""] = "",
    ) -> "HessianOperator":
        """Return the Hessian plus shift I.

        It is a symmetric `scipy.sparse.linalg.LinearOperator` of shape (n, n).

        Args:
            shift: Added to the diagonal.
            mode: How products are made: "forward_over_reverse", "reverse_over_forward",
                "reverse_over_reverse", "linearized" or "finite_difference". Empty for
                the objective's mode; see `Client.register`. The first product in
                another mode waits until the server has compiled it.
            precision: Precision of matrix products that state none: "highest", "high"
                or "default". Empty for the objective's precision.

        Example:
            >>> H = point.hessian(shift=1e-3, mode="linearized")
        """
        from hvpd._operators.curvature import HessianOperator

        return HessianOperator(self, shift, mode=mode, precision=precision)

    def ggn(
        self, shift: float = 0.0, *, precision: protocol.ProductPrecision | Literal[""] = ""
    ) -> "CurvatureOperator":
        """Return the Gauss-Newton matrix of a composite, plus shift I.

        It is a LinearOperator, as for `hessian`.

        Args:
            shift: Added to the diagonal.
            precision: As for `hessian`.

        Raises:
            InvalidArgumentError: The objective is no composite.

        Example:
            >>> G = point.ggn(shift=1e-3)
        """
        return self._curvature("ggn", curvature_pb2.OPERATOR_GGN, shift, precision=precision)

    def fisher(
        self, shift: float = 0.0, *, seed: int | None = None, precision: protocol.ProductPrecision | Literal[""] = ""
    ) -> "CurvatureOperator":
        """Return the Fisher matrix of the model's own distribution, plus shift I.

        It is a LinearOperator, as for `hessian`. See `hvpd.composite`.

        Args:
            shift: Added to the diagonal.
            seed: From 0 to 2**64 - 1, for an unbiased Monte-Carlo estimate from targets
                drawn with this seed. The same seed gives the same matrix. None for the
                exact matrix.
            precision: As for `hessian`.

        Raises:
            InvalidArgumentError: The objective is no composite, or has no distribution.

        Example:
            >>> F = point.fisher(seed=0)
        """
        if seed is None:
            return self._curvature("fisher", curvature_pb2.OPERATOR_FISHER, shift, precision=precision)
        return self._curvature("fisher", curvature_pb2.OPERATOR_SAMPLED_FISHER, shift, _seed(seed), precision)

    def empirical_fisher(
        self, shift: float = 0.0, *, precision: protocol.ProductPrecision | Literal[""] = ""
    ) -> "CurvatureOperator":
        """Return the empirical Fisher matrix, plus shift I.

        It is made from the gradients at the targets. It is a LinearOperator, as for
        `hessian`.

        Args:
            shift: Added to the diagonal.
            precision: As for `hessian`.

        Raises:
            InvalidArgumentError: The objective is no composite, or its model's output
                is not one array with a row for each example.

        Example:
            >>> E = point.empirical_fisher(shift=1e-3)
        """
        return self._curvature("empirical_fisher", curvature_pb2.OPERATOR_EMPIRICAL_FISHER, shift, precision=precision)

    def kfac(self, shift: float = 0.0, *, seed: int | None = None) -> "KroneckerOperator":
        """Return K-FAC, the Kronecker-factored Gauss-Newton matrix, plus shift I.

        Each dense layer y = a W + b of a composite's model has a block A (x) G, for
        kernel and bias together. A is the mean of a'a, and G the curvature in y. Leaves
        of x outside of dense layers have zeros. The matrix is exact if the model has
        one row of activations in each layer, or is linear.

        The server computes the factors and sends them once. Products and `inverse()`
        then take no round trip. Source: Martens and Grosse, ICML (2015).

        Args:
            shift: Added to the diagonal. The inverse needs a positive shift.
            seed: For the Fisher matrix with targets drawn by this seed, as in `fisher`.
                It costs one backward pass for each sample, instead of two for each
                output of the model.

        Raises:
            InvalidArgumentError: The objective is no composite of a model with dense
                layers. Or there is a seed, and the composite has no distribution.

        Example:
            >>> step, info = cg(point.ggn(mu), b, M=point.kfac(mu).inverse())
        """
        from hvpd._operators.kronecker import KroneckerBlock, KroneckerOperator

        program = "kfac" if seed is None else "sampled_kfac"
        if not self.objective.has(program):
            raise InvalidArgumentError(
                f"{self.objective.label} was registered without {program}: register hvpd.composite(model, loss"
                f"{'' if seed is None else ', distribution=...'}), with a model that returns one array [rows, ...] and has layers "
                "a @ W + b, W and b being leaves of x that are used nowhere else",
                reason="NO_SUCH_OPERATOR",
            )
        layers = self.objective.dense_layers()
        request = curvature_pb2.ComputeFactorsRequest(point_id=self._id, seed=None if seed is None else _seed(seed))
        sizes = [size for layer in layers for size in layer.elements.shape]
        factors = self._transport.factors(request, sizes, self.dtype, restore=self._restore)
        blocks = tuple(
            KroneckerBlock(layer.kernel, layer.bias, layer.elements, A, G)
            for layer, A, G in zip(layers, factors[::2], factors[1::2], strict=True)
        )
        return KroneckerOperator(blocks, self.dtype, self.n, finite(shift, "shift"))

    def _curvature(
        self,
        program: str,
        kind: int,
        shift: float,
        seed: int = 0,
        precision: protocol.ProductPrecision | Literal[""] = "",
    ) -> "CurvatureOperator":
        from hvpd._operators.curvature import CurvatureOperator

        if not self.objective.has(program):
            wants = {"ggn": "", "fisher": ", distribution=...", "empirical_fisher": ""}[program]
            raise InvalidArgumentError(
                f"{self.objective.label} was registered without {program}: register hvpd.composite(model, loss{wants})"
                + (", with a model that returns one array [rows, ...]" if program != "ggn" else ""),
                reason="NO_SUCH_OPERATOR",
            )
        return CurvatureOperator(self, kind, seed=seed, shift=shift, precision=precision)

    def multiply(
        self,
        V: codec.Array,
        operator: int = curvature_pb2.OPERATOR_HESSIAN,
        seed: int = 0,
        leaves: Sequence[int] = (),
        mode: str = "",
        precision: str = "",
    ) -> codec.Array:
        """Multiply V[k,n] -> HV[k,n], row-major, in the objective's dtype.

        All operators use this method.

        Args:
            V: Vectors as rows, of shape (k, n), in the objective's dtype.
            operator: The curvature H: a value of `hvpd.v1.curvature_pb2.Operator`.
            seed: Seed of operators that are drawn.
            leaves: Ascending positions of leaves of x, for their principal block.
                Vectors then have the elements of the block only. Empty for the whole.
            mode: How the product is made; empty for the objective's mode.
            precision: Precision of matrix products that state none; empty for the
                objective's.

        Raises:
            InvalidArgumentError: V has another shape or dtype, or mode or precision is
                none of the words.

        Example:
            >>> rows = point.multiply(np.eye(point.n, dtype=point.dtype)[:8])
        """
        return self._ask(V, Asked(self._id, operator, False, seed, tuple(leaves), mode, precision))

    def quadratic_form(
        self,
        V: codec.Array,
        operator: int = curvature_pb2.OPERATOR_HESSIAN,
        seed: int = 0,
        leaves: Sequence[int] = (),
        mode: str = "",
        precision: str = "",
    ) -> codec.Array:
        """Return v'Hv for each row of V[k,n], of shape (k,), in the objective's dtype.

        Only these numbers come back from the server.

        Args:
            V: As for `multiply`.
            operator: As for `multiply`.
            seed: As for `multiply`.
            leaves: As for `multiply`.
            mode: As for `multiply`.
            precision: As for `multiply`.

        Raises:
            InvalidArgumentError: V has another shape or dtype.

        Example:
            >>> point.quadratic_form(directions)
        """
        return self._ask(V, Asked(self._id, operator, True, seed, tuple(leaves), mode, precision))

    def _ask(self, V: codec.Array, asked: Asked) -> codec.Array:
        n = self.objective._size_of(asked.leaves)  # noqa: SLF001 - its own objective
        V = np.asarray(V)  # A list has no shape for the message.
        if V.ndim != 2 or V.shape[1] != n or V.dtype != self.dtype:
            raise InvalidArgumentError(
                f"a block must be {self.dtype}[k, {n}], got {V.dtype}{list(V.shape)}", reason="SHAPE"
            )
        self.objective._watch_check()  # noqa: SLF001 - its own objective
        if len(V) == 0:
            return np.empty_like(V[:, 0] if asked.quadratic_form else V)
        return self._transport.multiply(
            asked, np.ascontiguousarray(V), restore=self._restore, objective=self.objective.digest
        )

    def _runner(
        self,
        multiply: "Multiply",
        n: int,
        origin: "Origin",
        asked: tuple[int, int, tuple[int, ...], str, str],
        scale: float,
        shift: float,
        update: tuple[codec.Array, codec.Array] | None,
    ) -> "Runner":
        """Return what runs Krylov iterations of scale A + shift I + U C U^T.

        Args:
            multiply: Multiplies by the operator here, one product at a time.
            n: Number of elements of a vector.
            origin: What results say about the operator.
            asked: The curvature A, as `multiply` takes it.
            scale: Factor of A.
            shift: Added to the diagonal.
            update: U and C; None for no such term.
        """
        # SciPy's linear algebra is loaded here, so that connecting stays quick.
        from hvpd._krylov.runner import Runner
        from hvpd._transport.server_runner import ServerRunner
        from hvpd._transport.server_space import ServerOperator

        facts: Any = {"origin": origin, "reporter": self.reporter, "label": self.objective.label}
        self.objective._watch_check()  # noqa: SLF001 - its own objective
        if not self._transport.server.krylov_runs:
            return Runner(multiply, n, self.dtype, **facts)
        kind, seed, leaves, mode, precision = asked
        product = curvature_pb2.ProductSpec(
            point_id=self._id,
            operator=kind,  # type: ignore[arg-type]  # an open enum
            k=1,
            seed=seed,
            leaves=leaves,
            mode=mode,
            precision=precision,
            priority=self._transport.priority,
        )
        operator = ServerOperator(
            self._transport,
            krylov_pb2.RunOperator(product=product, scale=scale, shift=shift),
            n,
            self.dtype,
            {} if update is None else {"U": update[0], "C": update[1]},
            self._restore,
        )
        return ServerRunner(operator, multiply, **facts)

    def _create(self, pin: int | None, step: Step | None = None) -> tuple[curvature_pb2.Point, codec.Array]:
        """Make the point resident; send its data again if the server has lost it."""
        for _ in self._data:  # Each try may find one blob corrupt.
            try:
                return self._transport.create_point(self._spec, self.x, step=step, pin_seconds=pin)
            except HvpdError as error:
                if error.reason not in ("BLOBS_MISSING", "BLOB_CORRUPT"):
                    raise
            self._send_data()
        return self._transport.create_point(self._spec, self.x, step=step, pin_seconds=pin)

    def _send_data(self) -> None:
        try:
            self._transport.store(self._data)
        except HvpdError as error:
            if error.reason != "DIGEST_MISMATCH":
                raise
            raise InvalidArgumentError(
                "the server needs the data of this point again, but its arrays were changed since it was made: make the point anew",
                reason="DATA_CHANGED",
            ) from error

    def _restore(self) -> None:
        try:
            self._create(self._pin)
        except OverloadedError as error:
            if error.reason != "PINNED" or not self._pin:
                raise
            self._create(None)  # Other points took the room meanwhile, and a product needs no pin.

    def __repr__(self) -> str:
        warning = f", not finite: {', '.join(self.nonfinite)}" if self.nonfinite else ""
        return f"<Point of {self.objective.label}: value {self.value:g}{warning}>"

    def _repr_html_(self) -> str:
        facts = {
            "value": f"{self.value:g}",
            "norm of the gradient": f"{np.linalg.norm(self.gradient):g}",
            "n": self.n,
            "dtype": self.dtype,
            "data": "as registered" if self.default_data else "other",
            "not finite": ", ".join(self.nonfinite),
        }
        return _html.facts(f"Point of {self.objective.label}", facts)


def _again(objective: "Objective", *parts: Any) -> Point:
    return objective._point_again(*parts)  # noqa: SLF001 - of its own point


def _seed(seed: Any) -> int:
    return integer(seed, "seed", 0, 2**64 - 1)
