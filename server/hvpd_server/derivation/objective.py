"""An imported objective, traced once for data of one size: f as a function that can be
differentiated.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from hvpd.v1 import objective_pb2
from hvpd_server.derivation.layout import Layout
from hvpd_server.derivation.products import Stages
from hvpd_server.importer import evaluate, refusals
from hvpd_server.importer.graph import Block, Module, TensorType
from hvpd_server.importer.table import Refused, Report

OBJECTIVE: Final = "objective"
"""Name of the program of an objective that is one function: (leaves of x, *captured,
*data) -> value.
"""

MODEL: Final = "model"
"""Name of a composite's first stage: (leaves of x, *captured, *data) -> leaves of z."""

LOSS: Final = "loss"
"""Name of a composite's second stage: (leaves of z, *captured, *data) -> value."""

Function = Callable[..., Any]


@contextlib.contextmanager
def tracing(precision: str) -> Iterator[None]:
    """Set jax up for derivatives of an objective: 64-bit types, and the precision of
    matrix products.

    A program states each of its types, so 64-bit types change nothing in a program that
    has none.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest" if precision == "exported" else precision):
        yield


@dataclasses.dataclass(frozen=True)
class Traced:
    """An objective for data of one size."""

    objective: Function
    """objective(leaves of x, *args) -> scalar; args are the captured arrays and the
    leaves of data.
    """
    stages: Stages | None
    """Both stages of a composite, in the leaves of x."""
    composite: objective_pb2.Composite | None
    """Distribution, reduction and samples of a composite."""
    layout: Layout
    """The leaves of x in the flat x."""
    x: jax.ShapeDtypeStruct
    """Spec of the flat x."""
    args: Sequence[jax.ShapeDtypeStruct]
    """Specs of args."""

    def fun(self, x: jax.Array, *args: jax.Array) -> Any:
        """F of the flat x."""
        return self.objective(*self.layout.whole(x, *args))


def trace(
    bundle: objective_pb2.Bundle,
    modules: Mapping[str, Module],
    *,
    rows: int = 0,
    platform: str = "cpu",
    precision: str = "default",
    report: Report | None = None,
) -> Traced:
    """Evaluate the programs of a bundle once under a jax trace.

    Call it within `tracing`.

    Args:
        bundle: Describes x and data.
        modules: The bundle's programs by name: `OBJECTIVE`, or `MODEL` and `LOSS`.
        rows: Rows of data, if their number is symbolic.
        platform: Branch to take if the program has one for each platform.
        precision: Precision of matrix products that state none.
        report: Where to note recognised and presumed derivative rules.

    Raises:
        Refused: The program has an operation that is not served, or other arguments and
            results than the bundle says.
    """
    layout = Layout([jax.ShapeDtypeStruct(tuple(leaf.shape), _dtype(leaf.dtype)) for leaf in bundle.x_leaves])
    args = [
        *(jax.ShapeDtypeStruct(tuple(tensor.shape), _dtype(tensor.dtype)) for tensor in bundle.captured),
        *(
            jax.ShapeDtypeStruct(
                (rows, *tensor.shape[1:]) if index in bundle.row_leaves else tuple(tensor.shape), _dtype(tensor.dtype)
            )
            for index, tensor in enumerate(bundle.data)
        ),
    ]
    x = jax.ShapeDtypeStruct((bundle.n,), _dtype(bundle.dtype))

    def stage(name: str, specs: Sequence[Any]) -> Any:
        module = modules[name]
        front = _branch(bundle.platforms, platform, module.main)
        _check_arguments(name, module.main.types, front, specs)
        run = evaluate.function(
            module, platform=platform, report=report, precision=precision, marked=bool(bundle.jax_version)
        )
        try:
            return jax.make_jaxpr(lambda *values: run(*front, *values))(*specs)
        except Refused as refused:
            raise Refused(refused.reason, f"{name} {refused}") from None

    if OBJECTIVE in modules:
        closed = stage(OBJECTIVE, [*layout.leaves, *args])
        _check_scalar(OBJECTIVE, closed.out_avals)
        whole = jex.jaxpr_as_fun(closed)
        return Traced(lambda leaves, *args: whole(*leaves, *args)[0], None, None, layout, x, args)
    first = stage(MODEL, [*layout.leaves, *args])
    outputs = first.out_avals
    if not outputs or not all(jnp.issubdtype(output.dtype, jnp.floating) for output in outputs):
        raise Refused(refusals.BUNDLE_INVALID, f"{MODEL} must return real floating arrays, it returns {outputs}")
    second = stage(LOSS, [*(jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs), *args])
    _check_scalar(LOSS, second.out_avals)
    run_model, run_loss = jex.jaxpr_as_fun(first), jex.jaxpr_as_fun(second)
    alone = len(outputs) == 1
    rows_of_z = outputs[0].shape[0] if alone and outputs[0].ndim > 0 else None

    def model(leaves: Sequence[jax.Array], *args: jax.Array) -> Any:
        z = run_model(*leaves, *args)
        return z[0] if alone else tuple(z)

    def loss(z: Any, *args: jax.Array) -> Any:
        return run_loss(*([z] if alone else z), *args)[0]

    stages = Stages(model, loss, len(args), rows_of_z)
    composite = bundle.composite
    if composite.distribution:
        least = 2 if composite.distribution == "categorical" else 1
        if rows_of_z is None or outputs[0].ndim < least:
            raise Refused(
                refusals.BUNDLE_INVALID,
                f"{MODEL} of distribution {composite.distribution} must return one array [rows, ...], it returns {outputs}",
            )
    return Traced(stages.whole, stages, composite, layout, x, args)


def _branch(platforms: Sequence[str], platform: str, main: Block) -> list[np.ndarray[Any, Any]]:
    """Return the leading argument of a program with branches for several platforms: the
    platform's number.
    """
    if not platforms:
        return []
    if platform not in platforms:
        raise Refused(
            refusals.BUNDLE_INCOMPATIBLE,
            f"has branches for {', '.join(platforms)}, and this server's device is {platform}: "
            f"register with platforms=({platform!r}, ...)",
        )
    if len(platforms) == 1:  # jax.export adds the argument only if there is something to choose.
        return []
    dtype = main.types[0].dtype if main.types and main.types[0].dtype in ("int32", "int64") else "int32"
    return [np.asarray(list(platforms).index(platform), dtype)]


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(jnp.dtype(name))


def _check_arguments(name: str, types: Sequence[TensorType], front: Sequence[Any], specs: Sequence[Any]) -> None:
    """Raise Refused unless the entry function has the arguments and results of the
    bundle.

    Extents that the program leaves open fit any size.
    """
    given = [TensorType(tuple(spec.shape), np.dtype(spec.dtype).name) for spec in [*front, *specs]]
    if len(types) != len(given) or not all(map(TensorType.fits, types, given)):
        first = len(front)  # The platform's index, which no user passes.
        what = "x and data are" if name == OBJECTIVE else "it gets"
        raise Refused(
            refusals.BUNDLE_INVALID, f"{name} takes {_listed(types[first:])}, and {what} {_listed(given[first:])}"
        )


def _listed(types: Sequence[TensorType]) -> str:
    more = f" and {len(types) - 8} more" if len(types) > 8 else ""
    return ", ".join(map(str, types[:8])) + more or "nothing"


def _check_scalar(name: str, results: Sequence[Any]) -> None:
    if len(results) != 1 or results[0].shape != () or not jnp.issubdtype(results[0].dtype, jnp.floating):
        raise Refused(
            refusals.BUNDLE_INVALID,
            f"{name} must return one real floating scalar, it returns {', '.join(map(str, results)) or 'nothing'}",
        )
