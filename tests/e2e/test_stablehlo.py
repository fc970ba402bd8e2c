"""Objectives that other frameworks wrote as StableHLO are right at smooth points, and
their kinks are reported.
"""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.interpreters.mlir
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir

import hvpd
from hvpd._registration import portable, stablehlo
from hvpd_server.importer import reader
from tests.support.waiting import until

TRUTH = json.loads((Path(__file__).parents[1] / "truth" / "tensorflow.json").read_text())
NAMES = [name for name in TRUTH if name not in ("tensorflow", "stopped")]
X = np.random.default_rng(0).normal(size=(4, 3))
RELU = """
func.func private @relu(%x: tensor<4xf64>) -> tensor<4xf64> {
  %zero = stablehlo.constant dense<0.0> : tensor<4xf64>
  %y = stablehlo.maximum %x, %zero : tensor<4xf64>
  return %y : tensor<4xf64>
}
"""


def module(activation="%y = stablehlo.tanh %z : tensor<4xf64>", functions="", returned="%sum : tensor<f64>"):
    """Return a module: the sum of squares of an activation of X w."""
    result = returned.partition(" : ")[2]
    return f"""
func.func public @main(%w: tensor<3xf64>, %X: tensor<4x3xf64>) -> {result} {{
  %z = stablehlo.dot_general %X, %w, contracting_dims = [1] x [0] : (tensor<4x3xf64>, tensor<3xf64>) -> tensor<4xf64>
  {activation}
  %s = stablehlo.multiply %y, %y : tensor<4xf64>
  %zero = stablehlo.constant dense<0.0> : tensor<f64>
  %sum = stablehlo.reduce(%s init: %zero) applies stablehlo.add across dimensions = [0]
    : (tensor<4xf64>, tensor<f64>) -> tensor<f64>
  return {returned}
}}
{functions}
"""


def fun(w, X):
    return jnp.sum(jnp.tanh(X @ w) ** 2)


def hessian(fun, w):
    with jax.enable_x64(True):
        return np.asarray(jax.hessian(fun)(jnp.asarray(w), X))


def dense(point):
    return point.hessian() @ np.eye(point.n)


def close(found, expected, tolerance=1e-12):
    return np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_tensorflows_derivatives(client, name):
    case = TRUTH[name]
    x, *data = (np.array(array) for array in (case["x"], *case["data"]))
    objective = client.register_stablehlo(base64.b64decode(case["module"]), x, *data, name=f"tensorflow/{name}")
    point = objective.at(x)
    assert point.value == pytest.approx(case["value"], rel=1e-12)
    assert close(point.gradient, np.array(case["gradient"]))
    assert close(dense(point), np.array(case["hessian"]))


def test_a_stopped_gradient_is_lost(client):
    """The value and the gradient are TensorFlow's. The Hessian is that of another
    function, which StableHLO cannot express.
    """
    case = TRUTH["stopped"]
    x, *data = (np.array(array) for array in (case["x"], *case["data"]))
    objective = client.register_stablehlo(base64.b64decode(case["module"]), x, *data)
    point = objective.at(x)
    assert close(point.gradient, np.array(case["gradient"]))
    assert not close(dense(point), np.array(case["hessian"]), 1e-3)
    with jax.enable_x64(True):
        X, y = map(jnp.asarray, data)
        expected = jax.hessian(lambda w: jnp.sum(jnp.var(X * w, axis=1) * y))(jnp.asarray(x))
    assert close(dense(point), np.asarray(expected))


FORMS = {
    "text": lambda: module(),
    "text as bytes": lambda: module().encode(),
    "jax.export": lambda: bytes(exported().serialize()),
    "jax.export with derivatives": lambda: exported_with_derivatives(),
    "for two platforms": lambda: bytes(exported(platforms=("cuda", "cpu")).serialize()),
    "portable artifact": lambda: exported().mlir_module_serialized,
}


def exported(platforms=("cpu",)):
    with jax.enable_x64(True):
        return jax.export.export(jax.jit(fun), platforms=platforms)(jnp.ones(3), jnp.asarray(X))


