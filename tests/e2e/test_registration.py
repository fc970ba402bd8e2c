"""Registrations that are accepted, and those that are refused. The same objective is
stored and compiled once.
"""

import collections
import functools
import math
import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from jax.experimental import checkify, io_callback

import hvpd
from tests.support.objectives import quadratic


def test_the_same_again_uploads_and_compiles_nothing(serve):
    server = serve()
    A = np.diag(np.arange(1.0, 6.0))
    with hvpd.connect(server.address) as client:
        first = client.register(quadratic, np.zeros(5), A, name="q")
        assert np.allclose(first.at(np.ones(5)).hessian() @ np.ones(5), np.arange(1.0, 6.0))
        stored, compiled = server.metric("hvpd_blobs_stored_total"), server.metric("hvpd_compile_seconds_count")
        assert stored > 0
        assert compiled > 0
        again = client.register(quadratic, np.zeros(5), A, name="q")
        assert np.allclose(again.at(np.ones(5)).hessian() @ np.ones(5), np.arange(1.0, 6.0))
    assert again.digest == first.digest
    assert server.metric("hvpd_blobs_stored_total") == stored
    assert server.metric("hvpd_compile_seconds_count") == compiled


def test_the_digest_does_not_depend_on_the_checkout_and_no_path_travels(tmp_path):
    """Two copies of a file give the same bytes, at other lines of other directories,
    with other hash seeds.
    """
    source = textwrap.dedent("""
        import jax, jax.numpy as jnp, numpy as np
        def loss(params, X):
            hidden = jax.nn.relu(X @ params["w"])
            return jnp.mean(jax.nn.logsumexp(hidden, axis=1)) + jnp.sum(params["b"] ** 4)
        def bundle():
            from hvpd._registration import export as _export
            params = {"b": np.zeros(3), "w": np.ones((4, 3))}
            return _export.export(loss, params, (np.ones((5, 4)),), platforms=("cpu", "cuda"), precision="highest")
    """)
    digests = set()
    for number in (1, 2):
        checkout = tmp_path / f"checkout-{number}"
        checkout.mkdir()
        (checkout / "model.py").write_text("# moved down\n" * 10 * number + source)
        program = (
            "import model; e = model.bundle(); print(e.digest, any(b'checkout' in bytes(b) for b in e.blobs.values()))"
        )
        environment = os.environ | {
            "PYTHONHASHSEED": str(number),
            "PYTHONPATH": os.pathsep.join([str(checkout), *sys.path]),
        }
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=checkout, env=environment, capture_output=True, text=True, check=True
        )
        digest, carries_path = done.stdout.split()
        assert carries_path == "False"
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_large_closed_over_arrays_become_tensors(client, nested):
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(400, 6)), rng.normal(size=6)

    def inner(x):
        return jnp.sum(jnp.tanh(jnp.asarray(large) @ x) ** 2) + small @ x

    fun = jax.jit(inner) if nested else inner
    objective = client.register(fun, np.zeros(6))
    bundle = objective._bundle
    assert [tuple(tensor.shape) for tensor in bundle.captured] == [(400, 6)]
    assert bundle.programs["hvp"].size_bytes < large.nbytes
    x, v = rng.normal(size=(2, 6))
    with jax.enable_x64(True):
        expected = jax.jvp(jax.grad(inner), (jnp.asarray(x),), (jnp.asarray(v),))[1]
    for _ in range(4):
        assert np.allclose(objective.at(x).hessian() @ v, expected, rtol=1e-10)


def test_float64_is_never_cut_although_x64_is_off(client):
    assert not jax.config.read("jax_enable_x64")
    x = np.array([1.0 + 1e-12, 2.0])
    objective = client.register(lambda x: jnp.sum(x**3), x)
    assert objective.dtype == np.float64
    assert objective.value(x) == pytest.approx(float(np.sum(x**3)), rel=1e-15)
    assert np.allclose(objective.hessp(x, np.ones(2)), 6 * x, rtol=1e-15)


@pytest.mark.parametrize("rows", [3, 400], ids=["baked in", "lifted"])
@pytest.mark.parametrize("jitted", [True, False])
def test_nor_are_arrays_that_were_closed_over_in_32_bits_before(client, rows, jitted):
    """jax caches an array's conversion while a traced function uses the array. Here a
    function that the user has jitted does.
    """
    A = np.random.default_rng(0).normal(size=(rows, 6))

    def fun(x):
        return jnp.sum((A @ x) ** 4) / 12 + jnp.sum(A) * 1e-3 * x[0] ** 2

    in_32_bits = jax.jit(jax.grad(fun))
    assert in_32_bits(np.ones(6, np.float32)).dtype == np.float32
    objective = client.register(jax.jit(fun) if jitted else fun, np.zeros(6))
    x, v = np.random.default_rng(1).normal(size=(2, 6))
    expected = A.T @ ((A @ x) ** 2 * (A @ v))
    expected[0] += 2e-3 * A.sum() * v[0]
    np.testing.assert_allclose(objective.hessp(x, v), expected, rtol=1e-12)
    assert in_32_bits(np.ones(6, np.float32)).dtype == np.float32


