"""Lowers jax constructs so that their own derivative rules survive in StableHLO.

StableHLO states values, not derivative rules. `rules()` gives lowering rules for
`jax.export.export(..., _override_lowering_rules=rules())`. A construct with a rule
becomes a `stablehlo.composite` named "hvpd.<construct>". Its decomposition computes the
plain value, so every reader gets the right value. Its attribute "mark" is strict JSON,
which names the functions of the rule by their symbols. Its attribute "functions" refers
to these functions. The server's importer puts the rule back.

Two kinds of marks exist. Structural marks carry functions: custom_jvp, custom_vjp,
checkpoint, linear_solve, scan, and stop_gradient. Generic marks "hvpd.jax.<primitive>"
carry the parameters of a primitive whose lowering has several operations, or loses the
rule.

Every primitive that jax can differentiate is in one of the tables of
`marked_primitives`. A primitive in none of them is refused, because its derivative
could be silently wrong on the server.

XLA's refinement of symbolic shapes does not enter composites. Another reader of a
program with symbolic shapes must first turn composites into calls of their
decompositions.

Not kept: the policy of `jax.checkpoint` (the server saves nothing of the body).
Refused: a `custom_vjp` with `symbolic_zeros=True`, whose rule can depend on which
arguments are perturbed.
"""

import contextlib
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import jax
import jax.interpreters.ad
import jax.interpreters.mlir as lowering
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jaxlib.mlir import ir

from hvpd._registration import third_party
from hvpd._registration.closures import ORDERS, HiddenError, rule
from hvpd._registration.jaxprs import equations, listed, traced
from hvpd._registration.mark_operations import (
    CALL,
    Results,
    calling,
    emit_call,
    emit_composite,
    emit_function,
    lower_call,
    without_float0,
)
from hvpd._registration.marked_primitives import (
    COMPLEX,
    LOOKS_ALIKE,
    MARKED,
    WRITTEN_OUT,
    UnmarkableError,
    differentiable,
    is_floating,
    needs_mark,
    parameters_of,
    registered,
)

_PATTERNS: Final = 3
"""Most arguments of a function that gets a rule for each choice of symbolic zeros."""

_OPERATIONS: Final = frozenset(["add", "mul", "max", "min", "and", "or", "xor"])
"""Functions of two numbers whose reductions the server knows."""

_Rule = Callable[..., Results]


def rules() -> tuple[tuple[Primitive, _Rule], ...]:
    """Return lowering rules for one export.

    Returns:
        Pairs for `_override_lowering_rules` of `jax.export.export`. Make them anew for
        each export.
    """
    return _Marks().rules(0, None)