def exported_with_derivatives():
    with jax.enable_x64(True):
        return bytes(exported().serialize(vjp_order=1))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_module_is_the_same_objective(client, form):
    objective = client.register_stablehlo(FORMS[form](), np.ones(3), X)
    assert close(dense(objective.at(np.full(3, 0.3))), hessian(fun, np.full(3, 0.3)))
    assert objective.value(np.full(3, 0.3)) == pytest.approx(float(fun(np.full(3, 0.3), X)), rel=1e-6)


def test_a_pytree_is_passed_leaf_by_leaf(client):
    text = """
    func.func @main(%a: tensor<2xf64>, %b: tensor<f64>, %s: tensor<2xf64>) -> tensor<f64> {
      %p = stablehlo.multiply %a, %s : tensor<2xf64>
      %q = stablehlo.multiply %p, %p : tensor<2xf64>
      %zero = stablehlo.constant dense<0.0> : tensor<f64>
      %r = stablehlo.reduce(%q init: %zero) applies stablehlo.add across dimensions = [0]
        : (tensor<2xf64>, tensor<f64>) -> tensor<f64>
      %t = stablehlo.multiply %r, %b : tensor<f64>
      return %t : tensor<f64>
    }
    """
    x = {"b": np.float64(2.0), "a": np.array([1.0, 3.0])}
    objective = client.register_stablehlo(text, x, {"scale": np.array([1.0, 2.0])})
    assert objective.value(x) == 2 * (1 + 36)
    expected = np.array([[4, 0, 2], [0, 16, 24], [2, 24, 0]], float)
    assert close(dense(objective.at(x)), expected)
    assert objective.unravel(objective.ravel(x))["b"] == 2.0


def test_a_function_called_relu_has_jaxs_rule(client):
    activation = "%y = func.call @relu(%z) : (tensor<4xf64>) -> tensor<4xf64>"
    objective = client.register_stablehlo(module(activation, RELU), np.ones(3), X)
    rules = objective.derivative_rules()
    assert any("relu" in rule for rule in rules.recognised)
    w = np.array([0.3, -0.2, 0.5])
    assert close(dense(objective.at(w)), hessian(lambda w, X: jnp.sum(jax.nn.relu(X @ w) ** 2), w))


def test_a_kink_without_a_name_is_presumed_and_said_to_be(client):
    activation = "%o = stablehlo.constant dense<0.0> : tensor<4xf64>\n  %y = stablehlo.maximum %z, %o : tensor<4xf64>"
    objective = client.register_stablehlo(module(activation), np.ones(3), X)
    assert objective.derivative_rules().presumed == {"maximum: half of each side's derivative at a tie": 1}
    assert not objective.derivative_rules().recognised


def test_a_jax_users_own_relu_keeps_its_own_rule(client):
    @jax.jit
    def relu(x):
        return jnp.maximum(x, 0.0)

    def fun(x):
        return jnp.sum(relu(x) * (x + 1))

    point = client.register(fun, np.zeros(3)).at(np.zeros(3))
    with jax.enable_x64(True):
        gradient, expected = jax.grad(fun)(jnp.zeros(3)), jax.hessian(fun)(jnp.zeros(3))
    np.testing.assert_array_equal(point.gradient, gradient)
    np.testing.assert_array_equal(dense(point), expected)


