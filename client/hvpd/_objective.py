"""Objectives and points as a client sees them. Nothing here needs jax."""

import collections
import dataclasses
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from hvpd import _blocks, _codec, _protocol, _pytree, _text
from hvpd._errors import HvpdError, InvalidArgumentError, OverloadedError
from hvpd._exchange import Asked
from hvpd._transport import Step, Transport
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2

if TYPE_CHECKING:
    from hvpd._check import Certificate, RegistrationCheck
    from hvpd._kronecker import DenseLayer, KroneckerOperator
    from hvpd._operator import CurvatureOperator, HessianOperator

_RECENT = 4
"""Points that an objective remembers: a line search goes back and forth between few."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What multiplies blocks of one width, in `Objective.plan`."""

    width: int
    """Vectors in a launch, a power of two."""
    program: str
    """"hvp", which recomputes what depends on x, or "apply", which reads it back."""
    hvp_seconds: float | None
    """Least time of a launch of `hvp` that the server has measured; None where it has none."""
    apply_seconds: float | None
    """Likewise of `apply`."""
    reason: str
    """Why, in words."""


@dataclasses.dataclass(frozen=True)
class Compile:
    """What became of one program at one block width, in `Objective.compiles`."""

    program: str
    """Its name, such as "hvp"."""
    width: int
    """Block width; 0 for programs that multiply nothing."""
    state: str
    """"queued", "compiling", "ready" or "failed"."""
    seconds: float
    """How long it took, or has taken so far."""
    error: str
    """Why it failed."""


@dataclasses.dataclass(frozen=True)
class DerivativeRules:
    """Derivative rules that StableHLO does not state, in `Objective.derivative_rules`."""

    recognised: Mapping[str, int]
    """Rules that the server put back, and how often: from marks that the client left, or from forms that the server knows."""
    presumed: Mapping[str, int]
    """Rules that the server chose as jax would, since the program states none, and how often. Compare them with the framework
    that wrote the program."""


