"""The programs of an objective, by name, each for one data size and block width."""

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
import numpy as np

from hvpd import _text
from hvpd.v1 import objective_pb2
from hvpd_server.derivation import conjugate_gradients, lanczos, several_steps, short_recurrences
from hvpd_server.derivation.dense_layers import Factors
from hvpd_server.derivation.layout import View
from hvpd_server.derivation.names import Name
from hvpd_server.derivation.objective import Traced, trace, tracing
from hvpd_server.derivation.products import Function, curvatures_of, hvp_of, linearized, pairs_of
from hvpd_server.derivation.spread import Spread
from hvpd_server.importer import refusals
from hvpd_server.importer.graph import Module
from hvpd_server.importer.table import LOOP_BYTES, Refused, Report

PAIRS_BYTES: Final = 64 << 10
"""Largest x, in bytes, whose products at many points share a launch: a larger x fills a
launch by itself.
"""

METHODS: Final = {conjugate_gradients.PREFIX: conjugate_gradients.METHOD, **short_recurrences.METHODS}
"""The iterations without a basis, by the prefixes of their programs."""

ITERATIONS: Final = (lanczos.PREFIX, *METHODS)
"""Prefixes of the programs of several steps."""

_ARRAY_BYTES: Final = refusals.Limits().array_bytes

Batched = Callable[[Function], Function]
"""A product of a block, given how to batch the product of one vector."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile."""

    ways: Sequence[Function]
    """The program, written in the ways to try in order: vectorized, then one vector
    after the other.
    """
    specs: Sequence[jax.ShapeDtypeStruct]
    """Arguments."""
    results: Any = None
    """Shardings of the results; None for those that are whole on each device."""

    def check(self) -> None:
        """Trace the program in the first way that jax can; raise the last way's error
        if there is none.

        Raises:
            Refused: The program has an array that no device can hold.
        """
        for way in self.ways[:-1]:
            try:
                closed = jax.make_jaxpr(way)(*self.specs)
            except Exception as error:
                if forbids_forward_mode(error):  # A loop would raise this only when it is lowered.
                    raise
            else:
                _check_sizes(closed.jaxpr)
                return
        _check_sizes(jax.make_jaxpr(self.ways[-1])(*self.specs).jaxpr)


