"""Turns values that functions close over into arguments, while a function is traced.

jax keeps such a value in places where nothing can replace it later: in the rules of a
`custom_jvp` or `custom_vjp`, and in the jaxpr of a nested jit. A large array would
become a constant of each program, and a value of the trace itself could not be sent at
all. Inside of `opened` this thread binds a function with rules again, with all such
values as arguments, and inlines a jit that holds a large array. Needs jax.

The rules know nothing of these arguments, so their derivatives are zero. That is wrong
for a value that depends on x, which jax refuses. `check_closed` refuses it, too.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
import jax.custom_derivatives
import jax.extend.core as jex
import jax.extend.linear_util
import jax.numpy as jnp
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, jit_p
from jax.interpreters import ad, batching, mlir

from hvpd._errors import InvalidArgumentError
from hvpd._registration.jaxprs import equations, held, is_sharded, open_jaxpr, traced

_active = threading.local()
"""`limit`: bytes of the largest array that may stay in a jit; None outside of `opened`.

`taken`: values that became arguments. `traced`: whether one of them belongs to a
trace. `depth`: functions with rules around the function that is traced."""

_NO_LIMIT: Final = 1 << 62

ORDERS: Final = 2
"""Derivatives that a rule survives.

A Hessian needs two. Each more repeats all rules inside rules once."""

_evaluate: Final[Any] = jex.jaxpr_as_fun

_SymbolicZero: Final = jax.custom_derivatives.SymbolicZero


@contextlib.contextmanager
def opened(limit: int, depth: int = 0) -> Iterator[list[Any]]:
    """Make closed-over values arguments of the functions that this thread traces.

    Args:
        limit: Bytes of the largest array that may stay in a nested jit.
        depth: Functions with rules around the function that is traced.

    Yields:
        The values that became arguments of functions with rules.
    """
    _install()
    before = (getattr(_active, "taken", []), getattr(_active, "depth", 0))
    taken: list[Any] = []
    _active.taken, _active.depth = taken, depth
    _active.traced = False
    try:
        with _with_limit(limit):
            yield taken
    finally:
        _active.taken, _active.depth = before


class HiddenError(Exception):
    """A rule that jax traced before holds a large array, or values of its trace."""


@contextlib.contextmanager
def lowering(limit: int | None) -> Iterator[None]:
    """Let `check_rule` refuse rules with larger arrays than `limit` in this thread."""
    _active.lowered = limit
    try:
        yield
    finally:
        _active.lowered = None


@contextlib.contextmanager
def rule(order: int) -> Iterator[None]:
    """Make closed-over values arguments in a rule that is traced for its lowering.

    Args:
        order: Rules around the function whose rule it is.
    """
    limit, before = getattr(_active, "lowered", None), getattr(_active, "traced", False)
    try:
        with opened(_NO_LIMIT if limit is None else limit, order + 1):
            yield
    except Exception as error:
        # The rule of such a function takes what it closes over for arguments, or holds
        # values of the earlier trace.
        if limit is not None and (type(error).__name__ == "CustomVJPException" or "DynamicJaxprTracer" in str(error)):
            raise HiddenError from error
        raise
    else:
        # jax traced the function before, so `check_closed` did not see its rule.
        if _active.traced:
            raise _depends_on_x() if limit is None else HiddenError
    finally:
        _active.traced = before


def check_rule(closed: Any) -> None:
    """Raise HiddenError if a rule holds a large array, inside of `lowering`."""
    limit = getattr(_active, "lowered", None)
    if limit is not None and any(getattr(each, "nbytes", 0) > limit for each in closed.consts):
        raise HiddenError


class _DependsOnXError(Exception):
    """A value that a function with rules closes over is differentiated."""


def _raise(*_: Any) -> Any:
    raise _DependsOnXError


_CLOSED_OVER: Final = jex.Primitive("hvpd_closed_over")
"""The identity, of values that must not depend on x."""
_CLOSED_OVER.def_impl(lambda value: value)
_CLOSED_OVER.def_abstract_eval(lambda aval: aval)
ad.primitive_jvps[_CLOSED_OVER] = _raise
batching.primitive_batchers[_CLOSED_OVER] = lambda args, axes: (_CLOSED_OVER.bind(*args), axes[0])
mlir.register_lowering(_CLOSED_OVER, lambda _, value: [value])


def check_closed(closed: Any, count: int) -> None:
    """Check that no function with rules closes over a value that depends on x.

    Args:
        closed: The jaxpr of the last `opened` of this thread.
        count: Number of leaves of x, the first arguments.

    Raises:
        InvalidArgumentError: One does.
    """
    if not _active.traced and all(each.primitive is not _CLOSED_OVER for each in equations(closed)):
        return
    fun, avals = _evaluate(closed), closed.in_avals

    def pulled(*args: Any) -> Any:
        outs, pull = jax.vjp(lambda *x: fun(*x, *args[count:]), *args[:count])
        return pull([jnp.ones_like(each) for each in outs])

    def pulled_twice(*args: Any) -> Any:
        outs, pull = jax.vjp(lambda *x: pulled(*x, *args[count:]), *args[:count])
        return pull(tuple(jnp.ones_like(each) for each in outs))

    def pushed(*args: Any) -> Any:
        return jax.jvp(lambda *x: pulled(*x, *args[count:]), args[:count], args[:count])

    # The server refuses functions without derivatives. Some functions lack forward
    # mode.
    if _differentiates(pulled, avals):
        for second in (pushed, pulled_twice):
            _differentiates(second, avals)


def _differentiates(derivative: Callable[..., Any], avals: Sequence[Any]) -> bool:
    try:
        jax.eval_shape(derivative, *avals)
    except (_DependsOnXError, jax.errors.UnexpectedTracerError):
        raise _depends_on_x() from None
    except Exception:  # noqa: BLE001 - of any kind
        return False
    return True


def _depends_on_x() -> InvalidArgumentError:
    return InvalidArgumentError(
        "a function with a derivative rule of its own (custom_jvp, custom_vjp) closes over a value that depends on x, and "
        "the rule does not differentiate by this value: pass the value to the function as an argument",
        reason="DERIVATIVE_RULE",
    )


@contextlib.contextmanager
def _with_limit(limit: int | None) -> Iterator[None]:
    before = getattr(_active, "limit", None)
    _active.limit = limit
    try:
        yield
    finally:
        _active.limit = before


@functools.cache
def _install() -> None:
    """Divert the binding of three primitives once.

    Outside of `opened` the binding stays jax's.
    """
    bind_jit: Callable[..., Any] = jit_p.bind

    def jit(*args: Any, **params: Any) -> Any:
        limit = getattr(_active, "limit", None)
        if limit is not None and any(
            getattr(each, "nbytes", 0) > limit or is_sharded(each) for each in held(params["jaxpr"])
        ):
            return _evaluate(params["jaxpr"])(*args)
        return bind_jit(*args, **params)

    jit_p.bind = jit  # type: ignore[method-assign]
    for primitive, opening in ((custom_jvp_call_p, _open_jvp), (custom_vjp_call_p, _open_vjp)):
        primitive.bind_with_trace = functools.partial(_bind, primitive.bind_with_trace, opening)  # type: ignore[method-assign]


def _bind(bind: Callable[..., Any], opening: Callable[..., Any], trace: Any, args: Any, avals: Any, params: Any) -> Any:
    """Bind a function with rules, again with all that it closes over as arguments."""
    # All other traces pass the function on to a trace of this class, or to none.
    if getattr(_active, "limit", None) is None or type(trace).__name__ != "DynamicJaxprTrace":
        return bind(trace, args, avals, params)
    # A rule may call its own function. A Hessian asks for no deeper rules.
    if _active.depth >= ORDERS:
        return bind(trace, args, avals, params)
    functions = params["subfuns"]
    before = len(_active.taken)
    with jex.set_current_trace(trace):
        try:
            _active.depth += 1
            found = opening(args, params)
            # Also a function inside of a rule may have taken values, even of the rule.
            if found is not None and not found[0] and len(_active.taken) == before:
                found = None
        except Exception:  # noqa: BLE001 - the rule may never be asked for, and otherwise raises again
            found = None
        finally:
            _active.depth -= 1
    # The traces above left their output trees behind, which jax stores once. With
    # `again`, jax still asks the function itself for its tree.
    for store in (store for function in functions[found is not None :] for store in function.stores):
        if store is not None:
            store.reset()
    if found is None:
        return bind(trace, args, avals, params)
    taken, again = found
    with jex.set_current_trace(trace), _with_limit(None):
        _active.taken += taken
        _active.traced |= any(isinstance(each, jax.core.Tracer) for each in taken)
        fixed = [_CLOSED_OVER.bind(each) if isinstance(each, jax.core.Tracer) else each for each in taken]
        return list(again(fixed, list(args)))


_Opened = tuple[list[Any], Callable[[list[Any], list[Any]], Sequence[Any]]] | None
"""The values that a function closed over, and the function that takes them and its
arguments; None if it cannot be opened."""


def _open_jvp(args: Sequence[Any], params: Any) -> _Opened:
    fun, jvp = params["subfuns"]
    avals = [jax.typeof(each) for each in args]
    tangents = [aval.to_tangent_aval() for aval in avals]
    symbolic = [params["symbolic_zeros"] and aval.dtype == jax.dtypes.float0 for aval in tangents]

    def rule(*values: Any) -> list[Any]:
        given = iter(values[len(avals) :])
        slopes = [_SymbolicZero(t) if s else next(given) for t, s in zip(tangents, symbolic, strict=True)]
        return [_dense(each) for each in jvp.call_wrapped(*values[: len(avals)], *slopes)]

    primal = traced(fun.call_wrapped, avals)
    forward = traced(rule, [*avals, *(t for t, s in zip(tangents, symbolic, strict=True) if not s)])
    taken, (compute, derive) = _shared((primal, forward))

    @jax.custom_jvp
    def again(taken: list[Any], args: list[Any]) -> list[Any]:
        return compute(taken, args)

    @again.defjvp
    def _(primals: Any, slopes: Any) -> tuple[list[Any], list[Any]]:
        kept = [each for each, s in zip(slopes[1], symbolic, strict=True) if not s]
        results = derive(primals[0], [*primals[1], *kept])
        return results[: len(results) // 2], results[len(results) // 2 :]

    return taken, again


def _open_vjp(args: Sequence[Any], params: Any) -> _Opened:
    if params["symbolic_zeros"]:  # Refused later, with a message.
        return None
    fun, fwd, bwd = params["subfuns"]
    avals = [jax.typeof(each) for each in args]
    primal = traced(fun.call_wrapped, avals)
    forward = traced(lambda *values: fwd.call_wrapped(*(each for value in values for each in (value, True))), avals)
    _, residual_tree, sources = params["out_trees"]()
    computed = len(forward.out_avals) - len(primal.out_avals)
    pruned = iter(forward.out_avals[:computed])
    residuals = [next(pruned) if source is None else avals[source] for source in sources]
    assert len(residuals) == residual_tree.num_leaves
    zeros: list[bool] = []

    def pull(*values: Any) -> list[Any]:
        found = bwd.call_wrapped(*values)
        # jax 0.11 returns a pair with the logs of the rule, which a derivative drops.
        found = found[0] if isinstance(found, tuple) else found
        zeros[:] = [isinstance(each, ad.Zero) for each in found]
        return [each for each, zero in zip(found, zeros, strict=True) if not zero]

    backward = traced(pull, [*residuals, *(aval.to_ct_aval() for aval in primal.out_avals)])
    taken, (compute, go, back) = _shared((primal, forward, backward))

    @jax.custom_vjp
    def again(taken: list[Any], args: list[Any]) -> list[Any]:
        return compute(taken, args)

    def again_forward(taken: list[Any], args: list[Any]) -> tuple[list[Any], Any]:
        results = go(taken, args)
        kept = iter(results[:computed])
        return results[computed:], (taken, [next(kept) if s is None else args[s] for s in sources])

    def again_backward(kept: Any, slopes: list[Any]) -> tuple[list[None], list[Any]]:
        found = iter(back(kept[0], [*kept[1], *slopes]))
        return [None] * len(taken), [None if zero else next(found) for zero in zeros]

    again.defvjp(again_forward, again_backward)
    return taken, again


def _dense(slope: Any) -> Any:
    return jnp.zeros(slope.shape, slope.dtype) if isinstance(slope, _SymbolicZero) else slope


def _shared(closed: Sequence[Any]) -> tuple[list[Any], list[Callable[[Sequence[Any], Sequence[Any]], list[Any]]]]:
    """Return the values that jaxprs close over, and the jaxprs as functions of these
    values and of their own arguments.
    """
    values = {id(each): each for jaxpr in closed for each in _taken(jaxpr)}
    places = {key: place for place, key in enumerate(values)}

    def function(jaxpr: Any) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
        evaluate = open_jaxpr(jaxpr)

        def evaluated(taken: Sequence[Any], args: Sequence[Any]) -> list[Any]:
            own = [taken[places[id(each)]] if id(each) in places else each for each in jaxpr.consts]
            return list(evaluate(*own, *args))

        return evaluated

    return list(values.values()), [function(jaxpr) for jaxpr in closed]


def _taken(closed: Any) -> list[Any]:
    """Return the constants of a jaxpr that become arguments.

    Tangents of integers have no values.
    """
    return [each for each in closed.consts if each.dtype != jax.dtypes.float0]
