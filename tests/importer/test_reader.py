"""The reader: forms of input, exact constants, limits, refusals, damaged bytes."""

import dataclasses
import io
import json
import os
import random
import subprocess
import sys

import jax
import jax.extend.mlir
import jax.interpreters.mlir
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from hvpd_server.importer import attributes, reader, refusals
from hvpd_server.importer.graph import Block, Module, TensorType
from hvpd_server.importer.refusals import Limits
from hvpd_server.importer.table import Refused


def exported(fun, *shapes, dtype="float32"):
    return export.export(jax.jit(fun))(*[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes])


def program(body="", *, before="", arguments="%a: tensor<3xf32>", module="", function="", returned="%a"):
    return f"""module {module} {{
      {before}
      func.func public @main({arguments}) -> tensor<3xf32> {function} {{
        {body}
        return {returned} : tensor<3xf32>
      }}
    }}"""


def plain(block: Block):
    """Return a block without locations, with constants that can be compared."""

    def attribute(value):
        return (value.dtype.name, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value

    return (
        block.arguments,
        block.types,
        block.returns,
        block.result_types,
        [
            (
                each.name,
                each.operands,
                each.results,
                each.types,
                {name: attribute(value) for name, value in each.attributes.items()},
                [plain(region) for region in each.regions],
            )
            for each in block.operations
        ],
    )


def same(one: Module, other: Module):
    assert one.entry == other.entry
    assert list(one.functions) == list(other.functions)
    for name, block in one.functions.items():
        assert plain(block) == plain(other.functions[name])


def loop(x, w):
    h = jax.lax.tanh(x @ w)  # jnp.tanh is a jit, whose place is that of its first trace in this process.
    return jax.lax.scan(lambda c, row: (c + jnp.sum(row), None), 0.0, h)[0] + jnp.sum(jnp.sort(x))


@pytest.fixture(scope="module")
def looped():
    (rows,) = export.symbolic_shape("rows")
    return exported(loop, (rows, 5), (5, 3))


def test_every_form_of_input_gives_the_same_graph(looped):
    wanted = reader.read(looped.mlir_module_serialized)
    written = io.BytesIO()
    with jax.interpreters.mlir.make_ir_context():
        ir.Module.parse(looped.mlir_module()).operation.write_bytecode(written)
    forms = [
        looped.mlir_module(),
        looped.mlir_module().encode(),
        written.getvalue(),
        bytes(looped.serialize()),
        bytes(looped.serialize(vjp_order=2)),
        bytearray(looped.mlir_module_serialized),
    ]
    for form in forms:
        same(reader.read(form), wanted)


def test_artifacts_of_other_versions():
    text = program("%b = stablehlo.multiply %a, %a : tensor<3xf32>", returned="%b")
    current = stablehlo.get_current_version()
    for version in (stablehlo.get_minimum_version(), "1.0.0", current):
        same(reader.read(jax.extend.mlir.serialize_portable_artifact(text, version)), reader.read(text))
    later = bytearray(jax.extend.mlir.serialize_portable_artifact(text, current))
    later[4] = (99 << 1) + 1  # The version of the bytecode, behind the four bytes that name it.
    with pytest.raises(Refused, match="bytecode version 99 is newer") as refused:
        reader.read(later)
    assert refused.value.reason == refusals.BUNDLE_INCOMPATIBLE


def test_a_symbolic_size_is_an_extent_that_is_not_known(looped):
    module = reader.read(looped.mlir_module_serialized)
    assert module.entry == "main"
    assert module.main.types == (TensorType((None, 5), "float32"), TensorType((5, 3), "float32"))
    assert module.main.result_types == (TensorType((), "float32"),)


def test_regions_use_values_around_them(looped):
    module = reader.read(looped.mlir_module_serialized)
    body = next(
        block for block in module.functions.values() if any(o.name == "stablehlo.while" for o in block.operations)
    )
    (each,) = [operation for operation in body.operations if operation.name == "stablehlo.while"]
    condition, step = each.regions
    assert len(condition.arguments) == len(step.arguments) == len(each.operands) == len(each.results)
    assert condition.result_types == (TensorType((), "bool"),)
    assert step.result_types == each.types
    inside = {value for operation in step.operations for value in operation.results} | set(step.arguments)
    used = {value for operation in step.operations for value in operation.operands}
    around = {value for operation in body.operations for value in operation.results} | set(body.arguments)
    assert used - inside <= around


def test_the_place_in_the_source_is_kept(looped):
    module = reader.read(looped.mlir_module_serialized)
    (tanh,) = [o for block in module.functions.values() for o in block.operations if o.name == "stablehlo.tanh"]
    file, _, line = tanh.location.rpartition(":")
    assert file.endswith("test_reader.py")
    assert int(line) == loop.__code__.co_firstlineno + 1


def test_text_without_a_file_has_lines():
    module = reader.read(program("%b = stablehlo.add %a, %a : tensor<3xf32>"))
    assert module.main.operations[0].location == "line 4"


def test_attributes_are_plain():
    written = """
      %b = stablehlo.compare LT, %a, %a, FLOAT : (tensor<3xf32>, tensor<3xf32>) -> tensor<3xi1>
      %c = stablehlo.dot_general %a, %a, contracting_dims = [0] x [0], precision = [DEFAULT, HIGHEST]
        : (tensor<3xf32>, tensor<3xf32>) -> tensor<f32>
      %d = "stablehlo.gather"(%a, %i) {dimension_numbers = #stablehlo.gather<collapsed_slice_dims = [0],
        start_index_map = [0], index_vector_dim = 1>, slice_sizes = array<i64: 1>, indices_are_sorted = true}
        : (tensor<3xf32>, tensor<2x1xi32>) -> tensor<2xf32>
      %e = stablehlo.convolution(%x, %k) dim_numbers = [b, 0, f]x[0, i, o]->[b, 0, f],
        window = {stride = [2], pad = [[1, 0]], reverse = [false]}
        {batch_group_count = 1 : i64, feature_group_count = 1 : i64}
        : (tensor<1x4x2xf32>, tensor<3x2x5xf32>) -> tensor<1x2x5xf32>
      %f = stablehlo.composite "some.name" %a {composite_attributes = {axis = 1 : i64, rate = 2.5 : f32, names = ["p", "q"],
        small = dense<[1.5, 0x7FC0]> : tensor<2xbf16>, rule = @rule, flags = array<i1: true, false>},
        decomposition = @rule, version = 3 : i32} : (tensor<3xf32>) -> tensor<3xf32>
      %g = stablehlo.custom_call @target(%a) {backend_config = {uplo = 76 : ui8}, api_version = 4 : i32,
        operand_layouts = [dense<0> : tensor<1xindex>], result_layouts = [dense<0> : tensor<1xindex>]}
        : (tensor<3xf32>) -> tensor<3xf32>
      %h = stablehlo.exponential %a {result_accuracy = #stablehlo.result_accuracy<mode = #stablehlo.result_accuracy_mode<DEFAULT>>,
        mhlo.frontend_attributes = {num_batch_dims = "1"}} : tensor<3xf32>
      %j = stablehlo.exponential %a {result_accuracy =
        #stablehlo.result_accuracy<atol = 1.0, ulps = 3, mode = #stablehlo.result_accuracy_mode<TOLERANCE>>,
        mhlo.frontend_attributes = {other = "1"}} : tensor<3xf32>
    """
    rule = "func.func private @rule(%a: tensor<3xf32>) -> tensor<3xf32> { return %a : tensor<3xf32> }"
    arguments = "%a: tensor<3xf32>, %i: tensor<2x1xi32>, %x: tensor<1x4x2xf32>, %k: tensor<3x2x5xf32>"
    module = reader.read(program(written, before=rule, arguments=arguments))
    found = [dict(each.attributes) for each in module.main.operations]
    compare, dot, gather, convolution, composite, call, default, accurate = found
    assert compare == {"comparison_direction": "LT", "compare_type": "FLOAT"}
    assert dot == {
        "dot_dimension_numbers": {"lhs_contracting_dimensions": [0], "rhs_contracting_dimensions": [0]},
        "precision_config": ["DEFAULT", "HIGHEST"],
    }
    assert gather == {
        "dimension_numbers": {"collapsed_slice_dims": [0], "start_index_map": [0], "index_vector_dim": 1},
        "slice_sizes": (1,),
        "indices_are_sorted": True,
    }
    np.testing.assert_array_equal(convolution.pop("padding"), [[1, 0]])
    assert convolution == {
        "dimension_numbers": {"input": ["b", 0, "f"], "kernel": [0, "i", "o"], "output": ["b", 0, "f"]},
        "window_strides": (2,),
        "window_reversal": (False,),
        "batch_group_count": 1,
        "feature_group_count": 1,
    }
    small = composite["composite_attributes"].pop("small")
    assert small.dtype == ml_dtypes.bfloat16
    assert small.view(np.uint16).tolist() == [0x3FC0, 0x7FC0]
    assert composite == {
        "name": "some.name",
        "composite_attributes": {
            "axis": 1,
            "rate": 2.5,
            "names": ["p", "q"],
            "rule": "rule",
            "flags": (True, False),
        },
        "decomposition": "rule",
        "version": 3,
    }
    (layout,) = call.pop("operand_layouts")
    assert layout.tolist() == [0]
    assert call.pop("result_layouts")[0].tolist() == [0]
    assert call == {"call_target_name": "target", "backend_config": {"uplo": 76}, "api_version": 4}
    assert default == {}
    assert accurate == {
        "result_accuracy": {"atol": 1.0, "ulps": 3, "mode": "TOLERANCE"},
    }


def test_layouts():
    layouts = "[dense<1> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>, dense<> : tensor<0xindex>]"
    text = program(f"%b = stablehlo.add %a, %a {{x = {layouts}}} : tensor<3xf32>")
    (operation,) = reader.read(text).main.operations
    assert [each.tolist() for each in operation.attributes["x"]] == [[1, 1], [1, 0], []]


def bits(array):
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("size", [(), (0, 2), (1,), (7,), (3, 4), (150,)])
@pytest.mark.parametrize("name", sorted(set(attributes.DTYPES.values())))
def test_constants_are_exact_to_the_bit(name, size):
    dtype = attributes.dtype(name)
    source = np.random.default_rng(len(name))
    count = int(np.prod(size))
    if name == "bool":
        wanted = source.integers(0, 2, count).astype(bool).reshape(size)
    else:  # Any bits, so NaNs with payloads, infinities and subnormal numbers are among them.
        wanted = np.frombuffer(source.bytes(count * dtype.itemsize), dtype).reshape(size)
    module = reader.read(with_constant(wanted))
    (constant,) = module.main.operations
    found = constant.attributes["value"]
    assert found.dtype == dtype
    assert found.shape == size
    assert bits(found) == bits(wanted)
    assert constant.types == (TensorType(size, name),)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "complex64", "float8_e4m3fn", "int8", "bool"])
