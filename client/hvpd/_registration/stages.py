"""The traced stages of an objective: one function, or a model and a loss. Needs jax.

A stage is a function of flat arrays, so that a server needs none of the user's classes.
"""

import contextlib
import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from hvpd._composite import Composite
from hvpd._errors import InvalidArgumentError
from hvpd._registration.closures import HiddenError, check_closed
from hvpd._registration.hijax import is_high
from hvpd._registration.jaxprs import equations
from hvpd._registration.lift import lift, trace
from hvpd._registration.marked_primitives import UnmarkableError
from hvpd._wire import codec

_Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A traced function to lower.

    Its arguments are the leaves of its first argument, captured arrays, and leaves of
    data.
    """

    fun: _Function
    specs: Sequence[Any]
    closed: Any
    """The jaxpr that `fun` evaluates."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The arguments of a user's function, and the way to trace it."""

    tree_of: _Function
    """Makes the pytree x from its leaves."""
    arguments_of: _Function
    """Makes the trailing arguments from their leaves."""
    specs: Sequence[Any]
    """Specs of the leaves of x, then of data."""
    count: int
    """Number of leaves of x."""
    lift_bytes: int
    """Bytes of the largest closed-over array that stays a constant."""
    _: dataclasses.KW_ONLY
    widened: bool
    """Whether this trace is in 64 bits, while all other traces of jax are in 32."""

    def trace(self, fun: _Function) -> tuple[list[codec.Array], dict[str, Stage]]:
        """Return the large arrays that a function closes over, and its stages by name.

        Raises:
            InvalidArgumentError: The function cannot be an objective; the message says
                why.
        """
        return self._composite(fun) if isinstance(fun, Composite) else self._single(fun)

    def _single(self, fun: _Function) -> tuple[list[codec.Array], dict[str, Stage]]:
        """Trace an objective of one function."""

        def flat(*leaves: Any) -> Any:
            return fun(self.tree_of(leaves[: self.count]), *self.arguments_of(leaves[self.count :]))

        _check_takes(fun, len(jax.eval_shape(lambda *leaves: self.arguments_of(leaves), *self.specs[self.count :])))
        captured, lifted, closed = self._scalar(flat, fun, self.specs, self.count)
        return captured, {"objective": self._stage(lifted, closed, self.specs, self.count, captured, 0, len(captured))}

    def _composite(self, composite: Composite) -> tuple[list[codec.Array], dict[str, Stage]]:
        """Trace the model and the loss of a composite separately."""
        takes = len(jax.eval_shape(lambda *leaves: self.arguments_of(leaves), *self.specs[self.count :]))
        if composite.inputs > takes:
            raise InvalidArgumentError(
                f"the model takes {composite.inputs} data arguments (inputs={composite.inputs}), {takes} were given",
                reason="CONFLICTING_OPTIONS",
            )

        def model_of(*leaves: Any) -> Any:
            taken = self.arguments_of(leaves[self.count :])[: composite.inputs]
            return composite.model(self.tree_of(leaves[: self.count]), *taken)

        with worded(composite.model):
            closed, z = trace(model_of, self.specs, widened=self.widened, lift_bytes=self.lift_bytes)
            check_closed(closed, self.count)
        _check_pure(composite.model, closed)
        leaves, treedef = jax.tree.flatten(z)
        _check_output(composite, z, leaves)
        models, model = lift(closed, self.lift_bytes)

        def loss_of(*z_and_leaves: Any) -> Any:
            return composite.loss(
                jax.tree.unflatten(treedef, z_and_leaves[: len(leaves)]),
                *self.arguments_of(z_and_leaves[len(leaves) :])[composite.inputs :],
            )

        outputs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        loss_specs = [*outputs, *self.specs[self.count :]]
        try:
            losses, loss, loss_closed = self._scalar(loss_of, composite.loss, loss_specs, len(leaves))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"the loss cannot take the value that the model returns, {_shapes(z)}: {error}", reason=error.reason
            ) from error
        captured = [*models, *losses]
        return captured, {
            "model": self._stage(model, closed, self.specs, self.count, captured, 0, len(models)),
            "loss": self._stage(loss, loss_closed, loss_specs, len(leaves), captured, len(models), len(captured)),
        }

    def _scalar(
        self, flat: _Function, fun: _Function, specs: Sequence[Any], count: int
    ) -> tuple[list[codec.Array], Any, Any]:
        """Trace a function that returns one scalar.

        Returns:
            Its large arrays, the function that takes them, and its jaxpr.
        """
        with worded(fun):
            closed, out = trace(flat, specs, widened=self.widened, lift_bytes=self.lift_bytes)
        _check_scalar(fun, out)
        _check_pure(fun, closed)
        check_closed(closed, count)
        return *lift(closed, self.lift_bytes), closed

    @staticmethod
    def _stage(
        lifted: Any,
        closed: Any,
        specs: Sequence[Any],
        count: int,
        captured: Sequence[codec.Array],
        first: int,
        last: int,
    ) -> Stage:
        """Make a function of (leaves, *captured, *data) with captured[first:last]."""
        arrays = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in captured]

        def stage(*args: Any) -> Any:
            own = args[count : count + len(captured)][first:last]
            return lifted(own, [*args[:count], *args[count + len(captured) :]])

        return Stage(stage, [*specs[:count], *arrays, *specs[count:]], closed)