@dataclasses.dataclass(frozen=True)
class _Marks:
    """The lowering rules of one export, and the primitives that they lowered."""

    caches: dict[Any, tuple[ir.SymbolTable, dict[Any, Any], dict[Any, Any]]] = dataclasses.field(default_factory=dict)
    """Caches of jax's lowering, a pair for each module, order, and plain primitive."""
    tables: dict[tuple[int | None, str | None], tuple[tuple[Primitive, _Rule], ...]] = dataclasses.field(
        default_factory=dict
    )
    """Rules that were made, by the arguments of `rules`."""

    def rules(self, order: int | None, plain: str | None) -> tuple[tuple[Primitive, _Rule], ...]:
        """Return the rules for functions inside `order` rules.

        None gives the rules that mark nothing.

        Args:
            order: Number of rules around the function that is lowered.
            plain: Primitive that is lowered as jax does.
        """
        if (order, plain) not in self.tables:
            self.tables[order, plain] = tuple(self._rules(order, plain))
        return self.tables[order, plain]

    def _rules(self, order: int | None, plain: str | None) -> list[tuple[Primitive, _Rule]]:
        found: list[tuple[Primitive, _Rule]] = [(CALL, lower_call)]
        if order is None:
            return found
        structural: Mapping[str, Callable[..., Results]] = {
            "custom_jvp_call": self.custom_jvp,
            "custom_vjp_call": self.custom_vjp,
            "custom_linear_solve": self.linear_solve,
            "reduce": self.reduce,
            "remat2": self.checkpoint,
            "scan": self.scan,
            "stop_gradient": self.stop_gradient,
        }
        for name, primitive in registered().items():
            if name == plain:
                continue
            if name in structural:
                found.append((primitive, _bound(structural[name], order)))
            elif name in MARKED or name in COMPLEX or name == "pow":
                found.append((primitive, _bound(self.generic, order)))
            elif name in WRITTEN_OUT:
                found.append((primitive, _bound(self.written_out, order)))
            elif name in third_party.NAMES:
                found.append((primitive, _bound(self.replaced, order)))
            elif name not in LOOKS_ALIKE and differentiable(primitive):
                found.append((primitive, _refused))
        return found

    def context(
        self, ctx: lowering.LoweringRuleContext, order: int | None, plain: str | None = None
    ) -> lowering.ModuleContext:
        """Return the module's context with the rules of an order.

        It has caches of its own, because its lowerings differ.
        """
        module = ctx.module_context
        plain = None if order is None else plain
        key = (id(module.symbol_table), order, plain, tuple(module.platforms))
        _, primitives, functions = self.caches.setdefault(key, (module.symbol_table, {}, {}))
        parameters = dataclasses.replace(
            module.lowering_parameters,
            override_lowering_rules=self.rules(order, plain),  # type: ignore[arg-type]
        )
        return dataclasses.replace(
            module, lowering_parameters=parameters, lowering_cache=primitives, cached_primitive_lowerings=functions
        )

    def plain(
        self, ctx: lowering.LoweringRuleContext, order: int | None, primitive: Primitive, params: Mapping[str, Any]
    ) -> str:
        """Lower one primitive as jax does, and return the symbol of the function."""
        jaxpr = traced(lambda *args: primitive.bind(*args, **params), ctx.avals_in)
        if primitive.name == "cumsum":
            # For GPUs, jax 0.11 writes an operation with a region that older StableHLO
            # cannot state.
            ctx = ctx.replace(module_context=ctx.module_context.replace(platforms=("cpu",)))
        return emit_function(self.context(ctx, order, primitive.name), f"hvpd.plain.{primitive.name}", jaxpr)

    def unmarked(
        self, ctx: lowering.LoweringRuleContext, order: int, args: Sequence[Any], params: Mapping[str, Any]
    ) -> Results:
        """Lower one primitive without a mark, but with marks inside."""
        primitive = ctx.primitive
        assert primitive is not None
        inlined = lowering.lower_fun(lambda *args: listed(primitive.bind(*args, **params)))
        result: Results = inlined(ctx.replace(module_context=self.context(ctx, order, primitive.name)), *args)
        return result

    def generic(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> Results:
        """Mark a primitive with its parameters."""
        primitive = ctx.primitive
        assert primitive is not None
        if not needs_mark(primitive.name, ctx.avals_in):
            return self.unmarked(ctx, order, args, params)
        try:
            facts = {"parameters": parameters_of(primitive, params, ctx.avals_in)}
        except UnmarkableError:
            if differentiable(primitive) and primitive.name != "gather":
                raise
            # A gather's own lowering has the same derivatives: only its sizes may not
            # be plain numbers.
            return self.unmarked(ctx, order, args, params)
        symbol = self.plain(ctx, None, primitive, params)
        return emit_composite(ctx, f"jax.{primitive.name}", symbol, facts, args)

    def written_out(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> Results:
        """Lower a primitive as jax does for platforms without a library for it.

        The operations have marks inside.
        """
        primitive = ctx.primitive
        assert primitive is not None
        if not all(isinstance(axis, int) for axis in params.get("axes", ())):
            _refused(ctx)  # A psum between devices.
        lowered = lowering._lowerings[primitive].rule  # noqa: SLF001 - jax has no public way to its lowerings
        result: Results = lowered(ctx.replace(module_context=self.context(ctx, order)), *args, **params)
        return result

    def replaced(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> Results:
        """Lower a function of jax that stands for another package's primitive."""
        primitive = ctx.primitive
        assert primitive is not None
        inner = params.get("prim")
        if inner is not None and inner.name in WRITTEN_OUT:
            return self.written_out(order, ctx, *args, **params)
        # jax's own way to lower a function would drop the rules in the function.
        jaxpr = traced(third_party.function(primitive, params, len(args)), ctx.avals_in)
        # The function calls the primitive for its values.
        symbol = emit_function(self.context(ctx, order, primitive.name), f"hvpd.{primitive.name}", jaxpr)
        return emit_call(ctx, symbol, args, ctx.avals_out)

    def reduce(
        self,
        order: int,
        ctx: lowering.LoweringRuleContext,
        *args: Any,
        jaxpr: ClosedJaxpr,
        dimensions: Sequence[int],
        **params: Any,
    ) -> Results:
        """Lower a reduction by any function as jax differentiates it.

        The server knows the derivatives of a reduction by one operation.
        """
        primitive = ctx.primitive
        assert primitive is not None
        steps = [each.primitive.name for each in equations(jaxpr) if each.primitive.name not in ("jit", "pjit")]
        count = len(args) // 2
        is_known = len(steps) <= count and _OPERATIONS.issuperset(steps)
        shape: Sequence[Any] = ctx.avals_in[0].shape  # type: ignore[attr-defined]
        if is_known or not all(isinstance(size, int) for size in shape):
            return self.unmarked(ctx, order, args, {"jaxpr": jaxpr, "dimensions": dimensions, **params})
        reduced = traced(lambda *given: _by_halves(jaxpr, dimensions, given[:count], given[count:]), ctx.avals_in)
        return emit_call(ctx, emit_function(self.context(ctx, order), "hvpd.reduce", reduced), args, ctx.avals_out)

    def stop_gradient(self, order: int, ctx: lowering.LoweringRuleContext, x: Any) -> Results:
        """Mark the identity without derivative."""
        symbol = emit_function(ctx.module_context, "hvpd.identity", traced(lambda x: [x], ctx.avals_in))
        return emit_composite(ctx, "stop_gradient", symbol, {}, [x])

    def checkpoint(
        self,
        order: int,
        ctx: lowering.LoweringRuleContext,
        *args: Any,
        jaxpr: Any,
        prevent_cse: bool | tuple[bool, ...],
        differentiated: bool,
        policy: Any,
    ) -> Results:
        """Mark a function whose values are computed again for its derivative."""
        symbol = emit_function(ctx.module_context, "hvpd.checkpoint", ClosedJaxpr(jaxpr, ()))
        facts = {"prevent_cse": prevent_cse if isinstance(prevent_cse, bool) else list(prevent_cse)}
        return emit_composite(ctx, "checkpoint", symbol, facts, args)

    def scan(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> Results:
        """Mark a loop with a fixed number of steps."""
        jaxpr, length = params["jaxpr"], params["length"]
        consts, carry = _scan_counts(params)
        scanned = len(args) - consts - carry
        symbolic = not isinstance(length, (int, np.integer))
        if jaxpr.effects or (symbolic and not scanned):
            return self.unmarked(ctx, order, args, params)
        body = emit_function(ctx.module_context, "hvpd.body", jaxpr)
        called = traced(calling(body, jaxpr.out_avals), jaxpr.in_avals)
        assert ctx.primitive is not None
        symbol = self.plain(ctx, None, ctx.primitive, params | {"jaxpr": called})
        facts = {
            "body": body,
            "length": None if symbolic else operator.index(length),
            "reverse": bool(params["reverse"]),
            "consts": consts,
            "carry": carry,
            "unroll": operator.index(params["unroll"]),
        }
        return emit_composite(ctx, "scan", symbol, facts, args, [body])

    def linear_solve(
        self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, const_lengths: Any, jaxprs: Any
    ) -> Results:
        """Mark a linear solve whose derivative is another linear solve."""
        names = ("matvec", "vecmat", "solve", "transpose_solve")
        symbols: dict[str, str | None] = {}
        for name in names:
            jaxpr = getattr(jaxprs, name)
            symbols[name] = None if jaxpr is None else emit_function(ctx.module_context, f"hvpd.{name}", jaxpr)
        if jaxprs.vecmat is jaxprs.matvec:
            symbols["vecmat"] = symbols["matvec"]
        first = const_lengths.matvec + const_lengths.vecmat
        last = sum(const_lengths)

        def solve(*args: Any) -> Any:
            taken = [*args[first : first + const_lengths.solve], *args[last:]]
            return CALL.bind(*taken, symbol=symbols["solve"], results=tuple(jaxprs.solve.out_avals))

        symbol = emit_function(self.context(ctx, None), "hvpd.solution", traced(solve, ctx.avals_in))
        facts = {
            **symbols,
            "consts": [getattr(const_lengths, name) for name in names],
            "auxiliary": len(jaxprs.solve.out_avals) - len(jaxprs.matvec.out_avals),
        }
        return emit_composite(
            ctx, "linear_solve", symbol, facts, args, [symbol for symbol in symbols.values() if symbol is not None]
        )

    def custom_jvp(
        self,
        order: int,
        ctx: lowering.LoweringRuleContext,
        *args: Any,
        call_jaxpr: ClosedJaxpr,
        jvp_jaxpr_fun: Any,
        num_consts: int,
        symbolic_zeros: bool,
    ) -> Results:
        """Mark a function with a forward rule."""
        symbol = emit_function(ctx.module_context, "hvpd.primal", call_jaxpr)
        primals = ctx.avals_in[num_consts:]
        floats = [is_floating(aval) for aval in primals]
        found: dict[str, Any] = {}
        if order < ORDERS and any(floats):
            inner = self.context(ctx, order + 1)
            for pattern in _patterns(sum(floats), symbolic_zeros):
                perturbed = iter(pattern)
                # An integer's tangent is float0: no zero for jax, and no argument of
                # the rule's function.
                zeros = [not next(perturbed) if floating else symbolic_zeros for floating in floats]
                with _may_end(order, ctx.module_context.module), rule(order):
                    jaxpr, consts, out_zeros = jvp_jaxpr_fun.call_wrapped(*zeros)
                    reduced = without_float0(jaxpr, consts, "custom_jvp")
                    lowered = {
                        "function": emit_function(inner, "hvpd.jvp", reduced),
                        "zeros": [bool(z) for z in out_zeros],
                    }
                    found["".join("1" if each else "0" for each in pattern)] = lowered
        facts = {"consts": num_consts, "symbolic_zeros": bool(symbolic_zeros), "rules": found}
        return emit_composite(ctx, "custom_jvp", symbol, facts, args, [each["function"] for each in found.values()])

    def custom_vjp(
        self,
        order: int,
        ctx: lowering.LoweringRuleContext,
        *args: Any,
        call_jaxpr: ClosedJaxpr,
        fwd_jaxpr_thunk: Any,
        num_consts: int,
        bwd: Any,
        out_trees: Callable[[], Any],
        symbolic_zeros: bool,
    ) -> Results:
        """Mark a function with a backward rule.

        Raises:
            UnmarkableError: The rule may depend on which arguments are perturbed, which
                is not known here.
        """
        if symbolic_zeros:
            raise UnmarkableError(
                "a custom_vjp with symbolic_zeros=True may have another rule for each choice of perturbed arguments, which hvpd "
                "cannot send to the server: define it without symbolic_zeros"
            )
        symbol = emit_function(ctx.module_context, "hvpd.primal", call_jaxpr)
        facts: dict[str, Any] = {"consts": num_consts, "forward": None, "backward": None}
        if order >= ORDERS:
            return emit_composite(ctx, "custom_vjp", symbol, facts, args)
        with _may_end(order, ctx.module_context.module), rule(order):
            inner = self.context(ctx, order + 1)
            primals = ctx.avals_in[num_consts:]
            forward, consts = fwd_jaxpr_thunk.call_wrapped(*[True] * len(primals))
            _, residual_tree, forwarded = out_trees()
            computed = len(forward.outvars) - len(ctx.avals_out)
            pruned = iter([variable.aval for variable in forward.outvars[:computed]])
            residuals = [next(pruned) if index is None else ctx.avals_in[index] for index in forwarded]
            assert len(residuals) == residual_tree.num_leaves
            cotangents = [aval.to_ct_aval() for aval in ctx.avals_out]
            zeros: list[bool] = []

            def backward(*args: Any) -> list[Any]:
                found = bwd.call_wrapped(*args)
                # jax 0.11 returns a pair with the logs of the rule, which a derivative
                # drops.
                found = found[0] if isinstance(found, tuple) else found
                zeros[:] = [isinstance(each, jax.interpreters.ad.Zero) for each in found]
                return [each for each, zero in zip(found, zeros, strict=True) if not zero]

            jaxpr = traced(backward, [*residuals, *cotangents])
            facts |= {
                "forward": emit_function(inner, "hvpd.forward", ClosedJaxpr(forward, consts)),
                "residuals": [None if index is None else index - num_consts for index in forwarded],
                "backward": emit_function(
                    inner, "hvpd.backward", without_float0(jaxpr.jaxpr, jaxpr.consts, "custom_vjp")
                ),
                "zeros": list(zeros),
            }
        return emit_composite(
            ctx, "custom_vjp", symbol, facts, args, [facts[name] for name in ("forward", "backward") if facts[name]]
        )


def _by_halves(body: ClosedJaxpr, axes: Sequence[int], xs: Sequence[Any], starts: Sequence[Any]) -> list[Any]:
    """Reduce axes of arrays by an associative function, half onto half.

    Args:
        body: Function of one element of each array, and again one of each.
        axes: Axes to reduce.
        xs: Arrays of one shape.
        starts: Neutral element of the function.
    """
    shape = xs[0].shape
    rest = [axis for axis in range(len(shape)) if axis not in axes]
    rows = math.prod(shape[axis] for axis in axes)
    xs = [jax.lax.reshape(x, (rows, *(shape[axis] for axis in rest)), (*axes, *rest)) for x in xs]
    combine: Callable[..., Any] = jaxpr_as_fun(body)
    for _ in xs[0].shape:
        combine = jax.vmap(combine)
    while rows > 1:
        half = (rows + 1) // 2
        padding = [(0, 2 * half - rows, 0), *[(0, 0, 0)] * len(rest)]
        second = [jax.lax.pad(x[half:], start, padding) for x, start in zip(xs, starts, strict=True)]
        xs = combine(*(x[:half] for x in xs), *second)
        rows = half
    return [x[0] if rows else jax.lax.broadcast(start, x.shape[1:]) for x, start in zip(xs, starts, strict=True)]


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many constants and how many carried values a scan has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # jax 0.11 states the groups of the operands instead of their numbers.
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


@contextlib.contextmanager
def _may_end(order: int, module: ir.Module) -> Iterator[None]:
    """Let a rule inside another rule raise.

    Then the mark has no rule, and the server has one derivative fewer. A product by
    differences of gradients needs the first derivative only. A rule that forbids every
    derivative may raise anywhere. The functions that it left unfinished are erased.
    """
    before = len(module.body.operations)
    try:
        yield
    except (UnmarkableError, HiddenError):
        raise
    except third_party.NoRuleError:
        pass
    except Exception as error:
        if not order and not third_party.forbids(error):
            raise
    else:
        return
    for function in list(module.body.operations)[before:]:
        (block,) = function.regions[0].blocks
        if not len(block.operations) or block.operations[len(block.operations) - 1].name != "func.return":
            function.operation.erase()


def _bound(rule: Callable[..., Results], order: int) -> _Rule:
    return lambda ctx, *args, **params: rule(order, ctx, *args, **params)


def _refused(ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> Results:
    raise UnmarkableError(
        f"the function uses jax's primitive {ctx.primitive}, whose derivative rule hvpd cannot send to the server: "
        "write this part of the function with other jax operations"
    )


def _patterns(count: int, symbolic_zeros: bool) -> list[tuple[bool, ...]]:
    """Return the choices of perturbed arguments for which a rule is kept.

    The choice of all arguments comes first.
    """
    full = (True,) * count
    if not symbolic_zeros or not 1 < count <= _PATTERNS:
        return [full]
    return [pattern for pattern in itertools.product([True, False], repeat=count) if any(pattern)]