def test_data_is_taken_as_jax_takes_it(client):
    """With a float32 x and x64 off, 64-bit data is narrowed. Integers that do not fit
    are refused, not wrapped.
    """
    X, labels = np.ones((3, 2)), np.array([0, 1, 1])
    objective = client.register(
        lambda x, X, labels, scale: scale * jnp.sum((X @ x - labels) ** 2), np.zeros(2, np.float32), X, labels, 0.5
    )
    assert [tensor.dtype for tensor in objective._bundle.data] == ["float32", "int32", "float32"]
    assert np.allclose(objective.at(np.zeros(2)).hessian() @ np.eye(2), 3 * np.ones((2, 2)))
    assert np.allclose(objective.at(np.zeros(2), 2 * X, labels, 1.0).hessian() @ np.eye(2), 24 * np.ones((2, 2)))
    with pytest.raises(hvpd.InvalidArgumentError, match=r"data\[0\].*integers that int32 cannot"):
        client.register(lambda x, k: jnp.sum(x) * k[0], np.zeros(2, np.float32), np.array([2**40]))


def _kernel(x):
    return jax.ffi.ffi_call("a_kernel", jax.ShapeDtypeStruct((), x.dtype))(x)


Pair = collections.namedtuple("Pair", ["first", "second"])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["gain", "bias"], meta_fields=[])
class Custom:
    def __init__(self, gain, bias):
        self.gain, self.bias = gain, bias


def test_any_pytree_and_back(client):
    tree = {
        "b": [np.arange(3.0), (np.float64(7.0), None)],
        "a": Pair(np.ones((2, 2)), np.arange(2.0, dtype=np.float32)),
        "c": {2: np.zeros(1), 1: np.full((1, 1), 5.0)},
    }

    def fun(tree):
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(tree))

    registered = client.register(fun, tree, name="trees")
    found = client.objective("trees")
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for objective in (registered, found):
        assert np.array_equal(objective.ravel(tree), expected)
        back = objective.unravel(objective.ravel(tree))
        assert jax.tree.all(jax.tree.map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(tree)))
        assert [leaf.dtype for leaf in jax.tree.leaves(back)] == [
            np.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)
        ]
        assert back["b"][1][1] is None
        assert back["a"]._fields == Pair._fields
        assert np.allclose(objective.at(tree).gradient, 3 * expected**2)
        assert objective.at(tree).value == objective.at(expected).value


def test_containers_of_the_users_own(client):
    fun = lambda tree: jnp.sum(tree["net"].gain ** 2) + jnp.sum(tree["net"].bias ** 3)  # noqa: E731
    tree = {"net": Custom(np.ones(2), np.full(1, 2.0))}
    registered = client.register(fun, tree, name="custom")
    assert isinstance(registered.unravel(np.arange(3.0))["net"], Custom)
    found = client.objective("custom")
    assert found.unravel(np.arange(3.0))["net"].keys() == {"gain", "bias"}
    assert np.array_equal(found.ravel({"net": {"gain": np.ones(2), "bias": np.zeros(1)}}), [1.0, 1.0, 0.0])
    assert np.array_equal(found.ravel(tree), [1.0, 1.0, 2.0])


def test_half_precision_leaves_are_computed_as_they_are_and_raveled_to_float32(client):
    tree = {"h": jnp.ones(2, jnp.bfloat16), "f": np.ones(2, np.float16)}
    objective = client.register(lambda t: jnp.sum(t["h"].astype(jnp.float32) ** 2) + jnp.sum(t["f"]) ** 2, tree)
    assert objective.dtype == np.float32
    assert objective.unravel(np.ones(4))["h"].dtype == jnp.bfloat16
    assert np.allclose(
        objective.at(tree).hessian() @ np.eye(4), np.diag([0, 0, 2, 2]) + np.pad(np.full((2, 2), 2.0), (0, 2))
    )