def loop(rounds):
    """Return a module: x after so many rounds of a sine, summed."""
    return f"""
    func.func @main(%x: tensor<3xf64>) -> tensor<f64> {{
      %i0 = stablehlo.constant dense<0> : tensor<i64>
      %w:2 = stablehlo.while(%i = %i0, %a = %x) : tensor<i64>, tensor<3xf64>
      cond {{
        %l = stablehlo.constant dense<{rounds}> : tensor<i64>
        %c = stablehlo.compare LT, %i, %l, SIGNED : (tensor<i64>, tensor<i64>) -> tensor<i1>
        stablehlo.return %c : tensor<i1>
      }} do {{
        %s = stablehlo.constant dense<1> : tensor<i64>
        %j = stablehlo.add %i, %s : tensor<i64>
        %m = stablehlo.sine %a : tensor<3xf64>
        stablehlo.return %j, %m : tensor<i64>, tensor<3xf64>
      }}
      %z = stablehlo.constant dense<0.0> : tensor<f64>
      %r = stablehlo.reduce(%w#1 init: %z) applies stablehlo.add across dimensions = [0]
        : (tensor<3xf64>, tensor<f64>) -> tensor<f64>
      return %r : tensor<f64>
    }}
    """


@pytest.mark.parametrize("rounds", [1 << 62, 1 << 40])
def test_loops_whose_derivatives_need_too_much_memory_are_refused(client, rounds):
    """XLA aborted the server on such sizes."""
    with pytest.raises(hvpd.InvalidArgumentError, match=f"a stablehlo.while at line 4 of {rounds} rounds") as error:
        client.register_stablehlo(loop(rounds), np.ones(3))
    assert error.value.reason == "PROGRAM_TOO_LARGE"


def test_loops_inside_each_other_are_counted_together(client):
    def rounds(body):
        return lambda x: jax.lax.scan(lambda state, _: (body(state), None), x, length=1 << 25)[0]

    with pytest.raises(hvpd.InvalidArgumentError, match=r"makes an array of .* in scan") as error:
        client.register(lambda x: jnp.sum(rounds(rounds(jnp.sin))(x)), np.ones(3))
    assert error.value.reason == "PROGRAM_TOO_LARGE"


def test_a_loop_of_a_few_rounds_is_a_scan(client):
    objective = client.register_stablehlo(loop(3), np.ones(3))
    with jax.enable_x64(True):
        expected = jax.hessian(lambda x: jnp.sum(jnp.sin(jnp.sin(jnp.sin(x)))))(jnp.ones(3))
    assert close(dense(objective.at(np.ones(3))), np.asarray(expected))


def test_a_rule_with_symbolic_zeros_is_refused(client):
    @jax.custom_vjp
    def product(a, b):
        return a * b

    product.defvjp(
        lambda a, b: (a.value * b.value, (a.value, b.value)), lambda r, g: (g * r[1], g * r[0]), symbolic_zeros=True
    )
    with pytest.raises(hvpd.InvalidArgumentError, match="define it without symbolic_zeros"):
        client.register(lambda x, y: jnp.sum(product(x, y)), np.ones(3), np.ones(3))


def test_a_jax_client_presumes_nothing(client):
    objective = client.register(lambda w, X: jnp.sum(jnp.maximum(X @ w, 0.0) ** 2), np.ones(3), X)
    assert not objective.derivative_rules().presumed


def test_the_check_looks_at_x_and_beside_it(client, server):
    objective = client.register_stablehlo(module(), np.ones(3), X, name="foreign/checked")
    until(lambda: objective.registration_check().verdict != "pending")
    check = objective.registration_check()
    assert check.verdict == "passed"
    assert {item.name for item in check.items} >= {"difference", "difference beside x"}