class Objective:
    """A registered f(x, *data). Made by `Client.register` and `Client.objective`.

    Wherever it takes an x, that is a flat vector of n real numbers or a pytree of the registered structure. Numbers are
    converted to the objective's dtype. Points it has visited are remembered, so repeated calls at the same x send nothing.

    Attributes:
        n: Number of elements of x.
        dtype: float32 or float64: of flat vectors, gradients and products.
        digest: SHA-256 of what was registered, in hexadecimal: its identity.
        name: The name it was found by; empty where it has none.
        platforms: Platforms that it has branches for; empty if it is the same on every platform.
        precision: Matrix-multiplication precision that it was traced with.
        mode: How its products are made; see `Client.register`.
        blocks: Names of the leaves of each principal block that the server compiled at registration; see `Client.register`.
    """

    def __init__(
        self,
        transport: Transport,
        message: objective_pb2.Objective,
        unflatten: Callable[[Sequence[Any]], Any] | None = None,
    ) -> None:
        bundle = message.bundle
        _check_structure(bundle)
        self._transport = transport
        self._bundle = bundle
        self._unflatten = unflatten or self._rebuilt
        names = _pytree.leaf_names(bundle.x_tree)
        self.blocks: tuple[tuple[str, ...], ...] = tuple(
            tuple(names[leaf] for leaf in block.leaves) for block in bundle.blocks
        )
        self._recent: collections.deque[Point] = collections.deque(maxlen=_RECENT)
        self._lock = threading.Lock()
        self.n: int = bundle.n
        self.dtype: np.dtype[Any] = np.dtype(bundle.dtype)
        self.digest: str = message.digest
        self.name: str = message.name
        self.platforms: tuple[str, ...] = tuple(bundle.platforms)
        self.precision: str = bundle.precision
        self._derivation = message.derivation
        self.mode: str = message.derivation.mode or bundle.mode

    @property
    def label(self) -> str:
        """The name, or the beginning of the digest."""
        return _text.printable(self.name or self.digest[:12])

    def __repr__(self) -> str:
        return f"<Objective {self.label} n={self.n} {self.dtype}>"

    # SciPy's signatures

    def value(self, x: Any) -> float:
        """f(x) with the registered data."""
        return self.at(x).value

    def gradient(self, x: Any) -> _codec.Array:
        """The gradient at x, of shape (n,), in the objective's dtype."""
        return self.at(x).gradient.copy()

    def value_and_grad(self, x: Any) -> tuple[float, _codec.Array]:
        """f(x) and its gradient of shape (n,): `fun` of scipy.optimize.minimize with `jac=True`."""
        point = self.at(x)
        return point.value, point.gradient.copy()

    def hessp(self, x: Any, p: Any) -> _codec.Array:
        """The Hessian at x times p, both of shape (n,): `hessp` of scipy.optimize.minimize."""
        product: _codec.Array = self.at(x).hessian() @ self._flat(p, "p", exact="")
        return product

    def size_of(self, leaves: Sequence[int]) -> int:
        """Return the number of elements of some leaves of x, by position; n for none."""
        return sum(math.prod(self._bundle.x_leaves[leaf].shape) for leaf in leaves) if leaves else self.n

    def dense_layers(self) -> "list[DenseLayer]":
        """The dense layers of a composite's model that `Point.kfac` covers; empty for other objectives."""
        from hvpd import _kronecker

        return _kronecker.dense_layers(self._bundle, self._derivation.dense_layers, self.slices())

    def has(self, program: str) -> bool:
        """Whether it was registered with a program, such as "ggn"."""
        return program in self._derivation.programs

    def derivative_rules(self) -> DerivativeRules:
        """Return where the server's derivatives of this objective come from."""
        found = self._derivation
        return DerivativeRules(dict(found.recognised), dict(found.presumed))

    def plan(self) -> list[Choice]:
        """Which program multiplies blocks of which width on this server now, and what that rests on; ascending by width."""
        request = objective_pb2.GetPlanRequest(digest=self.digest)
        choices = self._transport.unary(self._transport.objectives.GetPlan, request).choices
        return [Choice(c.width, c.program, c.hvp_seconds or None, c.apply_seconds or None, c.reason) for c in choices]

    def registration_check(self) -> "RegistrationCheck":
        """What the server found when it multiplied a few vectors at the x of the registration; asked anew with each call.

        It runs in the background after `Client.register`, and its verdict is "pending" until it has: symmetry, linearity, and one
        central difference of gradients, as far as the dtype sees. What is not finite there is undecided. `check` sees more.
        """
        from hvpd import _check

        request = objective_pb2.GetObjectiveRequest(name=self.digest)
        found = self._transport.unary(self._transport.objectives.GetObjective, request).objective
        return _check.RegistrationCheck.of(found.check)

    def compiles(self) -> list[Compile]:
        """What the server has compiled of this objective, or will have, in the order in which it was asked for.

        The first products of a new objective wait for its first compiles: this tells how far they are.
        """
        request = objective_pb2.GetPlanRequest(digest=self.digest)
        compiles = self._transport.unary(self._transport.objectives.GetPlan, request).compiles
        names = {number: name.removeprefix("STATE_").lower() for name, number in objective_pb2.Compile.State.items()}
        return [Compile(c.program, c.width, names.get(c.state, "unknown"), c.seconds, c.error) for c in compiles]

    def check(self, x: Any, *data: Any, seed: int = 0, probes: Any = 4, operator: str = "hessian") -> "Certificate":
        """The certificate at x: whether products behave like the Hessian of the values and gradients, as far as the dtype sees.

        Products are held against each other (symmetry, linearity, block against columns, repeats, block widths), against central
        differences of gradients, and, through the order of the Taylor remainder, against values. Thresholds follow from the
        dtype, and from rounding measured close to x, which the item "precision" tells; what rounding or a kink hides is undecided,
        and no failure. NaN and infinity at x fail the item "finite", and leave the others undecided. It visits about 50 points
        for 4 probes.

        The curvature of a composite is no derivative of its gradient. It is held against itself, and has to be "definite": v'Gv
        is not negative, always of Fisher matrices, of Gauss-Newton where the loss is convex in the model's output.

        Args:
            x: A flat vector of shape (n,), or a pytree of the registered structure.
            data: In place of the registered data, as for `at`.
            seed: Of the probes, from 0.
            probes: How many tangents to draw, or the tangents themselves, of shape (k, n).
            operator: "hessian", "ggn", "fisher" or "empirical_fisher".

        Returns:
            A `Certificate`: `passed`, `items`, `to_json()`; printed, a table.

        Raises:
            InvalidArgumentError: x or data does not fit what was registered; probes that are not finite, zero, or of another
                shape; an operator that is none, or that the objective was registered without.
        """
        from hvpd import _check

        base = self.at(x, *data)

        def at(flat: _codec.Array) -> Point:
            # Data is bound already: only x changes. These points are not worth remembering.
            spec = curvature_pb2.PointSpec()
            spec.CopyFrom(base._spec)  # noqa: SLF001 - the point is one of its own
            spec.x_digest = _codec.digest(_codec.payload(flat))
            return Point(self, self._transport, spec, flat)

        eps = _check.resolution([leaf.dtype for leaf in self._bundle.x_leaves], self.precision)
        return _check.certify(base, at, operator=operator, eps=eps, seed=seed, probes=probes)

    # Points

    def at(self, x: Any, *data: Any, pin: int | None = None) -> "Point":
        """Makes the point resident on the device and returns it, with its value and gradient.

        Args:
            x: A flat vector of shape (n,), or a pytree of the registered structure.
            pin: Seconds for which the point stays on the device after it was last used, whatever else wants room; see `Point.pin`.
            data: In place of the registered data: as many arguments, of the same structure, shapes and dtypes; of any number of
                rows where it was registered with `any_rows`. The point holds on to it, to send it again to a server that has
                lost it: leave the arrays as they are.

        Raises:
            InvalidArgumentError: x or data does not fit what was registered.
        """
        flat = self.vector(x)
        if not data:
            # Comparing bits is many times faster than a digest, and most calls come back to a point that was just visited.
            with self._lock:
                for recent in reversed(self._recent):
                    if recent.default_data and np.array_equal(_bits(recent.x), _bits(flat)):
                        found = recent
                        break
                else:
                    found = None
            if found is not None:
                if pin is not None:
                    found.pin(pin)
                return found
        tensors, payloads = self._tensors(data) if data else ([], {})
        self._transport.store(payloads)
        spec = curvature_pb2.PointSpec(
            objective_digest=self.digest,
            data=tensors,
            default_data=not data,
            x_digest=_codec.digest(_codec.payload(flat)),
        )
        return self.remember(Point(self, self._transport, spec, flat, pin=pin, data=payloads))

    def remember(self, point: "Point") -> "Point":
        """Has the point found again by who comes back to its x."""
        with self._lock:
            self._recent.append(point)
        return point

    def _tensors(self, data: Sequence[Any]) -> tuple[list[tensor_pb2.Tensor], dict[str, _codec.Buffer]]:
        """The tensors of data in place of what was registered, and the bytes of each by its digest."""
        bundle = self._bundle
        takes = len(bundle.data_tree.children)
        if len(data) != takes:
            raise InvalidArgumentError(f"{self.label} takes {takes} data arguments after x, got {len(data)}")
        leaves = self._leaves(bundle.data_tree, tuple(data), "data")
        arrays: list[_codec.Array] = []
        for path, leaf, spec in zip(_pytree.leaf_paths(bundle.data_tree), leaves, bundle.data, strict=True):
            array = _codec.data_array(leaf, f"data{path}", x_dtype=self.dtype, x64=bundle.x64)
            expected, shape, why = _codec.dtype(spec.dtype), tuple(spec.shape), "as registered"
            if len(arrays) in bundle.row_leaves and array.ndim > 0:
                first = bundle.row_leaves[0]
                rows = len(arrays[first]) if len(arrays) > first else len(array)
                if not rows:
                    raise InvalidArgumentError(
                        f"data needs at least one row, and data{path} has the shape {list(array.shape)}"
                    )
                shape = (rows, *shape[1:])
                if len(array) != rows:
                    why = f"as long as data{_pytree.leaf_paths(bundle.data_tree)[first]}"
            if array.shape != shape or not np.can_cast(array.dtype, expected, "safe"):
                raise InvalidArgumentError(
                    f"data{path} must be {spec.dtype}{list(shape)} {why}, got {array.dtype}{list(array.shape)}"
                )
            arrays.append(array.astype(expected, copy=False))
        payloads = [_codec.payload(array) for array in arrays]
        digests = [_codec.digest(payload) for payload in payloads]
        tensors = [
            tensor_pb2.Tensor(dtype=spec.dtype, shape=array.shape, digest=digest)
            for spec, array, digest in zip(bundle.data, arrays, digests, strict=True)
        ]
        return tensors, dict(zip(digests, payloads, strict=True))

    # Between the pytree and the flat vector

    def ravel(self, tree: Any) -> _codec.Array:
        """The flat vector of shape (n,) of a pytree of the registered structure, in jax's flattening order.

        Raises:
            InvalidArgumentError: Another structure, another shape, or not real floating numbers.
        """
        leaves = self._leaves(self._bundle.x_tree, tree, "x")
        parts = []
        for path, leaf, spec in zip(
            _pytree.leaf_paths(self._bundle.x_tree), leaves, self._bundle.x_leaves, strict=True
        ):
            array = np.asarray(leaf)
            if array.shape != tuple(spec.shape):
                raise InvalidArgumentError(f"x{path} must have the shape {tuple(spec.shape)}, got {array.shape}")
            parts.append(self._real(array, f"x{path}").reshape(-1))
        return np.concatenate(parts)

    def unravel(self, vector: Any) -> Any:
        """The pytree of a flat vector of shape (n,): the registered structure, shapes and dtypes.

        Whoever registered it gets their own containers back. Elsewhere dicts, lists, tuples, named tuples and None come as
        they are, other containers as dicts of their children.
        """
        flat = self._flat(vector, "the vector", exact="")
        leaves, start = [], 0
        for spec in self._bundle.x_leaves:
            size = int(np.prod(spec.shape, dtype=np.int64))
            leaf = flat[start : start + size].reshape(tuple(spec.shape))
            try:
                dtype = _codec.dtype(spec.dtype)
            except TypeError:  # bfloat16 where ml_dtypes is not installed
                dtype = self.dtype
            leaves.append(leaf.astype(dtype))
            start += size
        return self._unflatten(leaves)

    def slices(self) -> dict[str, slice]:
        """Where each leaf of x lies in the flat vector, in its order.

        A leaf is called by the keys, fields and indices that lead to it, joined by slashes: "hidden/w", "layers/0"; by "" where x
        is a single array.
        """
        found, start = {}, 0
        for name, spec in zip(_pytree.leaf_names(self._bundle.x_tree), self._bundle.x_leaves, strict=True):
            size = math.prod(spec.shape)
            found[name] = slice(start, start + size)
            start += size
        return found

    def vector(self, x: Any, what: str = "x") -> _codec.Array:
        """The flat vector, in the objective's dtype, of what a caller gave: flat, or a pytree of the registered structure."""
        spec = self._bundle.x_tree
        if spec.kind == spec.KIND_LEAF or isinstance(x, np.ndarray) or hasattr(x, "__array__"):
            array = np.asarray(x)
            if spec.kind == spec.KIND_LEAF and array.shape == tuple(self._bundle.x_leaves[0].shape):
                array = array.reshape(-1)
            return self._flat(array, what, exact="x")
        return self.ravel(x)

    def _rebuilt(self, leaves: Sequence[Any]) -> Any:
        """Return the pytree of leaves, for callers that did not register it."""
        try:
            return _pytree.rebuild(self._bundle.x_tree, leaves)
        except (TypeError, ValueError) as error:
            raise HvpdError(
                f"the structure of x that the server stated for {self.label} is none of Python's: {error}"
            ) from None

    def _flat(self, vector: Any, what: str, *, exact: str) -> _codec.Array:
        array = np.asarray(vector)
        if array.shape == () and self.n == 1:
            array = array.reshape(1)
        if array.shape != (self.n,):
            structure = _pytree.describe(self._bundle.x_tree)
            raise InvalidArgumentError(
                f"{what} must be a vector of shape ({self.n},)"
                + (f" or {structure} as registered" if exact else "")
                + f", got shape {array.shape}"
            )
        if not exact and array.dtype.kind in "iub":
            array = array.astype(self.dtype)
        return self._real(array, what)

    def _real(self, array: _codec.Array, what: str) -> _codec.Array:
        if not _codec.is_real_floating(array.dtype):
            raise InvalidArgumentError(f"{what} must have real floating elements, got dtype {array.dtype}")
        return np.ascontiguousarray(array, dtype=self.dtype)

    def _leaves(self, spec: _pytree.Spec, tree: Any, what: str) -> list[Any]:
        try:
            return _pytree.leaves(spec, tree)
        except _pytree.StructureError as error:
            if "jax" in sys.modules:  # A container of the user's own: jax knows how to flatten it.
                from hvpd._registration import export

                structure, leaves = export.flatten(tree)
                if structure == spec:
                    return leaves
            raise InvalidArgumentError(f"{what} has another structure than the registered one: {error}") from None