class _Tensor:
    """A tensor of PyTorch that requires grad."""

    requires_grad = True
    shape = (4,)

    def __array__(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


NARROW = jnp.ones(40_000, jnp.int4)


def _prints(x):
    jax.debug.print("x = {}", x)
    return jnp.sum(x)


@pytest.mark.parametrize(
    ("fun", "x", "data", "says"),
    [
        (lambda x: x**2, np.ones(3), (), r"must return a scalar.*shape \(3,\)"),
        (lambda x: (jnp.sum(x), x), np.ones(3), (), "must return one scalar"),
        (lambda x: jnp.sum(x > 0), np.ones(3), (), "must return a real floating scalar.*int"),
        (lambda x: jnp.sum(x) * 1j, np.ones(3), (), "must return a real floating scalar.*complex"),
        (lambda x: jnp.sum(x.real), np.ones(3) * 1j, (), "x is of dtype complex128"),
        (lambda x: jnp.sum(x["a"]), {"a": np.ones(3, int)}, (), r"x\['a'\] is of dtype int64"),
        (lambda x: jnp.sum(x), np.ones(0), (), "no elements"),
        (lambda x, s: jnp.sum(x), np.ones(3), (np.array(["a"]),), r"data\[0\] must be an array of numbers"),
        (lambda x, k: jnp.sum(x), np.ones(3), (jax.random.key(0),), "jax.random.key_data"),
        (lambda x: jnp.sum(x) + undefined, np.ones(3), (), r"^/.*\.py:\d+, in <lambda>: NameError: name"),  # noqa: F821
        (
            lambda x: jax.lax.while_loop(lambda c: c < 5, lambda c: c * 2, jnp.sum(x)),
            np.ones(3),
            (),
            r"test_registration.py:\d+, <lambda>: .*even once: .*while_loop.*jax.custom_vjp",
        ),
        (lambda x: jax.pure_callback(np.sum, x[0], x), np.ones(3), (), "has side effects"),
        (lambda x: math.exp(x[0]), np.ones(3), (), "Use jnp in place of math"),
        (lambda x: float(x[0]), np.ones(3), (), r"remove float\(\), int\(\)"),
        (lambda x: sum(x[i] for i in range(int(x[0]))), np.ones(3), (), r"jax\.lax\.fori_loop"),
        (lambda x: jnp.sum(x[x > 0]), np.ones(3), (), r"jnp\.where\(mask, x, 0\)"),
        (lambda x, k: jnp.sum(x[:k]), np.ones(3), (2,), "functools.partial"),
        (lambda x, X, y: jnp.sum(x), np.ones(3), (), r"^<lambda>\(x, X, y\) was called with x and 0 data .*'X'"),
        (
            lambda x, X: jnp.sum(X @ x) / range(len(X)).stop,
            np.ones(3),
            (np.ones((5, 3)), "any_rows"),
            "without any_rows",
        ),
        (lambda x, k: jnp.sum(x.reshape(k)), np.ones(4), (4,), "functools.partial"),
        (lambda x, flag: jnp.sum(x) if flag else x[0], np.ones(4), (True,), "functools.partial"),
        (lambda x, s: jnp.sum(x), np.ones(4), ("mean",), r"data\[0\].*a string.*functools.partial"),
        (lambda x: jnp.sum(np.sin(x)), np.ones(4), (), "use jax.numpy"),
        (lambda x, k: jnp.sum(x) * k[0], np.ones(4), (jnp.ones(2, jnp.int4),), r"int4.*astype\(jnp.int8\)"),
        (
            lambda x: jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), x.dtype), x),
            np.ones(3),
            (),
            r"test_registration.py:\d+, in <lambda>: <lambda> has side effects \(pure_callback\).*EQX_ON_ERROR=nan",
        ),
        (
            lambda x: jax.lax.platform_dependent(x, cpu=jnp.sum, tpu=jnp.prod),
            np.ones(3),
            (),
            r"platforms=\('cpu',\)",
        ),
        (
            lambda x: jax.lax.platform_dependent(x, cpu=jnp.sum, cuda=_kernel),
            np.ones(3),
            (),
            r"outside of jax.*\('cpu',\)",
        ),
        (
            lambda x: jnp.sum(jax.custom_derivatives.linear_call(lambda r, x: x, lambda r, t: t, (), x)),
            np.ones(3),
            (),
            r"^/.*test_registration.py:\d+, in <lambda>: <lambda> cannot .*primitive linear_call.*other jax operations",
        ),
        (
            lambda x: jnp.sum(jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec())),
            np.ones(3),
            (),
            r"test_registration.py:\d+, .*NamedSharding\(mesh, spec\)",
        ),
        (
            lambda x: jnp.sum(jax.sharding.reshard(x, jax.sharding.PartitionSpec("d"))),
            np.ones(3),
            (),
            r"test_registration.py:\d+, .*NamedSharding\(mesh, spec\)",
        ),
        (
            lambda x: jnp.sum(jax.device_put(x, jax.sharding.PartitionSpec())),
            np.ones(3),
            (),
            r"test_registration.py:\d+, .*NamedSharding\(mesh, spec\)",
        ),
        (
            lambda x: jnp.sum(jax.scipy.special.exp1(x)),
            np.ones(3),
            (),
            r'rule is differentiated again.*mode="finite_difference"',
        ),
        (lambda x: jnp.sum(x) if x[0] > 0 else 0.0, np.ones(3), (), r"jnp\.where"),
        (_prints, np.ones(3), (), "_prints has side effects .*a callback, print or checkify.check.*EQX_ON_ERROR=nan"),
        (
            lambda x: io_callback(np.sum, jax.ShapeDtypeStruct((), x.dtype), x),
            np.ones(3),
            (),
            "IOEffect.*EQX_ON_ERROR=nan",
        ),
        (lambda x: [checkify.check(x[0] > 0, "sign"), jnp.sum(x)][1], np.ones(3), (), "ErrorEffect.*checkify"),
        (lambda x: jnp.sum(x), _Tensor(), (), r"x is a tensor that requires grad.*detach\(\)"),
        (lambda x, y: jnp.sum(x), np.ones(3), (_Tensor(),), r"data\[0\] is a tensor that requires grad"),
        (lambda x: jnp.sum(x["w"]), {"w": np.ones(3), "act": jax.nn.relu}, (), r"x\['act'\].*eqx.partition"),
        (lambda x, m: jnp.sum(x), np.ones(3), ([jax.nn.relu],), r"data\[0\]\[0\].*a function.*eqx.partition"),
        (lambda x: jnp.sum(x) * jnp.sum(NARROW.astype(x.dtype)), np.ones(3), (), r"int4\[40000\].*astype\(jnp.int8\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_registration_gives_the_reason(client, fun, x, data, says):
    any_rows = data[-1:] == ("any_rows",)
    with pytest.raises(hvpd.InvalidArgumentError, match=says) as caught:
        client.register(fun, x, *(data[:-1] if any_rows else data), any_rows=any_rows)
    assert "stages.py" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.register("me/x", jnp.sum, np.ones(2)), "fun must be a function, got 'me/x': register\\(fun, x"),
        (lambda c: c.register(np.ones(900), jnp.sum), r"fun must be a function, got a ndarray of shape \(900,\)"),
        (
            lambda c: c.register(jnp.sum, np.ones(2), blocks=["foo"]),
            "x is one array: it has no named leaves, such as 'foo'",
        ),
        (lambda c: c.objective(3), "a name or digest must be a string, got 3"),
        (lambda c: c.delete(None), "a name or digest must be a string, got None"),
        (lambda c: c.rename(3, "b"), "a name or digest must be a string, got 3"),
    ],
)
def test_swapped_and_foreign_arguments_are_named(client, call, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        call(client)


def test_several_platforms_as_one_string(client):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"such as platforms=\('cuda', 'cpu'\), got 'gpu,cpu'"):
        client.register(lambda x: jnp.sum(x), np.ones(2), platforms="gpu,cpu")