def _check_sizes(jaxpr: Any) -> None:
    """Check every array that a program makes, those of loops and branches too: XLA
    aborts if a size overflows.

    What a scan stacks is in memory. Any other array may exist only in part, so its
    limit is far above any memory.
    """
    pending = [jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            limit = LOOP_BYTES if equation.primitive.name == "scan" else _ARRAY_BYTES
            for variable in equation.outvars:
                if math.prod(variable.aval.shape) * variable.aval.dtype.itemsize > limit:
                    raise Refused(
                        refusals.PROGRAM_TOO_LARGE,
                        f"makes an array of {variable.aval.str_short()} in {equation.primitive}, and {limit >> 40} TiB are "
                        "allowed: a derivative keeps the values of all rounds of a loop",
                    )
            values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
            inner = [getattr(value, "jaxpr", value) for value in values]
            pending += [each for each in inner if hasattr(each, "eqns")]


def forbids_forward_mode(error: Exception) -> bool:
    """Return whether an error says that a custom_vjp forbids forward mode."""
    return "custom_vjp" in str(error) or "custom_lin" in str(error)


class Derivation:
    """The programs of one objective.

    Args:
        bundle: The registered bundle.
        read: Reads the bundle's program of a name; called for each size of data and
            each precision.
        platform: Platform that the programs are for.
        described: Result of `Sized.describe`; None in the process that calls it.
    """

    def __init__(
        self,
        bundle: objective_pb2.Bundle,
        read: Callable[[str], Module],
        platform: str,
        described: objective_pb2.Derivation | None = None,
    ) -> None:
        self.bundle = bundle
        self.described = described or objective_pb2.Derivation(mode=bundle.mode)
        self._read = read
        self.platform = platform
        self._lock = threading.Lock()
        # Programs of one size of data share a trace, until the last point of that size
        # goes.
        self._sized: weakref.WeakValueDictionary[int, Sized] = weakref.WeakValueDictionary()

    def for_rows(self, rows: int) -> "Sized":
        """Return the programs for data of this many rows if their number is symbolic,
        or for 0 otherwise.
        """
        with self._lock:
            found = self._sized.get(rows)
            if found is None:
                found = self._sized[rows] = Sized(self, rows)
            return found

    def traced(self, rows: int, precision: str, report: Report | None = None) -> Traced:
        """Read and trace the objective. Call this within `tracing`."""
        modules = {name: self._read(name) for name in sorted(self.bundle.programs)}
        precision = "default" if precision == "exported" else precision
        return trace(self.bundle, modules, rows=rows, platform=self.platform, precision=precision, report=report)


class Sized:
    """The programs of an objective for data of one size, and one precision unless a
    program's name has another.
    """

    def __init__(self, derivation: Derivation, rows: int, precision: str = "") -> None:
        self._derivation = derivation
        self._rows = rows
        self._precision = precision or derivation.bundle.precision
        self._lock = threading.RLock()
        self._precise: dict[str, Sized] = {}

    def _at(self, precision: str) -> "Sized":
        """Return the programs in a precision; empty for this one."""
        if precision in ("", self._precision):
            return self
        if precision not in self._precise:
            self._precise[precision] = Sized(self._derivation, self._rows, precision)
        return self._precise[precision]

    @functools.cached_property
    def traced(self) -> Traced:
        """The objective."""
        return self._derivation.traced(self._rows, self._precision)

    @functools.cached_property
    def _linearized(self) -> tuple[Function, Batched, list[objective_pb2.Residual]]:
        return linearized(self.traced.fun, [self.traced.x, *self.traced.args])

    def _residuals(self) -> list[jax.ShapeDtypeStruct]:
        """Return the arguments of `apply` after its vectors."""
        return [
            jax.ShapeDtypeStruct(tuple(r.spec.shape), np.dtype(jax.numpy.dtype(r.spec.dtype)))
            for r in self._linearized[2]
        ]

    @functools.cached_property
    def _factors(self) -> Factors | None:
        traced = self.traced
        if traced.stages is None or traced.composite is None or traced.stages.rows is None:
            return None
        return Factors.of(traced.stages, traced.layout, traced.args, traced.composite)

    @property
    def by_leaf(self) -> bool:
        """Whether x and vectors are split by leaf if there are several devices."""
        return bool(self._derivation.bundle.sharded_parameters)

    @contextlib.contextmanager
    def tracing(self, name: str = "") -> Iterator[None]:
        """Set jax up to trace and lower a program."""
        with tracing((Name.parse(name).precision if name else "") or self._precision):
            yield

    def program(self, name: str, width: int, spread: Spread | None = None) -> Program:
        """Return a program for a block width, to be traced and lowered within
        `tracing(name)`.

        Args:
            name: Its name.
            width: Vectors of the block, or rows of the basis.
            spread: The layout of the vectors of several steps, if x is split.

        Raises:
            LookupError: There is no program of this name.
            Refused: The objective's program is not served.
        """
        parsed = Name.parse(name)
        with self._lock, self.tracing(name):
            return self._at(parsed.precision)._program(parsed, width, spread)  # noqa: SLF001 - another of this class

    def _program(self, name: Name, width: int, spread: Spread | None = None) -> Program:
        found = None if name.leaves else self._of_whole(name, width)
        if found is not None:
            return found
        for prefix in ITERATIONS:
            if name.base.startswith(prefix):
                return self._iteration(prefix, name._replace(base=name.base.removeprefix(prefix)), width, spread)
        traced = self.traced
        product, drawn = self._whole_or_block(name)
        block = jax.ShapeDtypeStruct((width, traced.layout.size(name.leaves or None)), traced.x.dtype)
        return _batched(product, [traced.x, block, *drawn, *traced.args])

    def _of_whole(self, name: Name, width: int) -> Program | None:
        """Return a program that exists for the whole x only, or None."""
        traced, base = self.traced, name.base
        x, args = traced.x, traced.args
        block = jax.ShapeDtypeStruct((width, x.size), x.dtype)
        if base == "value_and_grad":
            return Program([jax.value_and_grad(traced.fun)], [x, *args])
        if base == "prepare":
            return Program([self._linearized[0]], [x, *args])
        if base == "apply":
            return _batched(self._linearized[1], [block, *self._residuals()])
        if base == "hvp_pairs":
            return _batched(pairs_of(traced.fun, self._derivation.described.mode), [block, block, *args])
        if base in ("kfac", "sampled_kfac"):
            if self._factors is None:
                raise LookupError(str(name))
            return Program([self._factors.programs()[base]], [x, *_drawn(base), *args])
        return None

    def _iteration(self, prefix: str, name: Name, width: int, spread: Spread | None) -> Program:
        """Return several steps of an iteration around a product, for so many right-hand
        sides; or of Lanczos's iteration for a basis of so many rows. With `apply`, the
        last arguments are its residuals.
        """
        traced = self.traced
        size, dtype = traced.layout.size(name.leaves or None), traced.x.dtype
        n = size if spread is None else spread.n
        product: Batched
        if name.base == "apply":
            apply, args = self._linearized[1], self._residuals()
            product = lambda batch: lambda x, *arguments: apply(batch)(*arguments)  # noqa: E731
        else:
            product, drawn = self._whole_or_block(name)
            args = [*drawn, *traced.args]

        def multiply_by(way: Function) -> Function:
            return product(way) if spread is None else spread.through(product(way))

        single = multiply_by(_alone)
        if prefix == lanczos.PREFIX:

            def multiply(x: jax.Array, v: jax.Array, *args: jax.Array) -> Any:
                return single(x, v[None], *args)[0]

            steps = lanczos.lanczos_of(multiply, lanczos.steps_of(size), self._derivation.platform)
            basis = lanczos.specs_of(width, n, dtype, spread and spread.along(1))
            return Program([steps], [traced.x, *basis, *args], (basis[0].sharding, None, None, None))
        method, sizes = METHODS[prefix], several_steps.Sizes(width, n, dtype, name.form, spread)
        products = [single] if width == 1 else [multiply_by(jax.vmap), multiply_by(_in_turn)]
        specs = several_steps.specs_of(method, sizes)
        return Program(
            [several_steps.several(method, each, sizes) for each in products],
            [traced.x, *itertools.chain(*specs), *args],
            (tuple(spec.sharding for spec in specs[0]), None, None),
        )

    def _whole_or_block(self, name: Name) -> tuple[Batched, list[jax.ShapeDtypeStruct]]:
        """Return the product of an operator, or of a principal block of it, and the
        specs of its random key.
        """
        layout, leaves = self.traced.layout, name.leaves
        view: View = layout.block(leaves) if leaves else layout.whole
        product = self._product(name, view, extra=1 if leaves else 0)
        drawn = _drawn(name.base)
        if leaves:
            product = _restricted(product, functools.partial(layout.take, positions=leaves), len(drawn))
        return product, drawn

    def _product(self, name: Name, view: View, extra: int) -> Batched:
        """Return the product of an operator in a view of x."""
        traced, described = self.traced, self._derivation.described
        if name.base == "hvp":
            return hvp_of(lambda y, *args: traced.objective(*view(y, *args)), name.mode or described.mode)
        if traced.stages is None or traced.composite is None:
            raise LookupError(str(name))
        stages = dataclasses.replace(traced.stages, reverse=described.reverse_stages)
        return curvatures_of(stages.through(view, extra), traced.composite)[name.base]

    # For the vetting process

    def describe(self) -> objective_pb2.Derivation:
        """Find which programs there are, in which mode, and with which residuals.

        Traces each kind of derivative once.

        Raises:
            Refused: jax cannot differentiate the objective, or the program is not
                served.
        """
        with self._lock, self.tracing():
            return self._describe()

    def _describe(self) -> objective_pb2.Derivation:
        bundle, described, report = self._derivation.bundle, self._derivation.described, Report()
        self.traced = traced = self._derivation.traced(self._rows, self._precision, report)
        described.recognised.update(report.recognised)
        if not bundle.jax_version:  # A jax client marks every rule, so nothing is presumed for it.
            described.presumed.update(report.presumed)
        described.mode = mode = self._differentiable(bundle.mode)
        described.programs[:] = ["value_and_grad", "hvp"]
        if bundle.sharded_parameters:
            if mode != bundle.mode:
                raise Refused(
                    refusals.NOT_DIFFERENTIABLE,
                    f"has a rule for reverse mode only, and x that is split over devices needs {bundle.mode}: register it without "
                    'sharded="parameters"',
                )
            return described
        if mode != "linearized" and traced.x.size * traced.x.dtype.itemsize <= PAIRS_BYTES:
            described.programs.append("hvp_pairs")
        if not bundle.row_leaves and not bundle.sharded and mode in ("forward_over_reverse", "linearized", "auto"):
            described.programs.extend(["prepare", "apply"])
            described.residuals.extend(self._linearized[2])
        if traced.stages is not None and traced.composite is not None:
            curvatures = curvatures_of(traced.stages, traced.composite)
            described.programs.extend(curvatures)
            described.reverse_stages = not all(map(self._has_forward_mode, curvatures))
            if self._factors is not None:
                described.programs.extend(self._factors.programs())
                described.dense_layers.extend(layer.message for layer in self._factors.layers)
        return described

    def _differentiable(self, mode: str) -> str:
        """Return the mode, or reverse over reverse if jax forbids forward mode for the
        objective (a custom_vjp).
        """
        traced = self.traced
        block = jax.ShapeDtypeStruct((1, traced.x.size), traced.x.dtype)
        for each in dict.fromkeys([mode, "reverse_over_reverse"]):
            product = _batched(self._hessian(each), [traced.x, block, *traced.args])
            try:
                product.check()
            except (TypeError, NotImplementedError) as error:
                if forbids_forward_mode(error) and each != "reverse_over_reverse":
                    continue
                raise self._not_differentiable(error) from error
            except Refused:  # Its message says more than jax's.
                raise
            except Exception as error:
                raise self._not_differentiable(error) from error
            return each
        raise AssertionError

    def _has_forward_mode(self, base: str) -> bool:
        """Return whether jax allows forward mode for a product of a composite.

        It does not if a stage has a custom_vjp.
        """
        try:
            self._program(Name(base), 1).check()
        except (TypeError, NotImplementedError) as error:
            if not forbids_forward_mode(error):
                raise self._not_differentiable(error) from error
            return False
        return True

    def _not_differentiable(self, error: Exception) -> Refused:
        """Return the refusal, which says whether differences of gradients would do."""
        said = f"{type(error).__name__}: {_text.cut(str(error), 600).rstrip('.')}"
        traced = self.traced
        block = jax.ShapeDtypeStruct((1, traced.x.size), traced.x.dtype)
        try:
            _batched(self._hessian("finite_difference"), [traced.x, block, *traced.args]).check()
        except Exception:  # noqa: BLE001 - any error of the gradient means the same
            return Refused(
                refusals.NOT_DIFFERENTIABLE,
                f"jax on the server cannot differentiate it even once: {said}. No mode can serve it. Write that part with "
                "operations that have a derivative, or give it a rule of its own with jax.custom_vjp",
            )
        return Refused(
            refusals.NOT_DIFFERENTIABLE,
            f'jax on the server cannot differentiate it twice: {said}. Register it with mode="finite_difference", for central '
            "differences of its gradients",
        )

    def _hessian(self, mode: str) -> Batched:
        return hvp_of(self.traced.fun, mode)


def _drawn(base: str) -> list[jax.ShapeDtypeStruct]:
    """Return the spec of the random key that some programs take."""
    return [jax.ShapeDtypeStruct((2,), np.dtype(np.uint32))] if base.startswith("sampled_") else []


def _batched(product: Batched, specs: Sequence[jax.ShapeDtypeStruct]) -> Program:
    return Program([product(jax.vmap), product(_in_turn)], specs)


def _in_turn(f: Function) -> Function:
    """Batch a function by a loop."""
    return lambda V: jax.lax.map(f, V)


def _alone(f: Function) -> Function:
    """Batch a function for one vector, which may be a list of leaves."""
    return lambda V: jax.tree.map(lambda row: row[None], f(jax.tree.map(lambda rows: rows[0], V)))


def _restricted(product: Batched, take: Function, drawn: int) -> Batched:
    """Return (x, V, *drawn, *args) from a block's product (y, V, *drawn, x, *args)."""

    def batched(batch: Function) -> Function:
        multiply = product(batch)
        return lambda x, V, *args: multiply(take(x), V, *args[:drawn], x, *args[drawn:])

    return batched
