"""A registered objective as the user holds it. Needs no jax."""

import collections
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from hvpd import _html, _jax
from hvpd._check.verdicts import RegistrationCheck, registration_check
from hvpd._check.watch import Watch
from hvpd._layout import Layout
from hvpd._plan import Choice, Compile, DerivativeRules, Plan
from hvpd._point import Point
from hvpd._transport.transport import Transport
from hvpd._wire import codec, protocol, pytree
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

    from hvpd._check.certificate import Certificate
    from hvpd._jax.functions import Function
    from hvpd._operators.kronecker import DenseLayer

_SHOWN_LEAVES = 8
"""Most leaves that a table in a notebook names."""

_RECENT = 4
"""Number of points that an objective remembers. A line search returns to few points."""


class Objective(Layout):
    """A registered f(x, *data). Made by `Client.register` and `Client.objective`.

    Each method takes x as a flat vector of n real numbers, as a pytree of the
    registered structure, or as a mapping of the names of `leaves` to arrays. Numbers
    are converted to the objective's dtype. The objective remembers recent points, so
    that repeated calls at the same x send nothing.

    Attributes:
        n: Number of elements of x.
        dtype: dtype of flat vectors, gradients and products: float32 or float64.
        digest: SHA-256 of the registered bundle, in hexadecimal.
        name: Name that the objective was found by. If it was found by its digest, or
            registered without a name: one of its names; empty if it has none.
        platforms: Platforms that it has branches for; empty if it computes the same on
            all.
        precision: Matrix-multiplication precision that it was traced with.
        mode: How products are made; see `Client.register`.
        blocks: Names of the leaves of each principal block that the server compiled at
            registration; see `Client.register`.

    Example:
        >>> objective = client.objective("demo/logistic")
        >>> fun, hessp = objective.value_and_grad, objective.hessp
        >>> found = scipy.optimize.minimize(
        ...     fun, x0, jac=True, hessp=hessp, method="trust-ncg"
        ... )
    """

    def __init__(
        self,
        transport: Transport,
        message: objective_pb2.Objective,
        unflatten: Callable[[Sequence[Any]], Any] | None = None,
        *,
        warned: bool = False,
    ) -> None:
        super().__init__(message, unflatten)
        bundle = self._bundle
        names = pytree.leaf_names(bundle.x_tree)
        self._transport = transport
        self.blocks: tuple[tuple[str, ...], ...] = tuple(
            tuple(names[leaf] for leaf in block.leaves) for block in bundle.blocks
        )
        self._recent: collections.deque[Point] = collections.deque(maxlen=_RECENT)
        self._lock = threading.Lock()
        self.platforms: tuple[str, ...] = tuple(bundle.platforms)
        self.precision: str = bundle.precision
        self._derivation = message.derivation
        self.mode: str = message.derivation.mode or bundle.mode
        self.watch = Watch(self.label, registration_check(message.check), self._check_now, warned=warned)
        self._watching = not self.watch.over

    def __repr__(self) -> str:
        verdict = self.watch.found.verdict
        check = f" check={verdict}" if verdict in ("failed", "undecided") else ""
        return f"<Objective {self.label} n={self.n} {self.dtype}{check}>"

    def _repr_html_(self) -> str:
        leaves = [f"{leaf.name or 'x'} {list(leaf.shape)}" for leaf in self.leaves[:_SHOWN_LEAVES]]
        if more := len(self.leaves) - len(leaves):
            leaves.append(f"and {more} more")
        facts = {
            "digest": self.digest[:12],
            "n": self.n,
            "dtype": self.dtype,
            "leaves": ", ".join(leaves),
            "mode": self.mode,
            "precision": self.precision,
            "check": self.watch.found.verdict,
        }
        return _html.facts(f"Objective {self.label}", facts)

    def _watch_check(self) -> None:
        """Warn once if the server's check of the registration did not pass."""
        if self._watching:
            self.watch.look()
            self._watching = not self.watch.over

    def _check_now(self) -> RegistrationCheck | None:
        """Ask the server once for its check; return None if it does not answer."""
        request = objective_pb2.GetObjectiveRequest(name=self.digest)
        found = self._transport.ask_once(self._transport.channel.objectives.GetObjective, request)
        return None if found is None else registration_check(found.objective.check)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this object: copies of estimators and of settings share it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return self._transport.objective_again, (self._transport.settings, self.digest)

    def _point_again(self, spec: bytes, x: codec.Array, pin: int | None, data: Mapping[str, bytes]) -> Point:
        """Return the point of a pickle."""
        transport = self._transport.staying()
        transport.store(data)
        return Point(self, transport, curvature_pb2.PointSpec.FromString(spec), x, pin=pin, data=data)

    # SciPy's signatures

    # Each takes data in place of the registered data, as `at` does: SciPy's `args`.

    def value(self, x: Any, *data: Any) -> float:
        """Return f(x), with the registered data or with other data as for `at`.

        Example:
            >>> objective.value(x)
        """
        return self.at(x, *data).value

    def gradient(self, x: Any, *data: Any) -> codec.Array:
        """Return the gradient at x, of shape (n,), in the objective's dtype.

        Data is as for `at`.

        Example:
            >>> scipy.optimize.check_grad(objective.value, objective.gradient, x)
        """
        return self._kind(x)(self.at(x, *data).gradient.copy())  # type: ignore[no-any-return]

    def value_and_grad(self, x: Any, *data: Any) -> tuple[float, codec.Array]:
        """Return f(x) and its gradient of shape (n,).

        It is `fun` of scipy.optimize.minimize with `jac=True`; `args` are data as for
        `at`.

        Example:
            >>> value, gradient = objective.value_and_grad(x)
        """
        point = self.at(x, *data)
        return point.value, self._kind(x)(point.gradient.copy())

    def hessp(self, x: Any, p: Any, *data: Any) -> codec.Array:
        """Return the Hessian at x times p, of shape (n,), in the objective's dtype.

        It is `hessp` of scipy.optimize.minimize; `args` are data as for `at`.

        Example:
            >>> minimize(fun, x0, jac=True, hessp=objective.hessp, method="trust-ncg")
        """
        direction = self.vector(p, "p") if isinstance(p, Mapping) else self._flat(p, "p", exact="")
        product: codec.Array = self.at(x, *data).hessian() @ direction
        return self._kind(p)(product)  # type: ignore[no-any-return]

    def as_jax(self, *data: Any) -> "Function":
        """Return f as a function of jax arrays, which is twice differentiable.

        The value, the gradient and products with the Hessian come from the server.
        `jax.grad`, `jax.jvp`, `jax.hessian`, `jit`, `vmap`, `scan` and `while_loop`
        work. A third derivative is an error. If x has a vmapped axis, the server visits
        one x after the other. Directions at one x are multiplied as one block.

        Args:
            data: Data in place of the registered data, as for `at`.

        Returns:
            A function of a flat vector of shape (n,), of a pytree of the registered
            structure, or of a mapping of the names of `leaves` to arrays. Its result is
            a scalar in the objective's dtype.

        Raises:
            MissingExtraError: jax is not installed here.
            InvalidArgumentError: The data is traced by jax: derivatives by the data are
                impossible. Raised by the function: x does not fit or is not real, or
                the objective is float64 and jax computes with 32 bits.

        Example:
            >>> f = objective.as_jax()
            >>> gradient = jax.grad(f)(params)
        """
        function: Function = _jax.load("as_jax").function(self, data)
        return function

    def dense_layers(self) -> "list[DenseLayer]":
        """Return the dense layers that `Point.kfac` covers.

        Example:
            >>> [layer.kernel for layer in objective.dense_layers()]
        """
        from hvpd._operators import kronecker

        return kronecker.dense_layers(self._bundle, self._derivation.dense_layers, self.slices())

    def minimize(
        self,
        x0: Any,
        method: Literal["trust-ncg", "newton-cg", "lbfgs"] = "trust-ncg",
        *,
        args: tuple[Any, ...] = (),
        M: Any = None,
        callback: Callable[..., object] | None = None,
        gtol: float = 1e-5,
        maxiter: int | None = None,
    ) -> "OptimizeResult":
        """Minimise f from x0, with products in place of the Hessian.

        All arguments are those of `hvpd.krylov.minimize`.

        Args:
            x0: Start: a flat vector of shape (n,), or a pytree.
            method: "trust-ncg", "newton-cg" or "lbfgs".
            args: Data in place of the registered data, as for `at`.
            M: Preconditioner, or a function of a point that returns one.
            callback: Called after each iteration, as by SciPy.
            gtol: The norm of the gradient must be at most this.
            maxiter: Largest number of iterations; None for 200 n.

        Returns:
            SciPy's OptimizeResult. `objective.unravel(found.x)` is x as a pytree.

        Raises:
            InvalidArgumentError: x0 does not fit, or f is not finite there.

        Example:
            >>> found = objective.minimize(x0)
            >>> found.x, found.fun, found.success
        """
        from hvpd import krylov

        return krylov.minimize(self, x0, method, args=args, M=M, callback=callback, gtol=gtol, maxiter=maxiter)

    def has(self, program: str) -> bool:
        """Return whether the objective has a program, such as "ggn".

        Example:
            >>> if objective.has("ggn"):
            ...     G = objective.at(x).ggn()
        """
        return program in self._derivation.programs

    def derivative_rules(self) -> DerivativeRules:
        """Return the derivative rules that the server put back or presumed.

        Example:
            >>> objective.derivative_rules().presumed
        """
        found = self._derivation
        return DerivativeRules(dict(found.recognised), dict(found.presumed))

    def plan(self) -> Plan:
        """Return the program for each block width, with its reason, ascending by width.

        The server chooses from measured times, and can change its choice.

        Example:
            >>> for choice in objective.plan():
            ...     print(choice.width, choice.program)
        """
        choices = self._get_plan().choices
        return Plan(
            Choice(c.width, c.program, c.hvp_seconds or None, c.apply_seconds or None, c.reason) for c in choices
        )

    def registration_check(self) -> RegistrationCheck:
        """Return the result of the server's check at the x of the registration.

        After `Client.register` the server multiplies a few vectors in the background.
        It checks symmetry, linearity, and one central difference of gradients, as far
        as the dtype shows them. Until then the verdict is "pending". NaN and infinity
        leave it undecided. Each call asks the server. `check` examines more.

        Example:
            >>> objective.registration_check().verdict
        """
        request = objective_pb2.GetObjectiveRequest(name=self.digest)
        found = self._transport.unary(self._transport.channel.objectives.GetObjective, request).objective
        self.watch.found = registration_check(found.check)
        return self.watch.found

    def compiles(self) -> list[Compile]:
        """Return the compilations of this objective, in the order of the requests.

        The first products of a new objective wait for the first compilations.

        Example:
            >>> for found in objective.compiles():
            ...     print(found.program, found.state, found.error)
        """
        compiles = self._get_plan().compiles
        names = {number: name.removeprefix("STATE_").lower() for name, number in objective_pb2.Compile.State.items()}
        return [Compile(c.program, c.width, names.get(c.state, "unknown"), c.seconds, c.error) for c in compiles]

    def _get_plan(self) -> objective_pb2.GetPlanResponse:
        request = objective_pb2.GetPlanRequest(digest=self.digest)
        response: objective_pb2.GetPlanResponse
        response = self._transport.unary(self._transport.channel.objectives.GetPlan, request)
        return response

    def check(
        self, x: Any, *data: Any, seed: int = 0, probes: Any = 4, operator: protocol.OperatorName = "hessian"
    ) -> "Certificate":
        """Check at x whether products behave like the Hessian of values and gradients.

        Products are compared with each other: symmetry, linearity, block against
        columns, repeats, block widths. They are also compared with central differences
        of gradients and, by the order of the Taylor remainder, with values. Thresholds
        follow from the dtype and from rounding measured close to x, which the item
        "precision" reports. If rounding or a kink hides an answer, the item is
        undecided, and does not count as failed. NaN and infinity at x fail the item
        "finite", and leave the others undecided. The check visits about 50 points for 4
        probes.

        Other operators of a composite are not derivatives of its gradient. For them the
        item "definite" replaces differences and values: v'Gv must not be negative. That
        holds for Fisher matrices, and for Gauss-Newton if the loss is convex in the
        model's output.

        Args:
            x: A flat vector of shape (n,), or a pytree of the registered structure.
            data: Data in place of the registered data, as for `at`.
            seed: Seed of the probes, from 0.
            probes: Number of tangents to draw, or the tangents, of shape (k, n).
            operator: "hessian", "ggn", "fisher" or "empirical_fisher".

        Returns:
            A `Certificate`, with `passed`, `items` and `to_json()`. Its `str` is a
            table.

        Raises:
            InvalidArgumentError: x or data does not fit the registered ones. Or probes
                are zero, not finite, or of another shape. Or the objective has no such
                operator.

        Example:
            >>> certificate = objective.check(x)
            >>> print(certificate)
        """
        from hvpd._check import certificate, verdicts

        self.watch.warned, self._watching = True, False  # The certificate says more than the warning.
        base = self.at(x, *data)

        def at(flat: codec.Array) -> Point:
            # The data is stored already. These points are not remembered, because no
            # caller returns to them.
            spec = curvature_pb2.PointSpec()
            spec.CopyFrom(base._spec)  # noqa: SLF001 - the point is one of its own
            spec.x_digest = codec.digest(codec.payload(flat))
            return Point(self, base._transport, spec, flat)  # noqa: SLF001 - the point is one of its own

        eps = verdicts.resolution([leaf.dtype for leaf in self._bundle.x_leaves], self.precision)
        with self._transport.reporter.stage(f"checking {self.label}"):
            return certificate.certify(base, at, operator=operator, eps=eps, seed=seed, probes=probes)

    # Points

    def at(self, x: Any, *data: Any, pin: int | None = None) -> "Point":
        """Make a point resident on the device; return it with its value and gradient.

        Args:
            x: A flat vector of shape (n,), or a pytree of the registered structure. Or
                a PyTorch module, for an objective of `hvpd.torch.register`: the point
                is at its parameters, with its buffers.
            data: Data in place of the registered data, with as many arguments and the
                same structure, shapes and dtypes. For a module, `data` is its inputs
                and targets; its buffers are taken from the module. With `any_rows`,
                data may have any number of rows. Do not change the arrays later: the
                point keeps them, and sends them again if the server has lost them.
            pin: Seconds for which the point stays on the device after its last use; see
                `Point.pin`.

        Raises:
            InvalidArgumentError: x or data does not fit the registered ones.

        Example:
            >>> point = objective.at(x)
            >>> point.value, point.gradient.shape
        """
        flat = self.vector(x)
        self._watch_check()
        tensors, payloads = self._data_of(x, data)
        found = self._recall(flat, tensors)
        if found is not None:
            if pin is not None:
                found.pin(pin)
            return found
        transport = self._transport.staying()
        transport.store(payloads)
        spec = curvature_pb2.PointSpec(
            objective_digest=self.digest,
            data=tensors,
            default_data=not tensors,
            x_digest=codec.digest(codec.payload(flat)),
        )
        return self._remember(Point(self, transport, spec, flat, pin=pin, data=payloads))

    def _recall(self, x: codec.Array, data: Sequence[tensor_pb2.Tensor]) -> "Point | None":
        """Return a remembered point at x with the same data.

        Args:
            x: Flat vector of shape (n,).
            data: Other data; empty for the registered data.
        """
        # Bits are compared, because that is many times faster than a digest, and most
        # calls return to a recent point.
        with self._lock:
            recent = (point for point in reversed(self._recent) if point._has_data(data))  # noqa: SLF001 - its own point
            return next((point for point in recent if np.array_equal(_bits(point.x), _bits(x))), None)

    def _remember(self, point: "Point") -> "Point":
        """Remember a point, so that `at` finds it again by its x."""
        with self._lock:
            self._recent.append(point)
        return point


def _bits(vector: codec.Array) -> codec.Array:
    """Return the bits as integers: NaN equals NaN, and -0.0 differs from 0.0."""
    return vector.view(f"u{vector.dtype.itemsize}")