def test_a_mesh_around_a_registration_changes_nothing(client):
    fun = lambda x: jnp.sum(x**3)  # noqa: E731
    with jax.set_mesh(jax.make_mesh((1,), ("a",))):
        meshed = client.register(fun, np.ones(3))  # Before the other, because jax keeps what it has traced.
    assert meshed.digest == client.register(lambda x: jnp.sum(x**3), np.ones(3)).digest
    assert np.allclose(meshed.hessp(np.arange(3.0), np.ones(3)), 6 * np.arange(3.0))


def test_programs_can_tell_why_a_registration_or_data_is_refused(client):
    def reason(call, *arguments):
        with pytest.raises(hvpd.InvalidArgumentError) as error:
            call(*arguments)
        return error.value.reason

    assert reason(client.register, lambda x: jnp.sum(np.sin(x)), np.ones(3)) == "NOT_TRACEABLE"
    assert reason(client.register, _prints, np.ones(3)) == "SIDE_EFFECTS"
    calls = lambda x: jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), x.dtype), x)  # noqa: E731
    assert reason(client.register, calls, np.ones(3)) == "SIDE_EFFECTS"
    objective = client.register(lambda x, y: jnp.sum(x**2) * y.sum(), np.ones(3), np.ones(2))
    assert reason(objective.at, np.ones(3), np.ones(3)) == "DATA_MISMATCH"
    assert reason(objective.at, np.ones(3), np.ones(2), np.ones(2)) == "DATA_MISMATCH"
    assert reason(objective.at, np.ones(4)) == "SHAPE"