def test_equal_elements_take_the_memory_of_one(name):
    wanted = np.broadcast_to(np.ones((), attributes.dtype(name)), (50, 40))
    (constant,) = reader.read(with_constant(wanted)).main.operations
    found = constant.attributes["value"]
    assert bits(found) == bits(wanted)
    assert found.strides == (0, 0)


def with_constant(value):
    """Return bytecode with a constant. The elements go in as they are, not as
    decimals.
    """
    element = next(text for text, name in attributes.DTYPES.items() if name == value.dtype.name)
    tensor = f"tensor<{''.join(f'{extent}x' for extent in value.shape)}{element}>"
    with jax.interpreters.mlir.make_ir_context(), ir.Location.unknown():
        digits = value.tobytes().hex().upper()
        # A string of bytes is exact for any type except booleans, which are written
        # otherwise.
        inside = f'"0x{digits}"' if value.dtype != bool and value.size else listed(value)
        module = ir.Module.parse(
            f"func.func public @main() -> {tensor} {{ %0 = stablehlo.constant dense<{inside}> : {tensor} return %0 : {tensor} }}"
        )
        written = io.BytesIO()
        module.operation.write_bytecode(written)
    return written.getvalue()


def listed(value):
    return "" if not value.size else str(value.tolist()).lower()