def _check_structure(bundle: objective_pb2.Bundle) -> None:
    """Raise ValueError if the trees and shapes of a bundle, as a server states them, contradict each other or are too large."""
    if bundle.dtype not in _codec.VECTOR_DTYPES:
        raise ValueError(f"x must have one of the dtypes {', '.join(_codec.VECTOR_DTYPES)}, got {bundle.dtype!r}")
    for tree, leaves in ((bundle.x_tree, bundle.x_leaves), (bundle.data_tree, bundle.data)):
        _pytree.check(tree)
        _pytree.check_names(tree)
        if _pytree.count(tree) != len(leaves):
            raise ValueError(f"a tree has {_pytree.count(tree)} leaves, and {len(leaves)} are described")
    sizes = sum(_codec.count(leaf.shape) for leaf in bundle.x_leaves)
    if sizes != bundle.n:
        raise ValueError(f"the leaves of x have {sizes} elements, and n is {bundle.n}")


class Point:
    """(objective, data, x), resident on the server's device. Made by `Objective.at`.

    The server may forget it, to make room or in a restart; then it is made again from what this holds, unnoticed.

    Attributes:
        objective: Whose point it is.
        x: The flat vector, of shape (n,); read-only.
        value: f(x, *data).
        gradient: Of shape (n,); read-only.
        mode: How its products are made; the objective's.
        default_data: Whether it is bound to the data that was registered.
        nonfinite: Which of "x", "value" and "gradient" hold NaN or infinity; empty where all is well.
    """

    def __init__(
        self,
        objective: Objective,
        transport: Transport,
        spec: curvature_pb2.PointSpec,
        x: _codec.Array,
        *,
        step: Step | None = None,
        pin: int | None = None,
        data: Mapping[str, _codec.Buffer] = MappingProxyType({}),
    ) -> None:
        self.objective = objective
        self.mode = objective.mode
        self.n = objective.n
        self.dtype = objective.dtype
        self._transport = transport
        self._spec = spec
        self.default_data = spec.default_data
        self.x = x.copy()
        self.x.flags.writeable = False
        self._pin = None if pin is None else _blocks.integer(pin, "pin", 0, _protocol.MAX_PIN_SECONDS)
        self._data = data
        message, gradient = self._create(self._pin, step)
        gradient.flags.writeable = False
        self._id = message.id
        self.value: float = message.value
        self.gradient: _codec.Array = gradient
        counts = {"x": message.nonfinite_x, "value": message.nonfinite_value, "gradient": message.nonfinite_gradient}
        self.nonfinite: tuple[str, ...] = tuple(name for name, count in counts.items() if count)

    def moved(self, alpha: float, direction: Any) -> "Point":
        """The point x + alpha * direction, with the same data: a step of a line search.

        The server makes x from this point, if it still has it, and the direction, which is sent for the first step along it only. x
        itself is not sent, unless it is 64 KiB at most; the result is the same as that of `objective.at(point.x + alpha * direction)`.

        Args:
            alpha: The length of the step, rounded to the objective's dtype.
            direction: A flat vector of shape (n,), or a pytree of the registered structure.

        Raises:
            InvalidArgumentError: The direction does not fit, or alpha is no finite number.
        """
        alpha = _blocks.finite(alpha, "alpha")
        p = self.objective.vector(direction, "the direction")
        # Rounded as the server rounds it, or the digests would differ. What is too large becomes infinite, and `nonfinite` tells.
        with np.errstate(over="ignore", invalid="ignore"):
            x = p * self.dtype.type(alpha)
            x += self.x
        spec = curvature_pb2.PointSpec()
        spec.CopyFrom(self._spec)
        spec.x_digest = _codec.digest(_codec.payload(x))
        step = Step(self._id, alpha, p)
        return self.objective.remember(Point(self.objective, self._transport, spec, x, step=step, data=self._data))

    def pin(self, seconds: int) -> None:
        """Keeps the point and its data on the device until it has not been used for so long, whatever else wants room.

        The server pins half of its memory at most. 0 gives it up. Points that are not pinned come back by themselves, too: pinning
        saves the time that takes.

        Raises:
            OverloadedError: Too much is pinned already.
        """
        pin = _blocks.integer(seconds, "seconds", 0, _protocol.MAX_PIN_SECONDS)
        self._transport.create_point(self._spec, self.x, pin_seconds=pin)
        self._pin = pin

    def hessian(self, shift: float = 0.0, *, mode: str = "", precision: str = "") -> "HessianOperator":
        """The Hessian plus `shift` times the identity, as a symmetric scipy.sparse.linalg.LinearOperator of shape (n, n).

        Args:
            shift: Added to the diagonal.
            mode: How products are made: "forward_over_reverse", "reverse_over_forward", "reverse_over_reverse", "linearized" or
                "finite_difference". Empty: as the objective was registered; see `Client.register`. The first product in another
                mode waits until the server has compiled it.
            precision: Of matrix products that state none: "highest", "high" or "default". Empty: as the objective was registered.
        """
        from hvpd._operator import HessianOperator

        return HessianOperator(self, shift, mode=mode, precision=precision)

    def ggn(self, shift: float = 0.0, *, precision: str = "") -> "CurvatureOperator":
        """The Gauss-Newton matrix of a composite objective plus `shift` times the identity, as a LinearOperator like `hessian`.

        Args:
            shift: Added to the diagonal.
            precision: As for `hessian`.

        Raises:
            InvalidArgumentError: The objective was registered as one function.
        """
        return self._curvature("ggn", curvature_pb2.OPERATOR_GGN, shift, precision=precision)

    def fisher(self, shift: float = 0.0, *, seed: int | None = None, precision: str = "") -> "CurvatureOperator":
        """The Fisher matrix of the model's own distribution plus `shift` times the identity, likewise; see `hvpd.composite`.

        Args:
            shift: Added to the diagonal.
            seed: From 0 to 2**64 - 1: an unbiased Monte-Carlo estimate in place of the exact matrix, from targets drawn with this
                seed. The same seed is the same matrix.
            precision: As for `hessian`.

        Raises:
            InvalidArgumentError: The objective is no composite, or has no distribution.
        """
        if seed is None:
            return self._curvature("fisher", curvature_pb2.OPERATOR_FISHER, shift, precision=precision)
        return self._curvature("fisher", curvature_pb2.OPERATOR_SAMPLED_FISHER, shift, _seed(seed), precision)

    def empirical_fisher(self, shift: float = 0.0, *, precision: str = "") -> "CurvatureOperator":
        """The empirical Fisher matrix, of the gradients at the targets, plus `shift` times the identity, likewise.

        Args:
            shift: Added to the diagonal.
            precision: As for `hessian`.

        Raises:
            InvalidArgumentError: The objective is no composite, or its model's output is not one array with a row an example.
        """
        return self._curvature("empirical_fisher", curvature_pb2.OPERATOR_EMPIRICAL_FISHER, shift, precision=precision)

    def kfac(self, shift: float = 0.0, *, seed: int | None = None) -> "KroneckerOperator":
        """The Kronecker-factored approximation (K-FAC) of the Gauss-Newton matrix, plus `shift` times the identity.

        For each dense layer y = a W + b of a composite's model, of kernel and bias together, A (x) G: A the mean of a'a, G the
        curvature in y. The server computes the factors; they come here once, and products and `inverse()` take no round trip:
        `cg(point.ggn(mu), b, M=point.kfac(mu).inverse())`. Exact where the model has one row of
        activations in each layer, or is linear. Leaves of x that are in no dense layer have zeros. Sources: Martens and Grosse, ICML (2015).

        Args:
            shift: Added to the diagonal; a positive one is needed to invert.
            seed: In place of the Gauss-Newton matrix, the Fisher matrix with targets drawn by this seed (see `fisher`), which costs
                one backward pass a sample, not two for each of the model's outputs.

        Raises:
            InvalidArgumentError: The objective is no composite of a model with dense layers, or a seed was given and it has no
                distribution.
        """
        from hvpd._kronecker import KroneckerBlock, KroneckerOperator

        program = "kfac" if seed is None else "sampled_kfac"
        if not self.objective.has(program):
            raise InvalidArgumentError(
                f"{self.objective.label} was registered without {program}: register hvpd.composite(model, loss"
                f"{'' if seed is None else ', distribution=...'}), with a model that returns one array [rows, ...] and has layers "
                "a @ W + b, W and b being leaves of x that are used nowhere else"
            )
        layers = self.objective.dense_layers()
        request = curvature_pb2.ComputeFactorsRequest(point_id=self._id, seed=None if seed is None else _seed(seed))
        sizes = [size for layer in layers for size in layer.elements.shape]
        factors = self._transport.factors(request, sizes, self.dtype, restore=self._restore)
        blocks = tuple(
            KroneckerBlock(layer.kernel, layer.bias, layer.elements, A, G)
            for layer, A, G in zip(layers, factors[::2], factors[1::2], strict=True)
        )
        return KroneckerOperator(blocks, self.dtype, self.n, _blocks.finite(shift, "shift"))

    def _curvature(
        self, program: str, kind: int, shift: float, seed: int = 0, precision: str = ""
    ) -> "CurvatureOperator":
        from hvpd._operator import CurvatureOperator

        if not self.objective.has(program):
            wants = {"ggn": "", "fisher": ", distribution=...", "empirical_fisher": ""}[program]
            raise InvalidArgumentError(
                f"{self.objective.label} was registered without {program}: register hvpd.composite(model, loss{wants})"
                + (", with a model that returns one array [rows, ...]" if program != "ggn" else "")
            )
        return CurvatureOperator(self, kind, seed=seed, shift=shift, precision=precision)

    def multiply(
        self,
        V: _codec.Array,
        operator: int = curvature_pb2.OPERATOR_HESSIAN,
        seed: int = 0,
        leaves: Sequence[int] = (),
        mode: str = "",
        precision: str = "",
    ) -> _codec.Array:
        """V[k,n] -> HV[k,n], row-major, in the objective's dtype: what the operators are made of.

        Args:
            V: One vector a row.
            operator: Which curvature H is: a value of `hvpd.v1.curvature_pb2.Operator`.
            seed: Of operators that are drawn.
            leaves: Positions of leaves of x, ascending: the principal block of these, whose vectors have its elements only. Empty:
                the whole.
            mode: How the product is made; empty for the objective's mode.
            precision: Precision of matrix products that state none; empty for the objective's.

        Raises:
            InvalidArgumentError: V has another shape or dtype, or mode or precision are none that there is.
        """
        return self._ask(V, Asked(self._id, operator, False, seed, tuple(leaves), mode, precision))

    def quadratic_form(
        self,
        V: _codec.Array,
        operator: int = curvature_pb2.OPERATOR_HESSIAN,
        seed: int = 0,
        leaves: Sequence[int] = (),
        mode: str = "",
        precision: str = "",
    ) -> _codec.Array:
        """V[k,n] -> v'Hv for each row, of shape (k,), in the objective's dtype; only these numbers come back.

        Args:
            V: As for `multiply`.
            operator: As for `multiply`.
            seed: As for `multiply`.
            leaves: As for `multiply`.
            mode: As for `multiply`.
            precision: As for `multiply`.

        Raises:
            InvalidArgumentError: V has another shape or dtype.
        """
        return self._ask(V, Asked(self._id, operator, True, seed, tuple(leaves), mode, precision))

    def _ask(self, V: _codec.Array, asked: Asked) -> _codec.Array:
        n = self.objective.size_of(asked.leaves)
        if V.ndim != 2 or V.shape[1] != n or V.dtype != self.dtype:
            raise InvalidArgumentError(f"a block must be {self.dtype}[k, {n}], got {V.dtype}{list(V.shape)}")
        if len(V) == 0:
            return np.empty_like(V[:, 0] if asked.quadratic_form else V)
        return self._transport.multiply(
            asked, np.ascontiguousarray(V), restore=self._restore, objective=self.objective.digest
        )

    def _create(self, pin: int | None, step: Step | None = None) -> tuple[curvature_pb2.Point, _codec.Array]:
        """Makes the point resident; where the server has lost its data, that is sent again."""
        for _ in self._data:  # Each try may find one corrupt.
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
                "the server needs the data of this point again, and its arrays were changed since it was made: make it anew"
            ) from error

    def _restore(self) -> None:
        try:
            self._create(self._pin)
        except OverloadedError as error:
            if error.reason != "PINNED" or not self._pin:
                raise
            self._create(None)  # Others have been pinned meanwhile: a product needs no pin.

    def __repr__(self) -> str:
        warning = f", not finite: {', '.join(self.nonfinite)}" if self.nonfinite else ""
        return f"<Point of {self.objective.label}: value {self.value:g}{warning}>"


def _seed(seed: object) -> int:
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise InvalidArgumentError(f"a seed is a whole number from 0 to 2**64 - 1, got {seed!r}")
    return int(seed)


def _bits(vector: _codec.Array) -> _codec.Array:
    """The vector's bits as integers: equal for equal bits, NaN included, and -0.0 is not 0.0."""
    return vector.view(f"u{vector.dtype.itemsize}")
