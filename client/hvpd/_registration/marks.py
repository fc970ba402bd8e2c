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

Every primitive that jax can differentiate is in one of the tables below. A primitive in
none of them is refused, because its derivative could be silently wrong on the server.

XLA's refinement of symbolic shapes does not enter composites. Another reader of a
program with symbolic shapes must first turn composites into calls of their
decompositions.

Not kept: the policy of `jax.checkpoint` (the server saves nothing of the body).
Refused: a `custom_vjp` with `symbolic_zeros=True`, whose rule can depend on which
arguments are perturbed.
"""

import contextlib
import dataclasses
import enum
import inspect
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import jax
import jax.export
import jax.extend.core
import jax.interpreters.ad
import jax.interpreters.mlir as lowering
import jax.interpreters.partial_eval
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from hvpd._registration import third_party
from hvpd._registration.closures import ORDERS, HiddenError, check_rule, rule
from hvpd._registration.hijax import is_high
from hvpd._registration.jaxprs import listed, traced

VERSION: Final = 1
"""Version of all marks."""

_PATTERNS: Final = 3
"""Most arguments of a function that gets a rule for each choice of symbolic zeros."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LOOKS_ALIKE: Final = _names(
    """
    abs add add_any and atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp complex concatenate cond conj
    conv_general_dilated convert_element_type copy cos device_put div dot_general dynamic_slice dynamic_update_slice
    dynamic_slice eq eq_to exp expm1 fft floor ge gt imag is_finite jit layout_constraint le le_to log log1p
    lt lt_to max min mul mulhi name ne neg not optimization_barrier or pad real reduce reduce_max reduce_min
    reduce_precision reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum rem reshape rev round
    rsqrt scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub select_and_scatter_add select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin slice split sqrt squeeze stack
    sub tan tanh tile transpose unstack while xor
    eval_jaxpr hvpd_closed_over program_order with_memory_space_constraint
    custom_vmap_call random_bits random_fold_in random_seed random_split random_unwrap random_wrap remat_opt
    """
)
"""Differentiable primitives that need no mark.

The operation alone tells the importer the primitive, and so its rule."""

MARKED: Final = _names(
    """
    acos acosh asin asinh atan atanh cosh sinh exp2 log2 square one_minus_square integer_pow nextafter
    erf erfc erf_inv lgamma digamma polygamma zeta igamma igammac igamma_grad_a bessel_i0e bessel_i1e
    regularized_incomplete_beta random_gamma threefry2x32
    logistic argmax argmin sort top_k approx_top_k gather
    cumsum cumprod cummax cummin cumlogsumexp select_and_gather_add
    symmetric_product cholesky eigh eig svd qr geqrf lu lu_pivots_to_permutation householder_product ormqr triangular_solve
    tridiagonal tridiagonal_solve schur hessenberg
    """
)
"""Primitives that get a generic mark with their parameters."""

WRITTEN_OUT: Final = _names(
    """
    bcoo_dot_general bcoo_dot_general_sampled bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_spdot_general
    bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_dot_general bcsr_extract bcsr_fromdense bcsr_todense
    coo_fromdense coo_matmat coo_matvec coo_todense csr_fromdense csr_matmat csr_matvec csr_todense todense
    maybe_set nondifferentiable_backward select_if_vmap
    """
)
"""Primitives of jax.experimental.sparse and equinox, which become the operations behind
them.

Each is linear in each of its arguments, so these operations have the same
derivatives."""

ALLOWED_CALLS: Final = tuple(
    jax.export.DisabledSafetyCheck.custom_call(f"lapack_{name}_ffi")
    for name in ("sormqr", "dormqr", "cunmqr", "zunmqr")
)
"""Calls of LAPACK that jax does not keep stable.

They are inside of marks only, and the server binds the marked primitive instead."""

_COMPLEX: Final = _names("cos exp log log1p max min sin sqrt")
"""Primitives that are marked for complex numbers.

jax.export writes these out in real arithmetic."""

_STRUCTURAL: Final = frozenset(
    ["custom_jvp_call", "custom_vjp_call", "custom_linear_solve", "remat2", "scan", "stop_gradient"]
)

_Results = Sequence[Any]
_Rule = Callable[..., _Results]


class UnmarkableError(NotImplementedError):
    """A construct whose derivative rule the server could not put back."""