def test_short_decimals_are_rounded_once():
    # The middle between 1 and the next float32 is 1 + 2**-24; a little above it rounds
    # up, and in float64 it is the middle.
    above = "1.000000059604644775390626"
    found = attributes.parse(f"dense<({above},1.0)> : tensor<complex<f32>>", TensorType((), "complex64"))
    assert found.real.view(np.uint32) == np.float32(1).view(np.uint32) + 1


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        ("", refusals.BUNDLE_INVALID, ["empty"]),
        ("module {}", refusals.BUNDLE_INVALID, ["no public function"]),
        ("func.func private @f() { return }", refusals.BUNDLE_INVALID, ["no public function"]),
        (
            "func.func @f() { return } func.func @g() { return }",
            refusals.BUNDLE_INVALID,
            ["2 public functions", "f, g"],
        ),
        (
            program(before="func.func @other() { return }"),
            refusals.OPERATION_REFUSED,
            ["several entry points", "other"],
        ),
        ("func.func private @main(tensor<f32>) -> tensor<f32>", refusals.OPERATION_REFUSED, ["0 blocks"]),
        ("no module at all", refusals.BUNDLE_INCOMPATIBLE, ["cannot be read", jax.__version__]),
        ("module { module {} }", refusals.OPERATION_REFUSED, ["builtin.module", "line 1"]),
        (
            program(module="attributes {mhlo.num_partitions = 2 : i32}"),
            refusals.OPERATION_REFUSED,
            ["num_partitions = 2"],
        ),
        (
            program(function="attributes {llvm.noreturn}"),
            refusals.OPERATION_REFUSED,
            ["llvm.noreturn", "function main"],
        ),
        (
            program(arguments="%a: tensor<3xf32> {tf.aliasing_output = 0 : i32}"),
            refusals.OPERATION_REFUSED,
            ["tf.aliasing_output", "argument 0", "donated"],
        ),
        (
            program(arguments="%a: tensor<3xf32> {jax.buffer_donor = true}"),
            refusals.OPERATION_REFUSED,
            ["buffer_donor"],
        ),
        (
            program(arguments='%a: tensor<3xf32> {mhlo.sharding = "{devices=[2]<=[2]}"}'),
            refusals.OPERATION_REFUSED,
            ["mhlo.sharding", "one device"],
        ),
        (
            program(
                before='sdy.mesh @mesh = <["x"=2]>',
                arguments='%a: tensor<3xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"x"}]>}',
            ),
            refusals.OPERATION_REFUSED,
            ["sdy.mesh", "one device"],
        ),
        (
            program(arguments='%a: tensor<3xf32> {mhlo.memory_kind = "pinned_host"}'),
            refusals.OPERATION_REFUSED,
            ["memory_kind"],
        ),
        (
            program('%b = "foo.bar"(%a) : (tensor<3xf32>) -> tensor<f32>'),
            refusals.OPERATION_REFUSED,
            ["foo.bar at line 4"],
        ),
        (program("%b = arith.constant 1 : i32"), refusals.OPERATION_REFUSED, ["arith.constant at line 4"]),
        (program('%b = "stablehlo.foo"() : () -> tensor<f32>'), refusals.BUNDLE_INCOMPATIBLE, ["stablehlo.foo"]),
        (program("%b = stablehlo.create_token : !stablehlo.token"), refusals.OPERATION_REFUSED, ["create_token"]),
        (
            program("%b = stablehlo.partition_id : tensor<ui32>"),
            refusals.OPERATION_REFUSED,
            ["partition_id", "one device"],
        ),
        (
            program("%b = stablehlo.tuple %a : tuple<tensor<3xf32>>"),
            refusals.OPERATION_REFUSED,
            ["stablehlo.tuple", "expected an array"],
        ),
        (program("%b = stablehlo.constant dense<1> : tensor<3xi4>"), refusals.OPERATION_REFUSED, ["type i4"]),
        (program("%b = stablehlo.constant dense<1> : tensor<3xui2>"), refusals.OPERATION_REFUSED, ["type ui2"]),
        (
            program(arguments="%a: tensor<3xf32>, %b: tensor<4x!quant.uniform<i8:f32, 0.5>>"),
            refusals.OPERATION_REFUSED,
            ["!quant.uniform<i8:f32"],
        ),
        (
            program(
                "%b = stablehlo.uniform_quantize %a : (tensor<3xf32>) -> tensor<3x!quant.uniform<i8:f32, 0.5>>",
            ),
            refusals.OPERATION_REFUSED,
            ["quantized"],
        ),
        (
            program(arguments="%a: tensor<3xf32>, %b: tensor<?xf32, #stablehlo.bounds<5>>"),
            refusals.OPERATION_REFUSED,
            ["encoding", "bounds"],
        ),
        (
            program(arguments="%a: tensor<3xf32>, %b: !stablehlo.token"),
            refusals.OPERATION_REFUSED,
            ["token", "effects"],
        ),
        (program(arguments="%a: tensor<3xf32>, %b: tensor<*xf32>"), refusals.OPERATION_REFUSED, ["tensor<*xf32>"]),
        (program(arguments="%a: tensor<3xf32>, %b: memref<3xf32>"), refusals.OPERATION_REFUSED, ["memref<3xf32>"]),
        (program(arguments="%a: tensor<3xf32>, %b: tensor<-3xf32>"), refusals.BUNDLE_INCOMPATIBLE, ["cannot be read"]),
        (
            program(arguments=f"%a: tensor<3xf32>, %b: tensor<{1 << 62}xf32>"),
            refusals.PROGRAM_TOO_LARGE,
            ["TiB", str(1 << 62)],
        ),
        (
            program(arguments=f"%a: tensor<3xf32>, %b: tensor<{1 << 31}x?x{1 << 31}xi8>"),
            refusals.PROGRAM_TOO_LARGE,
            ["TiB"],
        ),
        (program(arguments=f"%a: tensor<3xf32>, %b: tensor<{'1x' * 65}f32>"), refusals.PROGRAM_TOO_LARGE, ["65 axes"]),
        (
            program(f"%b = stablehlo.constant dense<1.0> : tensor<{1 << 30}xf64>"),
            refusals.PROGRAM_TOO_LARGE,
            ["constants", "pass arrays as data"],
        ),
        (
            program("%b = stablehlo.constant dense_resource<r> : tensor<3xf32>"),
            refusals.OPERATION_REFUSED,
            ["dense_resource", "dense<...>"],
        ),
        (
            program("%b = stablehlo.add %a, %a {where = #foo.bar} : tensor<3xf32>"),
            refusals.OPERATION_REFUSED,
            ["stablehlo.add at line 4", "attribute where", "foo"],
        ),
        (
            program("%b = stablehlo.add %a, %a {where = dense<(1.0, 2.0)> : tensor<complex<f32>>} : tensor<3xf32>"),
            refusals.OPERATION_REFUSED,
            ["stablehlo.add at line 4", "attribute where"],
        ),
        (
            program(f"%b = stablehlo.add %a, %a {{x = dense<1> : tensor<{1 << 62}xi8>}} : tensor<3xf32>"),
            refusals.PROGRAM_TOO_LARGE,
            ["stablehlo.add at line 4", "attribute x", "more than 65536 elements"],
        ),
        (
            program(f"%b = stablehlo.add %a, %a {{x = {'[' * 5000}1{']' * 5000}}} : tensor<3xf32>"),
            refusals.PROGRAM_TOO_LARGE,
            ["nested too deeply"],
        ),
        (
            program('%b = stablehlo.add %a, %a {x = "\\FF"} : tensor<3xf32>'),
            refusals.BUNDLE_INVALID,
            ["cannot be read"],
        ),
        (
            program("cf.br ^next(%a: tensor<3xf32>)\n^next(%b: tensor<3xf32>):"),
            refusals.OPERATION_REFUSED,
            ["2 blocks", "stablehlo.if"],
        ),
        (
            program("%b = call @main(%a) : (tensor<3xf32>) -> tensor<3xf32>"),
            refusals.OPERATION_REFUSED,
            ["call themselves", "main"],
        ),
    ],
)
def test_refusals(text, reason, words):
    with pytest.raises(Refused) as refused:
        reader.read(text)
    assert refused.value.reason == reason
    for word in words:
        assert word in str(refused.value)


