"""Programs that are made to crash, fill or delay the compiler: the neighbour gets right
products from the same process.
"""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from bench._large import program
from hvpd.v1 import tensor_pb2
from hvpd_server.tenancy import token_file

X = np.linspace(0.5, 1.5, 16)
WAIT = 120


@pytest.fixture
def attacked(serve, tmp_path):
    """Run a server with a tenant that multiplies until the test ends, and check each
    product. Yield a client of another tenant.
    """
    tokens = tmp_path / "tokens.json"
    made = {name: token_file.create(tokens, name, ["use", "publish"])[0] for name in ("evil", "neighbour")}
    server = serve("--tokens", str(tokens), store=tmp_path / "store")
    stop, served = threading.Event(), threading.Event()

    def multiply():
        with hvpd.connect(server.address, token=made["neighbour"]) as client:
            H = client.register(lambda x: jnp.sum(x**4) / 12, X, name="neighbour").at(X).hessian()
            v = np.ones(16)
            while not stop.wait(0.01):  # The compiler needs the CPU, too.
                np.testing.assert_allclose(H @ v, X**2, rtol=1e-12)
                served.set()

    errors = []

    def noting():
        try:
            multiply()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=noting)
    thread.start()
    pid = server.process.pid
    with hvpd.connect(server.address, token=made["evil"]) as client:
        assert served.wait(WAIT)
        served.clear()
        yield client
    assert served.wait(WAIT)
    stop.set()
    thread.join(WAIT)
    assert not errors
    assert (server.process.poll(), server.process.pid) == (None, pid)


def test_very_many_operations_are_read_and_compiled_beside_a_neighbour(attacked):
    """The server may refuse them after the time that they take. That is an answer,
    too.
    """
    objective = attacked.register_stablehlo(program(200), np.ones(16, np.float32))
    assert np.isfinite(objective.value(np.ones(16)))


@pytest.mark.parametrize("power", [4, 7, 12])
def test_sizes_that_grow_with_a_power_of_the_rows_are_refused(attacked, power):
    """At 30,000 rows an array has from 6 EiB to more elements than 64 bits count."""
    rows = np.ones((3, 2))

    def f(x, rows):
        wide = rows[:, 0]
        for _ in range(power - 1):
            wide = jnp.sort((wide[:, None] * rows[None, :, 0]).reshape(-1) * x[0])
        return jnp.sum(wide) + jnp.sum(x**2)

    objective = attacked.register(f, np.ones(2), rows, any_rows=True)
    assert np.isfinite(objective.at(np.ones(2)).value)
    with pytest.raises(hvpd.HvpdError) as error:
        objective.at(np.ones(2), np.ones((30_000, 2)))
    assert error.value.reason in ("COMPILE_FAILED", "DEVICE_MEMORY", "PROGRAM_TOO_LARGE", "OPERATION_REFUSED")


def test_no_size_is_an_expression():
    """Expressions such as k + 7^3000000 - 7^3000000 kept a server busy."""
    shape = tensor_pb2.ArraySpec.DESCRIPTOR.fields_by_name["shape"]
    assert shape.type == shape.TYPE_INT64


def test_a_program_that_takes_more_memory_than_the_machine_has_is_refused_before_it_runs(attacked):
    """Otherwise the kernel would grant the memory, and end the server when it is
    used.
    """

    def wide(x):
        rows = jnp.arange(2.0**22).reshape(-1, 8) * x[0]
        return jnp.sum(jnp.sin(rows @ rows.T))

    with pytest.raises(hvpd.HvpdError, match="bytes of memory beside its arguments") as error:
        attacked.register(wide, np.ones(2))
    assert error.value.reason == "DEVICE_MEMORY"


MATRIX = "%w = stablehlo.reshape %x : (tensor<16xf64>) -> tensor<4x4xf64>"
TOTAL = """%zero = stablehlo.constant dense<0.0> : tensor<f64>
    %sum = stablehlo.reduce(%y init: %zero) applies stablehlo.add across dimensions = [0] : (tensor<16xf64>, tensor<f64>) -> tensor<f64>
    return %sum : tensor<f64>"""

HARMFUL = {
    # Unwritten results of this routine showed a neighbour's vector.
    "a Schur form": (
        f"""{MATRIX}
    %r:5 = stablehlo.custom_call @lapack_dgees_ffi(%w) {{mhlo.backend_config = {{mode = 78 : ui8, sort = 78 : ui8}}}}
        : (tensor<4x4xf64>) -> (tensor<4x4xf64>, tensor<4x4xf64>, tensor<4xf64>, tensor<4xf64>, tensor<i32>)
    %y = stablehlo.reshape %r#1 : (tensor<4x4xf64>) -> tensor<16xf64>""",
        "stablehlo.custom_call",
        "lapack_dgees_ffi",
    ),
    # XLA's sort crashed, because equal keys are in no order.
    "no strict order": (
        """%y = "stablehlo.sort"(%x) ({ ^bb0(%a: tensor<f64>, %b: tensor<f64>):
        %c = stablehlo.compare GE, %a, %b : (tensor<f64>, tensor<f64>) -> tensor<i1>
        stablehlo.return %c : tensor<i1> }) {dimension = 0 : i64, is_stable = false} : (tensor<16xf64>) -> tensor<16xf64>""",
        "stablehlo.sort",
        "comparator that is not recognised",
    ),
    # XLA's compiler crashed, at each start of the server.
    "reflectors that do not fit": (
        f"""{MATRIX}
    %q = stablehlo.custom_call @lapack_dorgqr_ffi(%w, %x)
        {{mhlo.backend_config = {{}}, operand_layouts = [dense<[0, 1]> : tensor<2xindex>, dense<0> : tensor<1xindex>],
        result_layouts = [dense<[0, 1]> : tensor<2xindex>]}} : (tensor<4x4xf64>, tensor<16xf64>) -> tensor<4x4xf64>
    %y = stablehlo.reshape %q : (tensor<4x4xf64>) -> tensor<16xf64>""",
        "stablehlo.custom_call",
        "orgqr",
    ),
}
"""Bodies of programs that ended a server, or read its memory, the operation of the
refusal, and its words.
"""


def test_calls_and_regions_that_did_harm_are_refused_beside_a_neighbour(attacked):
    for body, operation, says in HARMFUL.values():
        text = f"module {{ func.func public @main(%x: tensor<16xf64>) -> tensor<f64> {{ {body}\n {TOTAL} }} }}"
        with pytest.raises(hvpd.HvpdError, match=says) as error:
            attacked.register_stablehlo(text, np.ones(16), name="harmful")
        assert error.value.reason == "OPERATION_REFUSED"
        assert operation in str(error.value)
    assert not list(attacked.objectives())