def test_modules_of_equinox_are_x_and_data(client):
    """docs/how-to/register.md: directly if all leaves are arrays, otherwise split."""
    eqx = pytest.importorskip("equinox")
    X = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    teacher = eqx.nn.Linear(3, "scalar", key=jax.random.key(1))
    split = eqx.nn.MLP(3, "scalar", width_size=4, depth=1, key=jax.random.key(2))
    arrays, rest = eqx.partition(split, eqx.is_inexact_array)

    def loss(module, teacher, X):
        return jnp.mean((jax.vmap(module)(X) - jax.vmap(teacher)(X)) ** 2)

    def split_loss(arrays, teacher, X):
        return loss(eqx.combine(arrays, rest), teacher, X)

    for fun, x in ((loss, teacher), (split_loss, arrays)):
        objective = client.register(fun, x, teacher, X)
        flat, unravel = jax.flatten_util.ravel_pytree(x)
        v = np.cos(np.arange(len(flat), dtype=np.float32))
        _, expected = jax.jvp(jax.grad(lambda x, fun=fun: fun(x, teacher, X)), (x,), (unravel(v),))
        expected = objective.ravel(expected)
        np.testing.assert_array_equal(objective.ravel(x), flat)
        np.testing.assert_allclose(objective.at(x).hessian() @ v, expected, atol=1e-5 * np.abs(expected).max())
        assert jax.tree.structure(objective.unravel(np.asarray(flat))) == jax.tree.structure(x)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"a function.*eqx\.partition"):
        client.register(loss, split, teacher, X)


def test_a_value_of_an_earlier_trace_is_named_as_the_cause(client):
    kept = []

    def fun(x):
        kept.append(x)
        return jnp.sum(kept[0] ** 2)

    with pytest.warns(UserWarning, match="the function changed kept"):
        client.register(fun, np.ones(3))
    with pytest.raises(hvpd.InvalidArgumentError, match="an earlier trace left behind"):
        client.register(fun, np.ones(3))


def test_without_a_name_an_objective_has_one_of_its_names(client):
    def fun(x):
        return (x**4).sum() + 0.0625 * x.sum()

    assert client.register(fun, np.ones(3)).name == ""
    client.register(fun, np.ones(3), name="without/a-name")
    assert client.register(fun, np.ones(3)).name == "without/a-name"


def test_plain_numbers_are_vectors(client):
    objective = client.register(lambda x: jnp.sum(x**3), np.ones(3))
    assert np.allclose(objective.gradient([1, 2, 3]), [3, 12, 27])
    assert np.allclose(objective.value_and_grad((1, 2, 3))[1], [3, 12, 27])
    assert np.allclose(objective.hessp([1, 2, 3], [1, 0, 1]), [6, 0, 18])
    tree = client.register(lambda x: jnp.sum(x["a"] ** 3), {"a": np.ones(2)})
    assert np.allclose(tree.hessp(np.array([1.0, 2.0]), [1, 1]), [6, 12])
    assert np.allclose(client.register(lambda x: x**3, 1.0).gradient(2.0), 12)


SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np, hvpd