def test_shardings_that_say_nothing_are_dropped():
    text = program(
        arguments='%a: tensor<3xf32> {mhlo.sharding = "{replicated}", mhlo.layout_mode = "default", jax.arg_info = "x"}',
        module="attributes {mhlo.num_partitions = 1 : i64, jax.uses_shape_polymorphism = true, mhlo.input_output_alias = []}",
    )
    assert reader.read(text).main.operations == []


def test_one_public_function_may_have_any_name():
    text = program().replace("@main", "@objective")
    assert reader.read(text).entry == "objective"


def test_functions_that_main_calls_may_be_public():
    called = "func.func @other(%a: tensor<3xf32>) -> tensor<3xf32> { return %a : tensor<3xf32> }"
    text = program("%b = call @other(%a) : (tensor<3xf32>) -> tensor<3xf32>", before=called)
    module = reader.read(text)
    assert module.entry == "main"
    assert module.main.operations[0].attributes == {"callee": "other"}


def test_functions_that_call_each_other_in_a_circle():
    one = "func.func private @f(%a: tensor<3xf32>) -> tensor<3xf32> { %b = call @g(%a) : (tensor<3xf32>) -> tensor<3xf32> "
    one += "return %b : tensor<3xf32> }"
    other = one.replace("@f", "@h").replace("@g", "@f").replace("@h", "@g")
    text = program("%b = call @f(%a) : (tensor<3xf32>) -> tensor<3xf32>", before=f"{one}\n{other}")
    with pytest.raises(Refused, match="call themselves") as refused:
        reader.read(text)
    assert refused.value.reason == refusals.OPERATION_REFUSED