REFUSED = {
    "nothing": (b"", "module is empty"),
    "a file of zeros": (bytes(100), "module is empty"),
    "junk": (b"\x00\x01junk", "no StableHLO that jax"),
    "bytecode that ends early": (exported().mlir_module_serialized[:200], "cannot be read|no program that this server"),
    "an unknown operation": (module("%y = stablehlo.frobnicate %z : tensor<4xf64>"), "stablehlo.frobnicate"),
    "an operation without a rule": (
        module(
            '%y = "stablehlo.einsum"(%z, %z) {einsum_config = "i,i->i"} : (tensor<4xf64>, tensor<4xf64>) -> tensor<4xf64>'
        ),
        r"stablehlo\.einsum at line 4 which is not served.*simpler operations",
    ),
    "an attribute": (
        module("%y = stablehlo.multiply %z, %z {evil} : tensor<4xf64>"),
        "-:4:8: .*stablehlo.multiply.*evil",
    ),
    "an export of jax": (lambda: exported(), r"module is a jax Exported: pass bytes\(exported.serialize\(\)\)"),
    "a lowered function": (lambda: jax.jit(jnp.sum).lower(np.ones(3)), r"module is a jax Lowered: pass .*as_text"),
    "a function": (fun, "module is the function fun: pass a function of jax to client.register"),
    "a path": (Path("loss.mlir"), "module is the path 'loss.mlir': read the file first"),
    "a path as text": ("loss.mlir", "module is the text 'loss.mlir', which is no MLIR: if this is a path, read"),
    "no module": (None, "module is None: pass bytes, or MLIR as text"),
    "a dictionary": ({}, "module is {}: pass bytes, or MLIR as text"),
    "a foreign call": (
        module("%y = stablehlo.custom_call @launch_missiles(%z) : (tensor<4xf64>) -> tensor<4xf64>"),
        "launch_missiles",
    ),
    "a callback": (
        module("%y = stablehlo.custom_call @xla_python_cpu_callback(%z) : (tensor<4xf64>) -> tensor<4xf64>"),
        "xla_python_cpu_callback",
    ),
    "a vector": (module(returned="%s : tensor<4xf64>"), "must return one real floating scalar"),
    "a mark that lies": (
        module(
            '%y = stablehlo.composite "hvpd.jax.no_such" %z {composite_attributes = {mark = "{}", functions = []}, '
            "decomposition = @relu, version = 1 : i32} : (tensor<4xf64>) -> tensor<4xf64>",
            RELU,
        ),
        "hvpd.jax.no_such",
    ),
    "no function": ("module {}", "no public function"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_program_gives_the_reason(client, name):
    content, says = REFUSED[name]
    content = content() if content is not fun and callable(content) else content
    before = {each.digest for each in client.objectives()}
    with pytest.raises(hvpd.HvpdError, match=says):
        client.register_stablehlo(content, np.ones(3), X)
    assert {each.digest for each in client.objectives()} == before


def test_a_conversion_without_end_is_ended(monkeypatch):
    endless = (
        "from hvpd._registration import portable; portable.artifact = lambda *_: any(iter(int, 1)); portable.main()"
    )
    monkeypatch.setattr(stablehlo, "_CONVERT", endless)
    monkeypatch.setattr(stablehlo, "_SECONDS", 1)
    with pytest.raises(hvpd.InvalidArgumentError, match="took more than 1 s of computing") as error:
        stablehlo._converted(b"module {}", "")
    assert error.value.reason == "PROGRAM_UNREADABLE"


@pytest.mark.parametrize(("form", "place"), [("portable artifact", 22), ("plain bytecode", 18)])
def test_damaged_bytecode_does_not_end_this_process(form, place):
    """MLIR's parser aborts if the name of the producer does not end."""
    content = bytearray(exported().mlir_module_serialized if form == "portable artifact" else bytecode())
    assert content[place] == 0
    content[place] = 0xFF
    with pytest.raises(hvpd.InvalidArgumentError) as error:
        stablehlo._artifact(content, "")
    assert error.value.reason == "PROGRAM_UNREADABLE"


def test_text_that_crashes_the_parser_does_not_end_this_process():
    with pytest.raises(hvpd.InvalidArgumentError) as error:
        stablehlo._artifact('module { func.func @f() { call @"\\FF"() : () -> () return } }', "")
    assert error.value.reason == "PROGRAM_UNREADABLE"


def bytecode():
    written = io.BytesIO()
    with jax.interpreters.mlir.make_ir_context():
        ir.Module.parse(exported().mlir_module()).operation.write_bytecode(written)
    return written.getvalue()


def test_only_text_without_locations_keeps_its_lines():
    places = exported().mlir_module()
    assert ".py" in places
    assert b".py" not in stablehlo._artifact(places, "")[0]
    assert b".py" not in stablehlo._artifact(bytecode(), "")[0]
    operations = reader.read(stablehlo._artifact(module(), "")[0]).main.operations
    assert {each.name: each.location for each in operations}["stablehlo.dot_general"] == "line 3"


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_functions_of_jax_keep_their_rules_on_each_platform(client, platforms):
    def fun(x):
        return jnp.sum(jnp.sinc(x)) + jnp.sum(jax.nn.relu(x) * (x + 1)) + jnp.sum(jnp.logaddexp(0.0, -x))

    with jax.enable_x64(True):
        blob = bytes(jax.export.export(jax.jit(fun), platforms=platforms)(jnp.zeros(3)).serialize())
        gradient, expected = jax.grad(fun)(jnp.zeros(3)), jax.hessian(fun)(jnp.zeros(3))
    objective = client.register_stablehlo(blob, np.zeros(3))
    point = objective.at(np.zeros(3))
    assert close(point.gradient, np.asarray(gradient))
    assert close(dense(point), np.asarray(expected))
    assert not objective.derivative_rules().presumed


def test_arguments_that_do_not_fit_are_refused(client):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"takes float64\[3\], float64\[4,3\], and x and data are"):
        client.register_stablehlo(module(), np.ones(3), X[:2])
    with pytest.raises(hvpd.InvalidArgumentError, match=r"takes float64\[3\], float64\[4,3\], and x and data are"):
        client.register_stablehlo(module(), np.ones(3))
    with pytest.raises(hvpd.InvalidArgumentError, match="x is of dtype int64"):
        client.register_stablehlo(module(), np.arange(3), X)
    with pytest.raises(hvpd.InvalidArgumentError, match="x has no elements"):
        client.register_stablehlo(module(), {}, X)
    with pytest.raises(hvpd.InvalidArgumentError, match="precision must be one of"):
        client.register_stablehlo(module(), np.ones(3), X, precision="exact")


def test_a_client_without_jax_registers_portable_artifacts(server, tmp_path):
    module = base64.b64decode(TRUTH["logistic"]["module"])
    (tmp_path / "module").write_bytes(portable.portable(module, portable.oldest_reader("")))
    np.savez(
        tmp_path / "arrays.npz",
        x=TRUTH["logistic"]["x"],
        X=TRUTH["logistic"]["data"][0],
        y=TRUTH["logistic"]["data"][1],
    )
    code = f"""
import pathlib, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, NotInstalled())
import numpy as np
import hvpd
folder = pathlib.Path({str(tmp_path)!r})
arrays = np.load(folder / "arrays.npz")
with hvpd.connect({server.address!r}) as client:
    objective = client.register_stablehlo((folder / "module").read_bytes(), arrays["x"], arrays["X"], arrays["y"])
    print(repr(objective.value(arrays["x"])))
    try:
        client.register_stablehlo("module {{}}", arrays["x"])
    except hvpd.MissingExtraError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    value, told = run.stdout.splitlines()
    assert float(value) == pytest.approx(TRUTH["logistic"]["value"], rel=1e-12)
    assert "pip install 'hvpd[jax]'" in told


def test_the_command_line(server, tmp_path, capsys):
    from hvpd._cli import main

    (tmp_path / "f.mlir").write_text(module())
    (tmp_path / "args.py").write_text(
        f"import numpy as np\ndef arguments():\n    return np.ones(3), np.array({X.tolist()})\n"
    )
    address = ["--address", server.address]
    source = f"{tmp_path}/args.py:arguments"
    code = main.main(["register", "--stablehlo", f"{tmp_path}/f.mlir", source, "--name", "foreign/cli", *address])
    assert code == 0
    assert capsys.readouterr().out.startswith("foreign/cli ")
    assert main.main(["register", "--stablehlo", f"{tmp_path}/f.mlir", *address]) == 1
    assert main.main(["register", "--stablehlo", f"{tmp_path}/none", source, *address]) == 1
    assert main.main(["register", "--stablehlo", "a", "--exported", "b", source, *address]) == 1