mesh = jax.make_mesh((2,), ("rows",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
small, large = (jax.device_put(np.ones((rows, 3), np.float32), place) for rows in (4, 4000))
with hvpd.connect(sys.argv[1]) as client:
    for array in (small, large):
        for fun in (lambda x: jnp.sum((array @ x) ** 2), jax.jit(lambda x: jnp.sum((array @ x) ** 2))):
            print(client.register(fun, np.ones(3, np.float32)).hessp(np.ones(3), np.eye(3)[0]).tolist())
    print(client.register(lambda x: jnp.sum(x**2), small).value(small))

    @jax.custom_jvp
    def cube(x):
        return x**3

    @jax.jit
    def constrained(x):
        return jax.lax.with_sharding_constraint(x, spread)

    cube.defjvp(lambda primals, tangents: (cube(*primals), 3 * constrained(primals[0] ** 2) * tangents[0]))
    automatic = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(automatic, jax.sharding.PartitionSpec("d"))
    before = str(jax.make_jaxpr(constrained)(np.ones(4)))
    for fun in (
        lambda x: constrained(x) ** 3,
        lambda x: jax.device_put(x**3, place),
        lambda x: jax.device_put(x**3, jax.devices()[1]),
        lambda x: jax.sharding.reshard(x, place) ** 3,
        lambda x: jax.jit(lambda x: x**3, in_shardings=place, out_shardings=spread)(x),
        lambda x: jax.lax.scan(lambda c, row: (c, jax.lax.with_sharding_constraint(row, spread)), 0, x[None])[1] ** 3,
        lambda x: jax.vmap(constrained)(x.reshape(2, 2)) ** 3,
        lambda x: jax.device_put(np.ones(4), spread) * x**3,
        cube,
    ):
        objective = client.register(lambda x, fun=fun: jnp.sum(fun(x)), np.ones(4))
        print(objective.value(np.ones(4)), objective.hessp(np.ones(4), np.arange(4.0)).tolist())
    assert "sharding_constraint" in before
    assert str(jax.make_jaxpr(constrained)(np.ones(4))) == before
"""


def test_arrays_on_several_devices_may_be_closed_over_and_shardings_change_nothing(server):
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, server.address],
        check=True,
        env=os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
    )
    closed_over = [*2 * ["[8.0, 8.0, 8.0]"], *2 * ["[8000.0, 8000.0, 8000.0]"], "12.0"]
    assert done.stdout.splitlines() == [*closed_over, *9 * ["4.0 [0.0, 6.0, 12.0, 18.0]"]]


@pytest.mark.parametrize("name", ["../escape", "a//b", "/root", "a b", "ä", "x" * 201, "0" * 64, "a/../b", ".hidden"])
def test_names_that_are_none(client, name):
    with pytest.raises(hvpd.InvalidArgumentError, match="a name must have"):
        client.register(lambda x: jnp.sum(x), np.ones(2), name=name)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("platforms", ("gpu",)), ("platforms", "cpu"), ("platforms", "gpu"), ("platforms", ()), ("precision", "tf32")],
)
def test_options_that_are_none(client, argument, value):
    with pytest.raises(hvpd.InvalidArgumentError, match=argument):
        client.register(lambda x: jnp.sum(x), np.ones(2), **{argument: value})


def test_another_platform_than_the_servers(client):
    """A program without branches is the same on all platforms. A program with branches
    needs one for the server's device.
    """
    objective = client.register(lambda x: jnp.sum(x**2), np.ones(2), platforms=("tpu",))
    assert objective.platforms == ()
    assert np.allclose(objective.at(np.ones(2)).hessian() @ np.eye(2), 2 * np.eye(2))
    branches = lambda x: jax.lax.platform_dependent(x, tpu=jnp.sum, cuda=jnp.prod)  # noqa: E731
    with pytest.raises(hvpd.IncompatibleError, match=r"computes on cpu.*branches for tpu"):
        client.register(branches, np.ones(2), platforms=("tpu",))


@pytest.fixture(scope="module")
def objective(client):
    return client.register(
        lambda p, X: jnp.sum((X @ p["w"] + p["b"]) ** 2),
        {"w": np.zeros(3), "b": np.zeros(())},
        np.ones((2, 3)),
        name="bad/input",
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda o: o.at(_Tensor()), "x is a tensor that requires grad"),
        (lambda o: o.hessp(np.ones(4), _Tensor()), "p is a tensor that requires grad"),
        (lambda o: o.at(np.ones(4)).hessian() @ _Tensor(), "the operand is a tensor that requires grad"),
        (lambda o: o.at(np.ones(4)).hessian().matvec(_Tensor()), "the operand is a tensor that requires grad"),
        (lambda o: o.at(np.ones(5)), r"x must be a vector of shape \(4,\).*got shape \(5,\)"),
        (lambda o: o.at(np.ones(4) * 1j), "real elements, got dtype complex128"),
        (
            lambda o: o.at(np.ones(4), scipy.sparse.csr_array(np.ones((2, 3)))),
            r"data\[0\].*a scipy.sparse csr_array.*registered with a dense array.*toarray\(\)",
        ),
        (lambda o: o.at({"w": np.ones(3)}), r"must be a dict with the keys \{b, w\}, got a dict with the keys \{w\}"),
        (lambda o: o.at([np.ones(3), 1.0]), "got a list of 2"),
        (lambda o: o.at({"w": np.ones(4), "b": 0.0}), r"x\['w'\] must have the shape \(3,\)"),
        (lambda o: o.at({"w": [1.0, 2.0, 3.0], "b": 0.0}), r"\['w'\] must be an array, got a list"),
        (lambda o: o.value(None), "got None"),
        (lambda o: o.hessp(np.ones(4), np.ones(3)), r"p must be a vector of shape \(4,\), got shape \(3,\)"),
        (lambda o: o.hessp(np.ones(4), np.ones(4) * 1j), "complex128"),
        (lambda o: o.at(np.ones(4), np.ones((2, 3)), 1.0), "takes 1 data arguments after x, got 2"),
        (
            lambda o: o.at(np.ones(4), np.ones((3, 3))),
            r"data\[0\] must be float64\[2, 3\] as registered, got float64\[3, 3\]: .*any_rows=True",
        ),
        (lambda o: o.at(np.ones(4), np.ones((2, 3)) * 1j), r"data\[0\].*complex128"),
        (
            lambda o: o.at(np.ones(4), [np.ones((2, 3))]),
            r"data\[0\] must be an array, got a list of 1: pass numpy.asarray",
        ),
        (lambda o: o.at([0.0] * 4), "flat vector must be an array"),
        (lambda o: o.hessp(np.ones(4), {"w": np.ones(3)}), "^p has another structure.*: p must be a dict"),
        (lambda o: o.hessp(np.ones(4), {"w": np.ones(4), "b": 0.0}), r"^p\['w'\] must have the shape"),
        (lambda o: o.at(np.ones(4)).moved(1.0, {"w": 0}), "^the direction has another structure"),
        (lambda o: o.at(np.ones(4)).moved(1.0, [0.0] * 4), "^the direction has .*flat vector must be an array"),
        (lambda o: o.at(np.ones(4)).moved(np.ones(4), 1.0), r"alpha must be .*got a ndarray of shape \(4,\)$"),
        (
            lambda o: o.at(np.ones(4)).hessian() @ {"w": 1, "b": 2},
            r"got a dict with the keys \{b, w\}: objective.ravel",
        ),
        (lambda o: o.at(np.ones(4)).hessian().solve({"w": 1}), r"b must be an array, got a dict"),
        (lambda o: o.at(np.ones(4)).hessian().quadratic_form({"w": 1}), r"V must be an array, got a dict"),
        (lambda o: o.at(np.ones(4)).hessian().eigsh(1, v0={"w": 1}), r"v0 must be an array, got a dict"),
        (lambda o: o.at(np.ones(4)).hessian() @ (np.ones(4) * 1j), "real vectors, got dtype complex128.*imaginary"),
        (lambda o: o.at(np.ones(4)).hessian() @ np.ones((4, 2, 2)), r"of shape \(4, 4\) multiplies .*got \(4, 2, 2\)$"),
        (lambda o: o.at(np.ones(4)).multiply(np.ones((2, 5))), r"a block must be float64\[k, 4\]"),
        (lambda o: o.at(np.ones(4)).multiply([1.0] * 4), r"a block must be float64\[k, 4\], got float64\[4\]"),
        (lambda o: o.unravel(np.ones(3)), r"^the argument of unravel must be a vector of shape \(4,\)"),
        (lambda o: o.ravel({"w": np.ones(3), "b": "text"}), r"x\['b'\] must have real elements"),
    ],
)
def test_wrong_arguments_of_any_call(objective, call, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        call(objective)


def test_empty_blocks_and_integer_vectors_are_fine(objective):
    H = objective.at(np.zeros(4)).hessian()
    assert (H @ np.ones((4, 0))).shape == (4, 0)
    assert np.array_equal(H @ np.eye(4, dtype=int), H @ np.eye(4))


def test_unknown_names_and_digests_suggest_near_ones(client, objective):
    with pytest.raises(hvpd.NotFoundError, match="'bad/imput'; did you mean 'bad/input'"):
        client.objective("bad/imput")
    with pytest.raises(hvpd.NotFoundError, match="no objective of digest"):
        client.objective("0" * 64)
    assert client.objective(objective.digest).digest == objective.digest


def test_a_name_moves_to_the_last_registration(client):
    first = client.register(lambda x: jnp.sum(x**2), np.ones(2), name="moving")
    second = client.register(lambda x: jnp.sum(x**4), np.ones(2), name="moving")
    assert client.objective("moving").digest == second.digest != first.digest
    assert first.value(np.full(2, 2.0)) == 8.0
    assert {listing.digest for listing in client.objectives()} >= {first.digest, second.digest}


def test_two_clients_register_the_same_at_once(serve):
    server = serve()
    barrier = threading.Barrier(2, timeout=60)
    A = np.random.default_rng(0).normal(size=(400, 400))
    digests, errors = [], []

    def register():
        try:
            with hvpd.connect(server.address) as client:
                barrier.wait()
                objective = client.register(quadratic, np.zeros(400), A, name="twice")
                product = objective.at(np.zeros(400)).hessian() @ np.ones(400)
                assert np.allclose(product, (A + A.T) @ np.ones(400) / 2)
                digests.append(objective.digest)
        except BaseException as error:  # noqa: BLE001 - the assertion below shows it
            errors.append(error)

    threads = [threading.Thread(target=register) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert len(digests) == 2
    assert len(set(digests)) == 1


def test_a_digest_can_be_shortened_where_it_is_the_only_one(client):
    digest = client.register(lambda x: jnp.sum(x**6), np.ones(2)).digest
    assert client.objective(digest[:12]).digest == digest
    with pytest.raises(hvpd.NotFoundError):
        client.objective(digest[:7])


def test_byte_order_and_shape_of_arguments_do_not_matter(client):
    x = np.arange(1.0, 4.0)
    objective = client.register(lambda x, s: s * jnp.sum(x**4) / 12, x.astype(">f8"), np.array(2.0, ">f8"))
    assert np.array_equal(objective.hessp(x.astype(">f8"), np.ones(3, ">f4")), 2 * x**2)
    assert np.array_equal(objective.at(x).hessian() @ jnp.ones(3, jnp.bfloat16), 2 * x**2)
    single = client.register(lambda x: x[0] ** 3, np.ones(1))
    assert single.value(2.0) == 8.0
    assert single.hessp(2.0, 1.0) == 12.0


def test_captured_arrays_have_the_dtype_that_the_function_sees(client):
    large = np.linspace(0, 1, 5000)  # float64, in a function of float32 with x64 off
    objective = client.register(
        lambda x: jnp.sum(jnp.asarray(large)[:3] * x**2) + jnp.sum(large) * x[0], np.ones(3, np.float32)
    )
    assert [tensor.dtype for tensor in objective._bundle.captured] == ["float32"]
    assert np.allclose(objective.hessp(np.ones(3), np.ones(3)), 2 * large[:3], rtol=1e-5)


def test_implicit_differentiation_inside_of_the_loss(client):
    """A custom_vjp made in the loss closes over the loss's data, as jax.grad allows."""

    def loss(x, A):
        @jax.custom_vjp
        def solve(b):
            return jnp.linalg.solve(A, b)

        def backward(_, slope):
            return (jnp.linalg.solve(A.T, slope),)

        solve.defvjp(lambda b: (solve(b), None), backward)
        return jnp.sum(solve(x) ** 4)

    A = np.eye(4) + 0.1 * np.arange(16).reshape(4, 4)
    x, v = np.random.default_rng(0).normal(size=(2, 4))
    with pytest.warns(UserWarning, match="reverse_over_reverse"):
        objective = client.register(loss, x, A)
    inverse = np.linalg.inv(A)
    y = inverse @ x
    np.testing.assert_allclose(objective.gradient(x), 4 * inverse.T @ y**3, rtol=1e-9)
    np.testing.assert_allclose(objective.hessp(x, v), 12 * inverse.T @ (y**2 * (inverse @ v)), rtol=1e-9)


def test_scipy_passes_other_data_as_args(client):
    rng = np.random.default_rng(0)
    X, other = rng.normal(size=(2, 6, 3))
    y = rng.normal(size=6)
    objective = client.register(lambda x, X, y: jnp.sum((X @ x - y) ** 2), np.zeros(3), X, y)
    found = scipy.optimize.minimize(
        objective.value_and_grad, np.zeros(3), args=(other, y), jac=True, hessp=objective.hessp, method="trust-ncg"
    )
    np.testing.assert_allclose(found.x, np.linalg.lstsq(other, y)[0], rtol=1e-6)
    x, p = rng.normal(size=(2, 3))
    assert objective.value(x, other, y) == pytest.approx(np.sum((other @ x - y) ** 2))
    np.testing.assert_allclose(objective.gradient(x, other, y), 2 * other.T @ (other @ x - y), rtol=1e-9)
    np.testing.assert_allclose(objective.hessp(x, p, other, y), 2 * other.T @ other @ p, rtol=1e-9)
    assert objective.at(x, other, y) is objective.at(x, other.copy(), y)
    assert objective.at(x, other, y) is not objective.at(x)
    np.testing.assert_allclose(objective.hessp(x, p), 2 * X.T @ X @ p, rtol=1e-9)


def test_integers_are_a_point(client):
    objective = client.register(lambda x: jnp.sum(x**4), np.ones(3))
    assert objective.at([1, 2, 3]).value == objective.at(np.array([1, 2, 3])).value == 98.0
    with pytest.raises(hvpd.InvalidArgumentError, match=r"x must be .*got a dict with the keys \{w\}"):
        objective.at({"w": np.ones(3)})


@pytest.mark.parametrize("address", ["localhost", "localhost:", "gpu-box.example"])
def test_an_address_without_a_port(address):
    with pytest.raises(hvpd.InvalidArgumentError, match=f"such as {address.rstrip(':')}:7070, got"):
        hvpd.connect(address)


def _product(x):
    return x @ np.ones(7)


def test_an_error_names_the_users_own_line(client):
    line = _product.__code__.co_firstlineno + 1
    with pytest.raises(hvpd.InvalidArgumentError, match=rf"^/.*test_registration.py:{line}, in _product: "):
        client.register(lambda x: _product(x), np.ones(3))