@pytest.mark.parametrize("named", ["@rule", '"rule"', '["rule"]'])
def test_a_rule_in_an_attribute_counts_as_a_call(named):
    rule = f"""func.func private @rule(%a: tensor<3xf32>) -> tensor<3xf32> {{
      %b = stablehlo.composite "x.y" %a {{composite_attributes = {{rule = {named}}}, decomposition = @plain}}
        : (tensor<3xf32>) -> tensor<3xf32>
      return %b : tensor<3xf32> }}
      func.func private @plain(%a: tensor<3xf32>) -> tensor<3xf32> {{ return %a : tensor<3xf32> }}"""
    text = program("%b = call @rule(%a) : (tensor<3xf32>) -> tensor<3xf32>", before=rule)
    with pytest.raises(Refused, match="call themselves"):
        reader.read(text)


def chain(length, times):
    """Return functions that each call the next one, some times each."""
    calls = "\n".join(f"%c{n} = call @f{{next}}(%a) : (tensor<3xf32>) -> tensor<3xf32>" for n in range(times))
    functions = [
        f"func.func private @f{n}(%a: tensor<3xf32>) -> tensor<3xf32> {{ {calls.format(next=n + 1)} return %c0 : tensor<3xf32> }}"
        for n in range(length)
    ]
    last = f"func.func private @f{length}(%a: tensor<3xf32>) -> tensor<3xf32> {{ return %a : tensor<3xf32> }}"
    return program("%b = call @f0(%a) : (tensor<3xf32>) -> tensor<3xf32>", before="\n".join([*functions, last]))