@contextlib.contextmanager
def worded(fun: _Function) -> Iterator[None]:
    """Word the errors of jax while it traces or lowers a function."""
    try:
        yield
    except (InvalidArgumentError, HiddenError):
        raise
    except UnmarkableError as error:
        remedy = _remedy(error, str(error))
        raise InvalidArgumentError(
            f"{_place(_made_by(error))}{_name(fun)} cannot be registered: {remedy}{error}",
            reason="DERIVATIVE_RULE",
        ) from None
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        remedy = _remedy(error, said)
        # The frame that jax names there is one of hvpd's.
        said = re.sub(r"\n?The error occurred while tracing the function \w+ at [^\n]*", "", said).strip()
        frames = _own_frames(error.__traceback__)
        # An error that the user's own code raised is not jax's.
        theirs = not remedy and frames and frames[-1].tb_next is None
        subject = "" if theirs else f"jax cannot trace, differentiate or export {_name(fun)}: "
        _shorten(error, frames)
        raise InvalidArgumentError(f"{_place(frames)}{subject}{remedy}{said}", reason="NOT_TRACEABLE") from error


_FOREIGN = tuple(
    str(Path(file).parent) + os.sep for file in (jax.__file__, np.__file__, scipy.__file__, Path(__file__).parent)
)
"""Folders of jax, NumPy, SciPy and hvpd, whose frames an error does not name."""


def _own_frames(found: TracebackType | None) -> list[TracebackType]:
    """Return the parts of a traceback that are in the user's own code."""
    own = []
    while found is not None:
        file = found.tb_frame.f_code.co_filename
        if not file.startswith(("<frozen", "<string>", contextlib.__file__, *_FOREIGN)):
            own.append(found)
        found = found.tb_next
    return own


def _made_by(error: Exception) -> list[TracebackType]:
    """Return the user's own frames that made the operation whose lowering raised."""
    # jax adds them as the cause of the error.
    return _own_frames(error.__cause__.__traceback__ if error.__cause__ is not None else None)


def _place(frames: Sequence[TracebackType]) -> str:
    """Return the innermost place in the user's own code, to begin a message."""
    if not frames:
        return ""
    code = frames[-1].tb_frame.f_code
    return f"{code.co_filename}:{frames[-1].tb_lineno}, in {code.co_name}: "


def _shorten(error: Exception, frames: Sequence[TracebackType]) -> None:
    """Leave only the frames of the user's own code in the traceback of an error."""
    short = None
    for each in reversed(frames):
        short = TracebackType(short, each.tb_frame, each.tb_lasti, each.tb_lineno)
    error.__cause__ = None  # jax's remark about the frames that it has left out.
    error.__traceback__ = short


def _check_takes(fun: _Function, count: int) -> None:
    """Raise if a function does not take x and this many data arguments."""
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):  # Some callables have none.
        return
    try:
        signature.bind(*[None] * (1 + count))
    except TypeError as error:
        raise InvalidArgumentError(
            f"{_name(fun)}{signature} was called with x and {count} data arguments: {error}. Pass a value for each of its "
            "arguments after x: register(fun, x, *data)",
            reason="NOT_TRACEABLE",
        ) from None


_CALLBACKS = (
    "Libraries with equinox.error_if (diffrax, lineax, optimistix) leave it out if EQX_ON_ERROR=nan is in the environment "
    "before they are imported."
)


_NO_MESH = (
    "registration keeps no mesh around the function: pass jax.sharding.NamedSharding(mesh, spec) in place of the PartitionSpec, "
    "or leave it out. "
)


_TRAITS = (
    ("a non-empty mesh in context", _NO_MESH),
    ("not under a mesh context", _NO_MESH),
    ("Please set a mesh via", _NO_MESH),
    (
        "custom_vjp with symbolic_zeros",
        (
            "jax itself can differentiate it once only, if it is a loop of equinox with checkpoints. In diffrax, pass "
            "adjoint=diffrax.DirectAdjoint() instead of the default; in optimistix, adjoint=optimistix.ImplicitAdjoint(). "
        ),
    ),
    ("_callback", f"it has a callback inside, which the server cannot run. {_CALLBACKS} "),
    (
        "ffi_call",
        "it calls code outside of jax. If only one platform needs it, leave that platform out, as in platforms=('cpu',). ",
    ),
    (
        "pallas_call",
        "it has a Pallas kernel inside. If only one platform needs it, leave that platform out, as in platforms=('cpu',). ",
    ),
    (
        "out of bounds for int32",
        (
            "Integers have 32 bits here: all numbers if jax's x64 is off, and those computed from the rows with any_rows=True. "
            "Register without any_rows, or write the number as a float, such as 2.0**33. "
        ),
    ),
    ("not found for platforms", "register it with the platforms that can run it, such as platforms=('cpu',). "),
)
"""Parts of errors, each with its likely cause and what to do."""


