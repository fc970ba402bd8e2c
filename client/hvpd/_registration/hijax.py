"""Keeps the derivative rules of jax's high-level primitives while a function is traced.

`jax.lax.custom_root` of jax 0.11 is such a primitive, and users can define more with
`jax.experimental.hijax`. jax replaces each by its expansion before any lowering rule is
asked, so its derivative rule would be lost without an error. Inside of `kept_rules`
this thread binds a `jax.custom_jvp` of the expansion instead, which gets a mark.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
import jax.custom_derivatives
import jax.experimental.hijax
import jax.interpreters.ad
from jax.extend.core import Primitive, jaxprs_in_params

_active = threading.local()

_NAME: Final = "call_hi_primitive"

_BASE: Final[Any] = getattr(jax.experimental.hijax, "HiPrim", None) or jax.experimental.hijax.VJPHiPrimitive
"""The base class of high-level primitives, which jax 0.11 renamed."""


@contextlib.contextmanager
def kept_rules() -> Iterator[None]:
    """Decorate tracing and lowering.

    This thread then binds high-level primitives with their rules.
    """
    _install()
    before = getattr(_active, "now", False)
    _active.now = True
    try:
        yield
    finally:
        _active.now = before


def is_high(closed: Any) -> bool:
    """Return whether a jaxpr has high-level primitives or values.

    Its lowering would lose their rules.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    # jax 0.10 forgets its own flag when it removes dead code.
    return bool(jaxpr.is_high) or any(
        equation.primitive.name == _NAME or any(map(is_high, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


@functools.cache
def _install() -> None:
    """Divert the binding of high-level primitives once.

    Outside of `kept_rules` the binding stays jax's.
    """
    registered: dict[Primitive, Any] = jax.interpreters.ad.primitive_jvps
    primitive = next(each for each in registered if each.name == _NAME)
    bind: Callable[..., Any] = primitive.bind

    def diverted(*args: Any, _prim: Any) -> Any:
        return _bind(_prim, args) if getattr(_active, "now", False) else bind(*args, _prim=_prim)

    primitive.bind = diverted  # type: ignore[method-assign]


def _bind(high: Any, args: Sequence[Any]) -> list[Any]:
    """Bind the expansion of a high-level primitive with its forward rule."""

    def expansion(*leaves: Any) -> list[Any]:
        return _leaves(high, high.expand(*jax.tree.unflatten(high.in_tree, leaves)))

    if type(high).transpose is not _BASE.transpose:
        # A linear primitive has no rule of its own to lose, and the server must be able
        # to transpose it.
        return expansion(*args)
    fun = jax.custom_jvp(expansion)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        symbolic = jax.custom_derivatives.SymbolicZero
        given = [jax.interpreters.ad.Zero(t.aval) if isinstance(t, symbolic) else t for t in tangents]
        outs, slopes = high.jvp(*(jax.tree.unflatten(high.in_tree, leaves) for leaves in (primals, given)))
        found = [
            symbolic(t.aval) if isinstance(t, jax.interpreters.ad.Zero) else t
            for t in high.out_tree.flatten_up_to(slopes)
        ]
        return _leaves(high, outs), found

    fun.defjvp(rule, symbolic_zeros=True)
    return list(fun(*args))


def _leaves(high: Any, tree: Any) -> list[Any]:
    leaves: list[Any] = high.out_tree.flatten_up_to(tree)
    return leaves