def test_nested_calls_count_as_often_as_they_are_made():
    with pytest.raises(Refused, match=r"1000000 operations, where each call .* Nest loops") as refused:
        reader.read(chain(40, 2))
    assert refused.value.reason == refusals.PROGRAM_TOO_LARGE


def test_long_chains_of_calls():
    assert len(reader.read(chain(60, 1)).functions) == 62
    with pytest.raises(Refused, match=r"more than 64 functions that call each other") as refused:
        reader.read(chain(200, 1))
    assert refused.value.reason == refusals.PROGRAM_TOO_LARGE


def nested(depth):
    inside = "stablehlo.return %a : tensor<3xf32>"
    for level in range(depth):
        inside = f"""%v{level} = "stablehlo.if"(%p) ({{ {inside} }}, {{ stablehlo.return %a : tensor<3xf32> }})
          : (tensor<i1>) -> tensor<3xf32>
          stablehlo.return %v{level} : tensor<3xf32>"""
    text = program(inside.rpartition("stablehlo.return")[0], arguments="%a: tensor<3xf32>, %p: tensor<i1>")
    return text.replace(f"stablehlo.return %v{depth}", "")


def test_deep_nesting():
    block = reader.read(nested(60)).main
    for _ in range(60):
        (each,) = block.operations
        block = each.regions[0]
    assert block.operations == []
    with pytest.raises(Refused, match="more than 64 regions deep: nest loops and conditions less deeply") as refused:
        reader.read(nested(70))
    assert refused.value.reason == refusals.PROGRAM_TOO_LARGE


