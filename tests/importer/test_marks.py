"""Marks are complete, survive serialization, are plain for other readers, and are
refused if a hostile program changes them.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.export
import jax.interpreters.ad
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

from hvpd._registration import hijax, lift, marked_primitives, marks
from hvpd_server.importer import evaluate, primitives, reader, structural
from hvpd_server.importer.graph import Block, Module, Operation
from hvpd_server.importer.table import Refused, Report
from tests.importer.marked import artifact, imported

KEY = np.array([7, 11], np.uint32)
VECTOR = np.array([0.3, -0.7, 1.1])
SPECS = [jax.ShapeDtypeStruct((3,), np.float64)]


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvps(lambda t, out, x: 3 * t * cubed(x) / x)


@jax.custom_vjp
def backwards(x):
    return jnp.sin(x)


backwards.defvjp(lambda x: (backwards(x), x), lambda x, ct: (ct * jnp.cos(x),))


def objective(x):
    """Return a function with each kind of mark."""
    y = cubed(x) + lax.stop_gradient(x) + jax.scipy.special.erfinv(x / 9)
    y = jax.checkpoint(jnp.sin)(y) + backwards(x)
    total, _ = lax.scan(lambda c, a: (jnp.logaddexp(c, a), None), y[0], y)
    return total + jnp.linalg.solve(jnp.eye(3) + jnp.outer(y, y), y)[0] + jnp.sort(y)[0]


def read(fun=objective, platforms=("cpu",), specs=SPECS):
    return reader.read(artifact(fun, specs, platforms))


def composites_of(module):
    return [
        operation
        for block in module.functions.values()
        for operation in block.operations
        if operation.name == "stablehlo.composite"
    ]


def bent(module, name, change):
    """Return the module with one kind of composite changed: change(mark, attributes)
    edits both in place.
    """

    def block(each):
        return dataclasses.replace(each, operations=[operation(o) for o in each.operations])

    def operation(each):
        if each.attributes.get("name") != name:
            return each
        attributes = dict(each.attributes)
        given = dict(attributes["composite_attributes"])
        mark = json.loads(given["mark"])
        attributes["composite_attributes"] = given
        found = change(mark, attributes)
        given["mark"] = found if isinstance(found, str) else json.dumps(mark)
        return dataclasses.replace(each, attributes=attributes)

    return Module({symbol: block(each) for symbol, each in module.functions.items()}, module.entry)


# The tables.


def differentiable():
    """Return jax's differentiable primitives, without those of libraries that other
    tests import.
    """
    code = (
        "from hvpd._registration import marked_primitives as marked, marks\n"
        "print(*(name for name, each in marked.registered().items() if marked.differentiable(each)))"
    )
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    return set(run.stdout.split())


def test_every_differentiable_primitive_is_decided():
    """This test fails for a primitive of a new jax. The exporter refuses it when it is
    used.
    """
    marked = marked_primitives
    decided = marked.LOOKS_ALIKE | marked.MARKED | marked.WRITTEN_OUT | marked.STRUCTURAL | marked.COMPLEX | {"pow"}
    undecided = differentiable() - decided
    assert undecided <= REFUSED, sorted(undecided - REFUSED)


REFUSED = {
    # Between devices.
    *("all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "pbroadcast", "ppermute", "preduced"),
    *("psum_invariant", "pvary", "ragged_all_to_all", "reduce_scatter", "reduced_vary_cast_p", "reshard"),
    *("shard_map", "unreduced_psum", "unreduced_reduce_scatter", "vary_unreduced_cast_p", "inspect_sharding"),
    # Calls out of the program.
    *("check", "debug_callback", "debug_print", "io_callback", "pure_callback", "ffi_call"),
    # References and internal parts of jax.
    *("accum_grad_in_ref", "addupdate", "box_get", "box_set", "empty_ref", "free_ref", "freeze", "get", "log_extend"),
    *("log_read", "new_box", "new_log", "new_ref", "run_state", "swap", "call_hi_primitive", "custom_lin", "dce_sink"),
    *("from_edtype", "to_edtype", "stage", "tie"),
    # With rules that no mark carries.
    *("call_exported", "composite", "linear_call", "reduce_window", "spsolve"),
    *("global_array_to_host_local_array", "host_local_array_to_global_array", "xla_metadata_value"),
}


def test_the_server_binds_every_primitive_that_the_client_marks():
    assert marked_primitives.MARKED | marked_primitives.COMPLEX | {"pow"} == primitives.PRIMITIVES.keys()
    for name, entry in primitives.PRIMITIVES.items():
        if entry.rebuild is None:
            assert primitives.bound(name)


def test_a_primitive_without_a_mark_is_refused_on_the_client():
    def linear(x):
        return jax.custom_derivatives.linear_call(lambda r, x: r * x, lambda r, t: r * t, 2.0, x)

    with pytest.raises(marked_primitives.UnmarkableError, match="linear_call"):
        read(linear)


ONE = """abs cbrt ceil cos exp exp2 expm1 floor log log1p logistic neg round rsqrt sign sin sqrt tan tanh asin erf lgamma
square real imag is_finite"""
TWO = "add atan2 complex div max min mul pow rem sub nextafter eq lt"
ELEMENTWISE = dict.fromkeys(ONE.split(), 1) | dict.fromkeys(TWO.split(), 2)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, jnp.bfloat16, np.complex128], ids=lambda dtype: dtype.__name__
)
def test_elementwise_functions_come_back_as_the_primitives_that_they_were(dtype, platform):
    spec = jax.ShapeDtypeStruct((2,), dtype)

    def takes(name):
        try:
            jax.eval_shape(getattr(lax, name), *[spec] * ELEMENTWISE[name])
        except TypeError:
            return False
        return True

    names = [name for name in ELEMENTWISE if takes(name)]
    assert len(names) > 10

    def all_of(x):
        return [getattr(lax, name)(*[x] * ELEMENTWISE[name]) for name in names]

    function = evaluate.function(read(all_of, (platform,), [spec]))
    found, expected = (jax.make_jaxpr(each)(spec).eqns for each in (function, all_of))
    assert [each.primitive for each in found] == [each.primitive for each in expected]


# The way there.


def test_other_readers_get_the_same_values():
    """Values do not need the marks: jax itself evaluates the decompositions, for two
    platforms.
    """
    exported = jax.export.export(jax.jit(objective), platforms=("cpu", "cuda"), _override_lowering_rules=marks.rules())(
        *SPECS
    )
    np.testing.assert_allclose(exported.call(VECTOR), jax.jit(objective)(VECTOR), rtol=1e-14)


def test_functions_of_rules_survive_serialization():
    module = read()
    listed = [
        symbol for each in composites_of(module) for symbol in each.attributes["composite_attributes"]["functions"]
    ]
    assert len(listed) > 10
    assert set(listed) <= module.functions.keys()


def test_marks_are_the_same_bytes_each_time():
    assert artifact(objective, SPECS, ("cpu",)) == artifact(objective, SPECS, ("cpu",))


def test_names_of_all_structural_marks_are_there():
    found = {each.attributes["name"] for each in composites_of(read())}
    assert structural.STRUCTURAL.keys() <= found


# Derivatives that the rules allow.


def test_a_third_derivative_through_a_rule_says_that_it_is_not_there():
    fun = imported(read(lambda x: jnp.sum(cubed(x))))
    np.testing.assert_allclose(jax.hessian(fun)(VECTOR), jax.hessian(lambda x: jnp.sum(cubed(x)))(VECTOR), rtol=1e-14)
    with pytest.raises(Refused, match="rules are kept for the two derivatives of a Hessian"):
        jax.jacfwd(jax.hessian(fun))(VECTOR)
    with pytest.raises(Refused, match="rules are kept for the two derivatives of a Hessian"):
        jax.jit(jax.jacfwd(jax.hessian(jax.jit(fun))))(VECTOR)


def test_forward_mode_over_a_backward_rule_raises_the_error_of_jax():
    fun = imported(read(lambda x: jnp.sum(backwards(x))))
    for differentiated in (jax.jacfwd(fun), jax.jacfwd(jax.grad(fun)), jax.jit(jax.jacfwd(fun))):
        with pytest.raises(TypeError, match="custom_vjp"):
            differentiated(VECTOR)
    np.testing.assert_array_equal(jax.grad(fun)(VECTOR), jax.grad(lambda x: jnp.sum(backwards(x)))(VECTOR))


def test_checkpoint_saves_nothing_of_its_body():
    fun = imported(read(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x))))
    assert "remat" in str(jax.make_jaxpr(jax.grad(fun))(VECTOR))


def test_a_scan_comes_back_as_a_scan_with_its_rows():
    def fun(x):
        return lax.scan(lambda c, a: (c * a, jnp.sin(c)), 1.0, x, reverse=True, unroll=2)[1]

    (equation,) = (e for e in jax.make_jaxpr(imported(read(fun)))(VECTOR).eqns if e.primitive.name == "scan")
    assert (equation.params["reverse"], equation.params["unroll"], equation.params["length"]) == (True, 2, 3)


def test_a_scan_over_symbolic_rows_takes_its_length_from_them():
    def fun(x, rows):
        return lax.scan(lambda c, row: (c + jnp.sum(jnp.sin(row * x)), None), 0.0, rows)[0]

    module = read(fun, ("cpu",), [*SPECS, jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, 3"), np.float64)])
    for count in (1, 5):
        rows = np.linspace(0, 1, 3 * count).reshape(count, 3)
        np.testing.assert_array_equal(jax.jit(imported(module))(VECTOR, rows), jax.jit(fun)(VECTOR, rows))


def test_a_loop_of_symbolic_length_without_rows_needs_no_mark():
    def fun(x, rows):
        return lax.fori_loop(0, rows.shape[0], lambda i, c: jnp.sin(c) + x[0], x[1])

    module = read(fun, ("cpu",), [*SPECS, jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, 3"), np.float64)])
    rows = np.ones((4, 3))
    np.testing.assert_allclose(imported(module)(VECTOR, rows), fun(VECTOR, rows), rtol=1e-15)


def test_sizes_stay_known_through_marks():
    def fun(x, rows):
        size = rows.shape[0] ** 2
        return jnp.sum(jnp.sin(jnp.arange(size) * x[0])) + jnp.sum(nn.softplus(jnp.reshape(rows, -1)[::-1]))

    module = read(fun, ("cpu", "cuda"), [*SPECS, jax.ShapeDtypeStruct(jax.export.symbolic_shape("m, 3"), np.float64)])
    rows = np.ones((4, 3))
    np.testing.assert_allclose(imported(module, 0)(VECTOR, rows), fun(VECTOR, rows), rtol=1e-14)


def test_integers_and_results_without_tangent():
    @jax.custom_jvp
    def counted(x, count):
        return x * count, count + 1

    @counted.defjvp
    def _(primals, tangents):
        return counted(*primals), (tangents[0] * 11.0, np.zeros(primals[1].shape, jax.dtypes.float0))

    def fun(x, count):
        product, more = counted(x, count)
        return jnp.sum(product * more)

    module = read(fun, ("cpu",), [*SPECS, jax.ShapeDtypeStruct((3,), np.int64)])
    count = np.arange(3)
    np.testing.assert_array_equal(jax.grad(imported(module))(VECTOR, count), jax.grad(fun)(VECTOR, count))


# Foreign composites.


def foreign(name, body="stablehlo.sine %arg0 : tensor<3xf64>", attributes=""):
    return f"""module {{
      func.func public @main(%arg0: tensor<3xf64>) -> tensor<3xf64> {{
        %0 = stablehlo.composite "{name}" %arg0 {{decomposition = @impl{attributes}}} : (tensor<3xf64>) -> tensor<3xf64>
        return %0 : tensor<3xf64>
      }}
      func.func private @impl(%arg0: tensor<3xf64>) -> tensor<3xf64> {{
        %0 = {body}
        return %0 : tensor<3xf64>
      }}
    }}"""


def test_a_foreign_composite_is_its_decomposition_and_is_reported():
    report = Report()
    fun = evaluate.function(reader.read(foreign("tensor.wave")), report=report)
    np.testing.assert_array_equal(fun(jnp.asarray(VECTOR))[0], jnp.sin(VECTOR))
    assert list(report.presumed) == ["the composite tensor.wave has the derivatives of its decomposition"]


def test_a_composite_of_chlo_is_jax_own_function():
    fun = evaluate.function(reader.read(foreign("chlo.erf_inv")))
    np.testing.assert_array_equal(fun(jnp.asarray(VECTOR))[0], lax.erf_inv(VECTOR))


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("hvpd.jax.erf", "", "of version .*: expected version 1"),
        ("hvpd.jax.erf", ", version = 7 : i32", "version 7: expected version 1"),
        ("hvpd.jax.erf", ", version = 1 : i32", "without the attributes mark and functions"),
        (
            "hvpd.unheard",
            ', version = 1 : i32, composite_attributes = {mark = "{\\22dimensions\\22: 0}", functions = []}',
            "hvpd.unheard which is not known",
        ),
        (
            "hvpd.jax.unheard",
            ', version = 1 : i32, composite_attributes = {mark = "{\\22dimensions\\22: 0}", functions = []}',
            "hvpd.jax.unheard which is not known",
        ),
    ],
)
def test_an_unknown_mark_is_refused_by_its_name(name, attributes, message):
    with pytest.raises(Refused, match=message):
        evaluate.function(reader.read(foreign(name, attributes=attributes)))(jnp.asarray(VECTOR))


# Hostile marks.


def _edit(**fields):
    return lambda mark, attributes: mark.update(fields)


def _parameter(**fields):
    return lambda mark, attributes: mark["parameters"].update(fields)


def _rule(**fields):
    return lambda mark, attributes: mark["rules"]["1"].update(fields) if "1" in mark["rules"] else None


def _functions(mark, attributes):
    attributes["composite_attributes"]["functions"] = []


BENT = [
    ("hvpd.scan", _edit(extra=1), "field extra, which is not known"),
    ("hvpd.scan", lambda mark, _: mark.pop("carry"), "without the field carry"),
    ("hvpd.scan", _edit(carry=True), "whose carry is True"),
    ("hvpd.scan", _edit(carry=7), "whose carry is 7"),
    ("hvpd.scan", _edit(consts=-1), "whose consts is -1"),
    ("hvpd.scan", _edit(length=1 << 40), "whose length is"),
    ("hvpd.scan", _edit(length=2), "whose rows are not 2"),
    ("hvpd.scan", _edit(reverse=0), "whose reverse is 0"),
    ("hvpd.scan", _edit(unroll=-1), "whose unroll is -1"),
    ("hvpd.scan", _edit(body="main"), "whose body is main"),
    ("hvpd.scan", _edit(body=["main"]), "whose body is"),
    ("hvpd.scan", _edit(dimensions=1), "depend on x|whose rows|expected"),
    ("hvpd.scan", _edit(dimensions=99), "whose dimensions is 99"),
    ("hvpd.scan", _functions, "whose body is"),
    ("hvpd.scan", lambda *_: "{", "is not JSON"),
    ("hvpd.scan", lambda *_: "[" * 9999, "is not JSON"),
    ("hvpd.scan", lambda *_: "[]", "is not a JSON object"),
    ("hvpd.scan", lambda *_: '{"a": NaN}', "is not JSON"),
    ("hvpd.scan", lambda *_: '{"a": 1, "a": 2}', "twice"),
    ("hvpd.scan", lambda *_: " " * (1 << 17), "without the attributes mark and functions"),
    ("hvpd.stop_gradient", _edit(extra=1), "field extra"),
    ("hvpd.checkpoint", _edit(prevent_cse=1), "whose prevent_cse is 1"),
    ("hvpd.checkpoint", _edit(prevent_cse=[True, True]), "whose prevent_cse is"),
    ("hvpd.linear_solve", _edit(consts=[1, 1]), "2 numbers of constants"),
    ("hvpd.linear_solve", _edit(consts=[9, 0, 0, 0]), "consts is 9|do not fit"),
    ("hvpd.linear_solve", _edit(auxiliary=1), "do not fit"),
    ("hvpd.linear_solve", _edit(solve=None), "whose solve is None"),
    ("hvpd.custom_jvp", _edit(rules={"11111": {}}), "expected 0 or 1"),
    ("hvpd.custom_jvp", _rule(zeros=[]), "whose zeros is"),
    ("hvpd.custom_jvp", _rule(zeros=[True]), "expected"),
    ("hvpd.custom_jvp", _rule(other=1), "wrong fields"),
    ("hvpd.custom_jvp", _rule(function="main"), "whose rule is main"),
    ("hvpd.custom_jvp", _edit(consts=1), "expected"),
    ("hvpd.custom_vjp", _edit(residuals=[5]), "whose residuals is 5"),
    ("hvpd.custom_vjp", _edit(residuals=[None] * 40), "whose forward"),
    ("hvpd.custom_vjp", _edit(zeros=[]), "whose zeros is"),
    ("hvpd.custom_vjp", _edit(forward=None), "whose forward is None"),
    ("hvpd.jax.sort", _parameter(dimension=1), "whose axis is 1"),
    ("hvpd.jax.sort", _parameter(dimension=-1), "whose axis is -1"),
    ("hvpd.jax.sort", _parameter(num_keys=0), "whose num_keys is 0"),
    ("hvpd.jax.sort", _parameter(is_stable="yes"), "expected true or false"),
    ("hvpd.jax.sort", _parameter(comparator=1), "with the parameters"),
    ("hvpd.jax.sort", _edit(parameters={}), "with the parameters"),
    ("hvpd.jax.sort", _edit(parameters=[]), "whose parameters is"),
    ("hvpd.jax.integer_pow", _parameter(y=2.5), "parameter is 2.5"),
    ("hvpd.jax.integer_pow", _parameter(y=1 << 60), "parameter is"),
    ("hvpd.jax.gather", _parameter(mode="ANYTHING"), "expected one of"),
    ("hvpd.jax.gather", _parameter(slice_sizes=[1 << 40, 1]), "slice size"),
    ("hvpd.jax.gather", _parameter(dimension_numbers={}), "dimension numbers"),
    ("hvpd.jax.triangular_solve", _parameter(lower=None), "expected true or false"),
]


@pytest.fixture(scope="module")
def whole():
    with jax.enable_x64(True):
        return read()


@pytest.mark.parametrize(("name", "change", "message"), BENT)
def test_a_bent_mark_is_refused(whole, name, change, message):
    module = bent(whole, name, change)
    assert any(each.attributes["name"] == name for each in composites_of(module)), "the program has no such mark"
    with pytest.raises(Refused, match=message) as caught:
        jax.make_jaxpr(imported(module))(VECTOR)
    assert name in str(caught.value)


def test_a_rule_of_the_wrong_arity_or_shape_is_refused(whole):
    for other, message in (("hvpd.body", "whose rule takes"), (whole.entry, "whose rule takes")):

        def change(mark, attributes, other=other):
            attributes["composite_attributes"]["functions"] = [other]
            for rule in mark["rules"].values():
                rule["function"] = other

        with pytest.raises(Refused, match=message):
            jax.make_jaxpr(imported(bent(whole, "hvpd.custom_jvp", change)))(VECTOR)


def test_a_rule_that_is_not_there_is_refused(whole):
    def change(mark, attributes):
        mark["body"] = "gone"
        attributes["composite_attributes"]["functions"] = ["gone"]

    with pytest.raises(Refused, match="gone, which is not there"):
        jax.make_jaxpr(imported(bent(whole, "hvpd.scan", change)))(VECTOR)


def test_a_mark_that_calls_itself_ends(whole):
    """The reader refuses such a program; the evaluator ends as well."""

    def change(mark, attributes):
        attributes["decomposition"] = whole.entry

    with pytest.raises(Refused):
        jax.make_jaxpr(imported(bent(whole, "hvpd.checkpoint", change)))(VECTOR)
    block = Block((0,), whole.main.types, [], (1,), whole.main.types)
    operation = Operation(
        "stablehlo.composite",
        (0,),
        (1,),
        whole.main.types,
        {
            "name": "hvpd.checkpoint",
            "decomposition": "main",
            "version": 1,
            "composite_attributes": {"mark": '{"dimensions": 0, "prevent_cse": true}', "functions": []},
        },
    )
    module = Module({"main": dataclasses.replace(block, operations=[operation])})
    with pytest.raises(Refused, match=r"call each other|too deep"):
        imported(module)(jnp.asarray(VECTOR))


def test_the_reader_counts_the_functions_of_marks(whole):
    text = foreign(
        "hvpd.scan",
        attributes=', version = 1 : i32, composite_attributes = {mark = "{}", functions = ["main"]}',
    )
    with pytest.raises(Refused, match="call themselves"):
        reader.read(text)


def test_a_random_key_in_data_draws_the_same_samples_as_jax():
    def fun(x, key):
        return jax.random.gamma(jax.random.wrap_key_data(key), jnp.abs(x))

    module = read(fun, ("cpu", "cuda"), [*SPECS, jax.ShapeDtypeStruct((2,), np.uint32)])
    np.testing.assert_array_equal(jax.jit(imported(module, 0))(VECTOR, KEY), jax.jit(fun)(VECTOR, KEY))
    on_cpu, on_cuda = (str(jax.make_jaxpr(imported(module, index))(VECTOR, KEY)) for index in (0, 1))
    assert on_cpu == on_cuda


# High-level primitives, of which jax 0.11 makes custom_root.


class Steep(hijax._BASE):
    """The function x**2 with the slope 7."""

    def __init__(self, aval):
        self.in_avals = (aval,)
        self.out_aval = aval
        self.params = {}
        super().__init__()

    def expand(self, x):
        return x**2

    def jvp(self, primals, tangents):
        return self(*primals), 7 * tangents[0]


def steep(x):
    return jnp.sum(Steep(jax.typeof(x))(x))


def test_a_high_level_primitive_keeps_its_rule():
    found = imported(read(steep))
    np.testing.assert_allclose(found(VECTOR), np.sum(VECTOR**2), rtol=1e-15)
    np.testing.assert_array_equal(jax.grad(found)(jnp.asarray(VECTOR)), np.full(3, 7.0))


def test_a_high_level_primitive_that_jax_traced_before_keeps_its_rule():
    inner = jax.jit(lambda x: steep(x))
    inner(jnp.asarray(VECTOR))
    before = jax.make_jaxpr(inner)(*SPECS)
    assert hijax.is_high(before)

    @jax.custom_jvp
    def outer(x):
        return jnp.sum(x)

    outer.defjvp(lambda primals, tangents: (outer(*primals), inner(*primals) * jnp.sum(tangents[0])))
    try:
        found = imported(read(outer))
    except marked_primitives.UnmarkableError as error:
        assert "hijax" in str(error)  # noqa: PT017 - jax 0.11 takes the jaxpr that it has, jax 0.10 traces again
    else:
        second = jax.grad(lambda x: jnp.sum(jax.grad(found)(x)))
        np.testing.assert_array_equal(second(jnp.asarray(VECTOR)), np.full(3, 21.0))
    with lift.forgetting(), hijax.kept_rules():
        closed, _ = lift.trace(inner, SPECS, widened=False, lift_bytes=1 << 14)
    assert not hijax.is_high(closed)
    assert "custom_jvp_call" in str(closed)


def test_jax_binds_its_own_high_level_primitives_outside_an_export():
    read(steep)
    assert hijax.is_high(jax.make_jaxpr(lambda x: steep(x) + 1)(*SPECS))


def test_reflectors_of_a_qr_factorization_stay_those_of_lapack():
    """A client's lowering of `ormqr` calls LAPACK, which jax does not keep stable."""

    def rotated(x):
        reflectors, scales = jnp.linalg.qr(jnp.outer(x, x) + jnp.eye(3), mode="raw")
        return lax.linalg.ormqr(reflectors.T, scales, jnp.ones((3, 1)), left=True, transpose=True)

    found = imported(read(rotated, specs=SPECS[:1]))
    np.testing.assert_allclose(found(VECTOR), rotated(VECTOR), rtol=1e-14)
    q, _ = np.linalg.qr(np.outer(VECTOR, VECTOR) + np.eye(3))
    np.testing.assert_allclose(np.abs(found(VECTOR)[:, 0]), np.abs(q.T @ np.ones(3)), rtol=1e-13)