def _remedy(error: Exception, said: str) -> str:
    """Return the likely cause of an error of jax, and what to do; empty if unknown."""
    for part, remedy in _TRAITS:
        if part in said:
            return remedy
    if "_DimExpr" in said or "Symbolic" in said or "symbolic" in said or "got 'm'" in said:
        return (
            "with any_rows=True (or row_reduction) the number of rows m is symbolic, and the function needs it as a number. "
            "Register it without any_rows, or write this part without the number of rows. "
        )
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return (
            "x and data are traced, and NumPy and SciPy cannot compute with them: use jax.numpy, and pass matrices of scipy.sparse "
            "as data. "
        )
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return (
            "it uses a value that an earlier trace left behind in a global variable, a list or an attribute. Keep no values of x "
            "or data there: return them, or compute them again. "
        )
    mask = isinstance(error, jax.errors.NonConcreteBooleanIndexError) or "jnp.nonzero must be statically" in said
    concrete = (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError)
    if mask or isinstance(error, concrete) or "concrete values" in said or "must be static integers" in said:
        if mask:
            where = "Keep the shape: use jnp.where(mask, x, 0) in place of x[mask]."
        elif "leaves[0]" not in said:
            where = "Bind a step count, flag or shape among the data with functools.partial."
        elif isinstance(error, jax.errors.TracerBoolConversionError):
            where = "Branch with jnp.where or jax.lax.cond."
        else:
            where = "Use jnp in place of math, remove float(), int() and .item(), and loop with jax.lax.fori_loop."
        return f"x and data are traced, so Python sees no values of them. {where} "
    return ""


def _name(fun: _Function) -> str:
    name: str = getattr(fun, "__name__", repr(fun))
    return name


def _shapes(tree: Any) -> Any:
    """Return the tree with dtype and shape in place of each leaf, for messages."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)


def _check_scalar(fun: _Function, out: Any) -> None:
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0] is not out:
        raise InvalidArgumentError(
            f"{_name(fun)} must return one scalar and nothing else, it returns {_shapes(out)}", reason="NOT_SCALAR"
        )
    if out.shape != ():
        raise InvalidArgumentError(
            f"{_name(fun)} must return a scalar, it returns an array of shape {out.shape}: reduce it, for instance with jnp.mean",
            reason="NOT_SCALAR",
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise InvalidArgumentError(
            f"{_name(fun)} must return a real floating scalar, it returns {out.dtype}", reason="NOT_SCALAR"
        )


def _check_pure(fun: _Function, closed: Any) -> None:
    callbacks = [each for each in equations(closed) if each.primitive.name.endswith("callback")]
    if closed.effects or callbacks:
        kinds = {type(each).__name__ for each in closed.effects} or {each.primitive.name for each in callbacks}
        made = callbacks[0].source_info.traceback if callbacks else None
        frames = _own_frames(made.as_python_traceback()) if made is not None else []
        raise InvalidArgumentError(
            f"{_place(frames)}{_name(fun)} has side effects ({', '.join(sorted(kinds))}): it has a callback, print or "
            f"checkify.check inside, which the server cannot run. Take it out. {_CALLBACKS}",
            reason="SIDE_EFFECTS",
        )
    if is_high(closed):
        raise InvalidArgumentError(
            f"{_name(fun)} uses values or primitives of jax.experimental.hijax whose derivative rules hvpd cannot send to the server: "
            "write this part of the function with arrays and other jax operations",
            reason="DERIVATIVE_RULE",
        )


def _check_output(composite: Composite, z: Any, leaves: Sequence[Any]) -> None:
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise InvalidArgumentError(
            f"the model must return real floating arrays, it returns {_shapes(z)}", reason="MODEL_OUTPUT"
        )
    rows = leaves[0].shape[0] if leaves[0] is z and leaves[0].ndim > 0 else None
    least = 2 if composite.distribution == "categorical" else 1
    if composite.distribution is not None and (rows is None or leaves[0].ndim < least):
        raise InvalidArgumentError(
            f"a model of distribution {composite.distribution!r} must return one array [rows, ...], it returns {_shapes(z)}",
            reason="MODEL_OUTPUT",
        )