def test_limits_are_those_that_are_given():
    text = program(
        "%b = stablehlo.constant dense<[1.0, 2.0, 3.0]> : tensor<3xf32>\n%c = stablehlo.add %a, %b : tensor<3xf32>"
    )
    for limits, words in [
        (Limits(operations=2), "more than 2 operations"),
        (Limits(constant_bytes=11), "more than 11 bytes"),
        (Limits(bundle_bytes=100), "more than 100"),
        (Limits(rank=0), "1 axes, more than 0"),
    ]:
        with pytest.raises(Refused, match=words) as refused:
            reader.read(text, limits)
        assert refused.value.reason == refusals.PROGRAM_TOO_LARGE
    assert len(reader.read(text, Limits(operations=3, constant_bytes=12, rank=1)).main.operations) == 2


def test_an_export_for_two_devices():
    one = exported(jnp.sin, (3,))
    with pytest.raises(Refused, match="2 devices"):
        reader.read(bytes(dataclasses.replace(one, nr_devices=2).serialize()))


def test_an_export_for_two_platforms_takes_the_platform_first():
    both = export.export(jax.jit(jnp.sin), platforms=["cpu", "cuda"])(jax.ShapeDtypeStruct((3,), "float32"))
    module = reader.read(bytes(both.serialize()))
    # jax 0.11 makes it 64 bits wide if 64 bits are enabled.
    assert module.main.types[0] in (TensorType((), "int32"), TensorType((), "int64"))


def test_words_of_a_program_are_printable_and_short():
    text = program('%b = "foo.bar"(%a) : (tensor<3xf32>) -> tensor<f32>').replace("foo.bar", "foo.\\1B[31m" + "x" * 500)
    with pytest.raises(Refused) as refused:
        reader.read(text)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


_DAMAGED = """
import json, os, resource, sys
import jax.interpreters.mlir
from hvpd_server.importer import reader
from hvpd_server.importer.table import Refused

def end(blob):
    context = jax.interpreters.mlir.make_ir_context()
    context.enable_multithreading(False)
    try:
        reader.read(blob, context=context)
    except Refused:
        return 1
    except Exception:
        return 2
    return 0

forked = sys.argv[1] == "forked"
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
ends = []
for line in json.load(sys.stdin):
    blob = bytes.fromhex(line)
    if not forked:
        ends.append(end(blob))
        continue
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))  # Locations can unfold without end.
        os._exit(end(blob))
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
json.dump(ends, sys.stdout)
"""


def ends_of(blobs, how):
    """Return the end of each reading, "forked" (as the server does) or "together": 0
    read, 1 refused, 2 another error, -N a signal.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _DAMAGED, how],
        input=json.dumps([bytes(blob).hex() for blob in blobs]),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return json.loads(done.stdout)


def test_every_prefix_is_refused():
    text = program("%b = stablehlo.multiply %a, %a : tensor<3xf32>", returned="%b")
    artifact = jax.extend.mlir.serialize_portable_artifact(text, stablehlo.get_current_version())
    blobs = [artifact[:length] for length in range(1, len(artifact))]
    ends = ends_of([*blobs, artifact], "together")
    assert ends[-1] == 0
    # Bytes behind the last section may be missing without harm; nothing that was cut is
    # read as something else.
    assert set(ends[:-1]) <= {1}


def test_damaged_bytes_end_in_an_answer():
    small = bytes(exported(lambda x: jnp.sum(jnp.where(x > 0, x, 0.0) ** 2), (4,)).serialize())
    source = random.Random(7)
    blobs = []
    for _ in range(60):
        damaged = bytearray(small)
        for _ in range(source.randint(1, 6)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        blobs.append(bytes(damaged))
    for _ in range(20):
        cuts = sorted(source.sample(range(len(small)), 3))
        pieces = [small[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        source.shuffle(pieces)
        blobs.append(b"".join(pieces))
    ends = ends_of(blobs, "forked")
    assert len(ends) == len(blobs)
    assert 1 in ends


def test_a_read_module_holds_no_mlir(looped):
    def look(value):
        if dataclasses.is_dataclass(value):
            value = [getattr(value, field.name) for field in dataclasses.fields(value)]
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for each in value:
                look(each)
        else:
            assert isinstance(value, (int, float, str, bool, np.ndarray, type(None))), type(value)

    look(reader.read(looped.mlir_module_serialized))