def rules() -> tuple[tuple[Primitive, _Rule], ...]:
    """Return lowering rules for one export.

    Returns:
        Pairs for `_override_lowering_rules` of `jax.export.export`. Make them anew for
        each export.
    """
    return _Marks().rules(0, None)


def _registered() -> Mapping[str, Primitive]:
    """Return jax's primitives that can be lowered or differentiated, by name."""
    tables: list[Mapping[Primitive, Any]] = [
        lowering._lowerings,  # noqa: SLF001 - jax has no public list of its primitives
        *lowering._platform_specific_lowerings.values(),  # noqa: SLF001 - jax has no public list of its primitives
        jax.interpreters.ad.primitive_jvps,
        jax.interpreters.ad.primitive_transposes,
    ]
    return {primitive.name: primitive for primitive in itertools.chain.from_iterable(tables)}


_CALL: Final = Primitive("hvpd_call")
"""Calls a function of the module by its symbol.

So a decomposition shares the body with the mark."""
_CALL.multiple_results = True
_CALL.def_abstract_eval(lambda *_, symbol, results: list(results))


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
        found: list[tuple[Primitive, _Rule]] = [(_CALL, _call)]
        if order is None:
            return found
        structural: Mapping[str, Callable[..., _Results]] = {
            "custom_jvp_call": self.custom_jvp,
            "custom_vjp_call": self.custom_vjp,
            "custom_linear_solve": self.linear_solve,
            "remat2": self.checkpoint,
            "scan": self.scan,
            "stop_gradient": self.stop_gradient,
        }
        registered = _registered()
        for name, primitive in registered.items():
            if name == plain:
                continue
            if name in structural:
                found.append((primitive, _bound(structural[name], order)))
            elif name in MARKED or name in _COMPLEX or name == "pow":
                found.append((primitive, _bound(self.generic, order)))
            elif name in WRITTEN_OUT:
                found.append((primitive, _bound(self.written_out, order)))
            elif name in third_party.NAMES:
                found.append((primitive, _bound(self.replaced, order)))
            elif name not in _LOOKS_ALIKE and _differentiable(primitive):
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
        return _function(self.context(ctx, order, primitive.name), f"hvpd.plain.{primitive.name}", jaxpr)

    def unmarked(
        self, ctx: lowering.LoweringRuleContext, order: int, args: Sequence[Any], params: Mapping[str, Any]
    ) -> _Results:
        """Lower one primitive without a mark, but with marks inside."""
        primitive = ctx.primitive
        assert primitive is not None
        inlined = lowering.lower_fun(lambda *args: listed(primitive.bind(*args, **params)))
        result: _Results = inlined(ctx.replace(module_context=self.context(ctx, order, primitive.name)), *args)
        return result

    def generic(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> _Results:
        """Mark a primitive with its parameters."""
        primitive = ctx.primitive
        assert primitive is not None
        if not _needs_mark(primitive.name, ctx.avals_in):
            return self.unmarked(ctx, order, args, params)
        try:
            facts = {"parameters": _parameters(primitive, params, ctx.avals_in)}
        except UnmarkableError:
            if _differentiable(primitive) and primitive.name != "gather":
                raise
            # A gather's own lowering has the same derivatives: only its sizes may not
            # be plain numbers.
            return self.unmarked(ctx, order, args, params)
        symbol = self.plain(ctx, None, primitive, params)
        return _composite(ctx, f"jax.{primitive.name}", symbol, facts, args)

    def written_out(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> _Results:
        """Lower a primitive as jax does for platforms without a library for it.

        The operations have marks inside.
        """
        primitive = ctx.primitive
        assert primitive is not None
        lowered = lowering._lowerings[primitive].rule  # noqa: SLF001 - jax has no public way to its lowerings
        result: _Results = lowered(ctx.replace(module_context=self.context(ctx, order)), *args, **params)
        return result

    def replaced(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> _Results:
        """Lower a function of jax that stands for another package's primitive."""
        primitive = ctx.primitive
        assert primitive is not None
        inner = params.get("prim")
        if inner is not None and inner.name in WRITTEN_OUT:
            return self.written_out(order, ctx, *args, **params)
        # jax's own way to lower a function would drop the rules in the function.
        jaxpr = traced(third_party.function(primitive, params, len(args)), ctx.avals_in)
        # The function calls the primitive for its values.
        symbol = _function(self.context(ctx, order, primitive.name), f"hvpd.{primitive.name}", jaxpr)
        return _emit_call(ctx, symbol, args, ctx.avals_out)

    def stop_gradient(self, order: int, ctx: lowering.LoweringRuleContext, x: Any) -> _Results:
        """Mark the identity without derivative."""
        symbol = _function(ctx.module_context, "hvpd.identity", traced(lambda x: [x], ctx.avals_in))
        return _composite(ctx, "stop_gradient", symbol, {}, [x])

    def checkpoint(
        self,
        order: int,
        ctx: lowering.LoweringRuleContext,
        *args: Any,
        jaxpr: Any,
        prevent_cse: bool | tuple[bool, ...],
        differentiated: bool,
        policy: Any,
    ) -> _Results:
        """Mark a function whose values are computed again for its derivative."""
        symbol = _function(ctx.module_context, "hvpd.checkpoint", ClosedJaxpr(jaxpr, ()))
        facts = {"prevent_cse": prevent_cse if isinstance(prevent_cse, bool) else list(prevent_cse)}
        return _composite(ctx, "checkpoint", symbol, facts, args)

    def scan(self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> _Results:
        """Mark a loop with a fixed number of steps."""
        jaxpr, length = params["jaxpr"], params["length"]
        consts, carry = _scan_counts(params)
        scanned = len(args) - consts - carry
        symbolic = not isinstance(length, (int, np.integer))
        if jaxpr.effects or (symbolic and not scanned):
            return self.unmarked(ctx, order, args, params)
        body = _function(ctx.module_context, "hvpd.body", jaxpr)
        called = traced(_calls(body, jaxpr.out_avals), jaxpr.in_avals)
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
        return _composite(ctx, "scan", symbol, facts, args, [body])

    def linear_solve(
        self, order: int, ctx: lowering.LoweringRuleContext, *args: Any, const_lengths: Any, jaxprs: Any
    ) -> _Results:
        """Mark a linear solve whose derivative is another linear solve."""
        names = ("matvec", "vecmat", "solve", "transpose_solve")
        symbols: dict[str, str | None] = {}
        for name in names:
            jaxpr = getattr(jaxprs, name)
            symbols[name] = None if jaxpr is None else _function(ctx.module_context, f"hvpd.{name}", jaxpr)
        if jaxprs.vecmat is jaxprs.matvec:
            symbols["vecmat"] = symbols["matvec"]
        first = const_lengths.matvec + const_lengths.vecmat
        last = sum(const_lengths)

        def solve(*args: Any) -> Any:
            taken = [*args[first : first + const_lengths.solve], *args[last:]]
            return _CALL.bind(*taken, symbol=symbols["solve"], results=tuple(jaxprs.solve.out_avals))

        symbol = _function(self.context(ctx, None), "hvpd.solution", traced(solve, ctx.avals_in))
        facts = {
            **symbols,
            "consts": [getattr(const_lengths, name) for name in names],
            "auxiliary": len(jaxprs.solve.out_avals) - len(jaxprs.matvec.out_avals),
        }
        return _composite(
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
    ) -> _Results:
        """Mark a function with a forward rule."""
        symbol = _function(ctx.module_context, "hvpd.primal", call_jaxpr)
        primals = ctx.avals_in[num_consts:]
        floats = [_floating(aval) for aval in primals]
        found: dict[str, Any] = {}
        if order < ORDERS and any(floats):
            inner = self.context(ctx, order + 1)
            for pattern in _patterns(sum(floats), symbolic_zeros):
                perturbed = iter(pattern)
                # An integer's tangent is float0: no zero for jax, and no argument of
                # the rule's function.
                zeros = [not next(perturbed) if floating else symbolic_zeros for floating in floats]
                with _may_end(order), rule(order):
                    jaxpr, consts, out_zeros = jvp_jaxpr_fun.call_wrapped(*zeros)
                    reduced = _without_float0(jaxpr, consts, "custom_jvp")
                    lowered = {"function": _function(inner, "hvpd.jvp", reduced), "zeros": [bool(z) for z in out_zeros]}
                    found["".join("1" if each else "0" for each in pattern)] = lowered
        facts = {"consts": num_consts, "symbolic_zeros": bool(symbolic_zeros), "rules": found}
        return _composite(ctx, "custom_jvp", symbol, facts, args, [each["function"] for each in found.values()])

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
    ) -> _Results:
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
        symbol = _function(ctx.module_context, "hvpd.primal", call_jaxpr)
        facts: dict[str, Any] = {"consts": num_consts, "forward": None, "backward": None}
        if order >= ORDERS:
            return _composite(ctx, "custom_vjp", symbol, facts, args)
        with _may_end(order), rule(order):
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
                "forward": _function(inner, "hvpd.forward", ClosedJaxpr(forward, consts)),
                "residuals": [None if index is None else index - num_consts for index in forwarded],
                "backward": _function(inner, "hvpd.backward", _without_float0(jaxpr.jaxpr, jaxpr.consts, "custom_vjp")),
                "zeros": list(zeros),
            }
        return _composite(
            ctx, "custom_vjp", symbol, facts, args, [facts[name] for name in ("forward", "backward") if facts[name]]
        )


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many constants and how many carried values a scan has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # jax 0.11 states the groups of the operands instead of their numbers.
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


@contextlib.contextmanager
def _may_end(order: int) -> Iterator[None]:
    """Let a rule inside another rule raise.

    Then the mark has no rule, and the server has one derivative fewer. A product by
    differences of gradients needs the first derivative only. A rule that forbids every
    derivative may raise anywhere.
    """
    try:
        yield
    except (UnmarkableError, HiddenError):
        raise
    except third_party.NoRuleError:
        pass
    except Exception as error:
        if not order and not third_party.forbids(error):
            raise


def _bound(rule: Callable[..., _Results], order: int) -> _Rule:
    return lambda ctx, *args, **params: rule(order, ctx, *args, **params)


def _refused(ctx: lowering.LoweringRuleContext, *args: Any, **params: Any) -> _Results:
    raise UnmarkableError(
        f"the function uses jax's primitive {ctx.primitive}, whose derivative rule hvpd cannot send to the server: "
        "write this part of the function with other jax operations"
    )


def _needs_mark(name: str, avals: Sequence[Any]) -> bool:
    if name == "pow":
        # The lowering converts an integer exponent to the base's dtype, and with it the
        # derivative rule.
        return not _floating(avals[1])
    return name not in _COMPLEX or np.issubdtype(avals[0].dtype, np.complexfloating)


def _differentiable(primitive: Primitive) -> bool:
    ad = jax.interpreters.ad
    return primitive in ad.primitive_jvps or primitive in ad.primitive_transposes


def _floating(aval: Any) -> bool:
    return bool(aval.to_tangent_aval().dtype != jax.dtypes.float0)


def _patterns(count: int, symbolic_zeros: bool) -> list[tuple[bool, ...]]:
    """Return the choices of perturbed arguments for which a rule is kept.

    The choice of all arguments comes first.
    """
    full = (True,) * count
    if not symbolic_zeros or not 1 < count <= _PATTERNS:
        return [full]
    return [pattern for pattern in itertools.product([True, False], repeat=count) if any(pattern)]


def _calls(symbol: str, results: Sequence[Any]) -> Callable[..., Any]:
    return lambda *args: _CALL.bind(*args, symbol=symbol, results=tuple(results))


def _without_float0(jaxpr: Any, consts: Sequence[Any], what: str) -> ClosedJaxpr:
    """Drop the float0 arguments and results of a rule.

    An integer's tangent has no value to send.

    Raises:
        UnmarkableError: The rule computes with such a tangent.
    """
    # jax 0.11 tells constants from arguments only while their values are attached.
    jaxpr = ClosedJaxpr(jaxpr, consts).jaxpr
    kept = [variable.aval.dtype != jax.dtypes.float0 for variable in jaxpr.outvars]
    values = [variable.aval.dtype != jax.dtypes.float0 for variable in jaxpr.invars]
    reduced, used_consts, used = jax.interpreters.partial_eval.dce_jaxpr_consts(
        jaxpr, kept, [False] * len(jaxpr.constvars) + values
    )
    if any(use and not value for use, value in zip(used, values, strict=True)):
        raise UnmarkableError(
            f"the rule of a {what} uses the tangent of an integer, which has no value: ignore this tangent in the rule"
        )
    return ClosedJaxpr(reduced, [const for const, use in zip(consts, used_consts, strict=True) if use])


_ASKS_FOR_RESULTS: Final = "out_avals" in inspect.signature(lowering.lower_jaxpr_to_fun).parameters
"""Whether jax's function that lowers a jaxpr takes the types of its results."""


def _function(module: lowering.ModuleContext, name: str, jaxpr: ClosedJaxpr) -> str:
    """Lower a jaxpr into a private function of the module, and return its symbol.

    The function's leading arguments are the dimension variables, as in every function
    that jax lowers.
    """
    check_rule(jaxpr)
    if is_high(jaxpr):
        raise UnmarkableError(
            "the function has a derivative rule with a jitted function that jax traced before, and that uses custom_root or "
            "jax.experimental.hijax: register the function before it is called, or take jax.jit away from this part"
        )
    # Only jax 0.11 asks for the results' types, which the jaxpr has.
    results = {"out_avals": jaxpr.out_avals} if _ASKS_FOR_RESULTS else {}
    lowered = lowering.lower_jaxpr_to_fun(module, name, jaxpr, (), num_const_args=0, in_avals=jaxpr.in_avals, **results)
    return str(ir.StringAttr(lowered.attributes["sym_name"]).value)


def _flat(values: Sequence[Any]) -> list[Any]:
    """Return MLIR values or types in one list: an array can have several."""
    return list(lowering.ir_tree_registry.flatten(list(values))[0])


def _result_types(ctx: lowering.LoweringRuleContext, avals: Sequence[Any]) -> list[ir.Type]:
    return _flat([lowering.aval_to_ir_type(ctx.module_context, aval) for aval in avals])


def _composite(
    ctx: lowering.LoweringRuleContext,
    name: str,
    decomposition: str,
    facts: Mapping[str, Any],
    args: Sequence[Any],
    symbols: Sequence[str] = (),
) -> _Results:
    """Emit the operation of a mark.

    Its operands are the dimension variables, then the arguments.
    """
    mark = json.dumps({"dimensions": len(ctx.dim_var_values), **facts}, allow_nan=False, sort_keys=True)
    # The references keep the functions of the rule alive in every pass, and let a
    # reader count them.
    functions = [ir.FlatSymbolRefAttr.get(symbol) for symbol in sorted(set(symbols))]
    attributes = {"mark": ir.StringAttr.get(mark), "functions": ir.ArrayAttr.get(functions)}
    operation = ir.Operation.create(
        "stablehlo.composite",
        _result_types(ctx, ctx.avals_out),
        [*ctx.dim_var_values, *_flat(args)],
        {
            "name": ir.StringAttr.get(f"hvpd.{name}"),
            "decomposition": ir.FlatSymbolRefAttr.get(decomposition),
            "composite_attributes": ir.DictAttr.get(attributes),
            "version": lowering.i32_attr(VERSION),
        },
    )
    return list(operation.results)


def _emit_call(ctx: lowering.LoweringRuleContext, symbol: str, args: Sequence[Any], results: Sequence[Any]) -> _Results:
    operands = [*ctx.dim_var_values, *_flat(args)]
    call = func.CallOp(_result_types(ctx, results), ir.FlatSymbolRefAttr.get(symbol), operands)
    return list(call.results)


def _call(ctx: lowering.LoweringRuleContext, *args: Any, symbol: str, results: Sequence[Any]) -> _Results:
    """Lower `_CALL`."""
    return _emit_call(ctx, symbol, args, results)


def _parameters(primitive: Primitive, params: Mapping[str, Any], avals: Sequence[Any]) -> dict[str, Any]:
    """Return a primitive's parameters as JSON.

    Raises:
        UnmarkableError: A parameter is not plain data, such as a size that depends on
            symbolic shapes.
    """
    found = {name: _plain(value, f"{primitive}'s {name}") for name, value in params.items() if name != "slice_sizes"}
    if primitive.name == "gather":
        whole = avals[0].shape
        found["slice_sizes"] = [
            None if not isinstance(size, (int, np.integer)) and size == extent else _plain(size, "gather's slice_sizes")
            for size, extent in zip(params["slice_sizes"], whole, strict=True)
        ]
    if primitive.name == "top_k":
        # jax 0.10 has no such parameter: its top_k is stable, and a stable order is
        # allowed where any order is.
        found.pop("is_stable", None)
    if primitive.name == "random_gamma":
        found["impl"] = avals[0].dtype._impl.name  # noqa: SLF001 - jax tells an abstract key's generator nowhere else
    return found


def _plain(value: Any, what: str) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, (np.generic, float)) and math.isfinite(value):
        return np.asarray(value).item()
    if isinstance(value, (enum.Enum, np.dtype, Primitive)):
        return value.name
    if hasattr(value, "_asdict"):
        return {name: _plain(each, what) for name, each in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each, what) for each in value]
    raise UnmarkableError(f"{what} is {value!r}, which is not plain data: give it as a number")
