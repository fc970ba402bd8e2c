"""The vetting process admits programs that it can read and differentiate, and refuses
all others with a reason.
"""

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import pytest
from jax import lax
from jaxlib.mlir.dialects import chlo, stablehlo

import hvpd
from hvpd._registration import export as _export
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import refusals, table
from tests.support.vetting import PLAIN, artifact, made, main, parts, refused

pytestmark = pytest.mark.slow  # Real programs, compiled and run.

A = np.eye(4) + 0.1 * np.arange(16.0).reshape(4, 4)
IMAGE = np.arange(1.0, 129.0).reshape(1, 2, 8, 8)

HONEST = {
    "cholesky": (lambda a: jnp.linalg.cholesky(a @ a.T), A),
    "slogdet": (lambda a: jnp.linalg.slogdet(a)[1], A),
    "solve": (lambda a: jnp.linalg.solve(a, a[0]), A),
    "qr": (lambda a: jnp.linalg.qr(a)[0], A),
    "svd": (lambda a: jnp.linalg.svd(a, compute_uv=False), A),
    "eigh": (lambda a: jnp.linalg.eigh(a + a.T)[0], A),
    "triangular_solve": (lambda a: jax.scipy.linalg.solve_triangular(a, a[0]), A),
    "fft": (lambda a: jnp.real(jnp.fft.ifft2(jnp.fft.fft2(a) ** 2)), A),
    "sort": (lambda a: jnp.sort(a)[jnp.argsort(a[0])], A),
    "top_k": (lambda a: lax.top_k(a, 2)[0], A),
    "convolution": (lambda a: lax.conv(a, jnp.ones((3, 2, 3, 3)), (2, 2), "SAME"), IMAGE),
    "max_pool": (lambda a: lax.reduce_window(a, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"), IMAGE),
    "cumulative": (lambda a: (jnp.cumsum(a), jnp.cumprod(a), lax.cumlogsumexp(a)), A),
    "scan": (lambda a: lax.scan(lambda c, x: (c + x, c * x), a[0], a), A),
    "cond": (lambda a: lax.cond(a[0, 0] > 0, jnp.sin, jnp.cos, a), A),
    "switch": (lambda a: lax.switch(jnp.int32(a[0, 0]), [jnp.sin, jnp.cos, jnp.tan], a), A),
    "random": (lambda a: a * jax.random.normal(jax.random.key(0), a.shape), A),
    "special": (lambda a: [f(a) for f in (lax.erf, lax.erfc, lax.lgamma, lax.digamma, jnp.sinc)], A),
    "gather": (lambda a: a.at[jnp.array([0, 2])].add(a[jnp.array([1, 1])]), A),
    "segments": (lambda a: jax.ops.segment_sum(a, jnp.array([0, 1, 1, 0]), 2), A),
    "mixed": (lambda a: (a.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16)).astype(jnp.float32), A),
    "checkpoint": (lambda a: jax.checkpoint(lambda a: jnp.sin(a @ a))(a), A),
    "attention": (lambda a: jax.nn.dot_product_attention(*[a.reshape(1, 4, 2, 2)] * 3), A),
    "expm": (jax.scipy.linalg.expm, A),
}


@pytest.mark.parametrize("name", HONEST)
def test_programs_that_the_client_writes_pass(vetter, name):
    fun, x = HONEST[name]
    honest = made(lambda x: sum(jnp.sum(leaf.astype(x.dtype) ** 2) for leaf in jax.tree.leaves(fun(x))), x)
    derived = vetter.vet(parts(honest))
    assert derived.mode == "forward_over_reverse"
    assert {"value_and_grad", "hvp", "prepare", "apply"} <= set(derived.programs)


def test_the_whole_derivation_comes_back(vetter):
    """These are residuals, dense layers, and the restored rules."""

    def model(x, a):
        return jax.nn.relu(a @ x["w"] + x["b"]) @ x["v"]

    x = {"b": np.ones(4), "v": np.ones((4, 2)), "w": np.ones((3, 4))}
    loss = lambda z: jnp.mean(jnp.sum(z**2, axis=1))  # noqa: E731
    derived = vetter.vet(parts(made(hvpd.composite(model, loss, distribution="normal"), x, np.ones((5, 3)))))
    assert derived.mode == "forward_over_reverse"
    assert set(derived.programs) == {
        *("value_and_grad", "hvp", "hvp_pairs", "prepare", "apply", "kfac", "sampled_kfac"),
        *("ggn", "fisher", "empirical_fisher", "sampled_fisher"),
    }
    assert [(layer.kernel, layer.HasField("bias")) for layer in derived.dense_layers] == [(1, False), (2, True)]
    assert derived.residuals
    assert all(residual.WhichOneof("source") for residual in derived.residuals)
    assert "the mark hvpd.custom_jvp" in derived.recognised


def test_a_mode_that_jax_forbids_is_replaced(vetter):
    @jax.custom_vjp
    def cube(x):
        return x**3

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))
    cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * square(x) * g,))
    derived = vetter.vet(parts(made(lambda x: jnp.sum(cube(x)), np.ones(3))))
    assert derived.mode == "reverse_over_reverse"
    assert not {"prepare", "apply"} & set(derived.programs)
    assert not derived.residuals


def test_rows_are_those_of_the_registered_data(vetter):
    rows = made(lambda x, a: jnp.mean((a @ x) ** 2), np.ones(3), np.ones((7, 3)), any_rows=True)
    assert list(rows.bundle.row_leaves) == [0]
    assert set(vetter.vet(parts(rows)).programs) == {"value_and_grad", "hvp", "hvp_pairs"}


def test_a_harmless_program_written_by_hand_passes(vetter):
    """This shows that the refusals below have their own reasons, and not the
    packing.
    """
    text = main("%y = stablehlo.tanh %x : tensor<3xf32>")
    one, other = vetter.vet(parts(PLAIN, objective=artifact(text))), vetter.vet(parts(PLAIN, objective=text.encode()))
    assert one == other
    assert "hvp" in one.programs


# The table

LEFT_OUT = {
    "stablehlo": """
        after_all all_gather all_reduce all_to_all async_done async_start batch_norm_grad
        collective_broadcast collective_permute create_token cross-replica-sum einsum get_tuple_element infeed outfeed partition_id
        recv reduce_scatter replica_id send set_dimension_size torch_index_select tuple unary_einsum uniform_dequantize
        uniform_quantize
    """,
    "chlo": "_asin_acos_kernel constant constant_like mulhi ragged_dot scan",
}


@pytest.mark.parametrize("dialect", [stablehlo, chlo])
def test_every_operation_of_the_dialects_is_either_served_or_left_out(dialect):
    """A new operation in a new jax needs a decision."""
    name = dialect.__name__.rsplit(".", 1)[1]
    known = {
        getattr(each, "OPERATION_NAME", "").removeprefix(f"{name}.")
        for each in vars(dialect).values()
        if getattr(each, "OPERATION_NAME", "").startswith(f"{name}.")
    }
    served = {each.removeprefix(f"{name}.") for each in table.TABLE if each.startswith(f"{name}.")}
    left_out = set(LEFT_OUT[name].split())
    known = {each for each in known if each != "return" and (name == "stablehlo" or not each.startswith("broadcast_"))}
    assert not served & left_out
    assert known == served | left_out


# Refusals that name program and operation

BODIES = {
    "a callback": (
        """
        %y = stablehlo.custom_call @xla_ffi_python_cpu_callback(%x) { api_version = 4 : i32, mhlo.backend_config = {} }
            : (tensor<3xf32>) -> tensor<3xf32>
        """,
        ["stablehlo.custom_call", "xla_ffi_python_cpu_callback"],
    ),
    "a kernel": (
        """
        %y = stablehlo.custom_call @__gpu$xla.gpu.triton(%x) { backend_config = "1" } : (tensor<3xf32>) -> tensor<3xf32>
        """,
        ["stablehlo.custom_call", "__gpu$xla.gpu.triton"],
    ),
    "a name that cannot be printed": (
        r"""%y = stablehlo.custom_call @"nobody\1B[31m"(%x) : (tensor<3xf32>) -> tensor<3xf32>""",
        ["stablehlo.custom_call", "nobody"],
    ),
    "infeed": (
        """
        %token = stablehlo.after_all : !stablehlo.token
        %z:2 = "stablehlo.infeed"(%token) : (!stablehlo.token) -> (tensor<3xf32>, !stablehlo.token)
        %y = stablehlo.tanh %z#0 : tensor<3xf32>
        """,
        ["stablehlo.after_all"],
    ),
    "all_reduce": (
        """
        %y = "stablehlo.all_reduce"(%x) ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %c = stablehlo.add %a, %b : tensor<f32>
          stablehlo.return %c : tensor<f32>
        }) {replica_groups = dense<0> : tensor<1x1xi64>} : (tensor<3xf32>) -> tensor<3xf32>
        """,
        ["stablehlo.all_reduce"],
    ),
    "an attribute": (
        """%y = "stablehlo.tanh"(%x) { _xla_stream_annotation = "1" } : (tensor<3xf32>) -> tensor<3xf32>""",
        ["stablehlo.tanh", "_xla_stream_annotation"],
    ),
    "a branch": (
        """
        %c = stablehlo.constant dense<true> : tensor<i1>
        %y = "stablehlo.if"(%c) ({
          %z = func.call @other(%x) : (tensor<3xf32>) -> tensor<3xf32>
          stablehlo.return %z : tensor<3xf32>
        }, {
          stablehlo.return %x : tensor<3xf32>
        }) : (tensor<i1>) -> tensor<3xf32>
        """,
        ["stablehlo.custom_call", "backdoor"],
    ),
}
BACKDOOR = """
    func.func private @other(%x: tensor<3xf32>) -> tensor<3xf32> {
      %y = stablehlo.custom_call @backdoor(%x) : (tensor<3xf32>) -> tensor<3xf32>
      return %y : tensor<3xf32>
    }
"""


@pytest.mark.parametrize("body", BODIES)
def test_a_refusal_names_program_and_operation(vetter, body):
    text, says = BODIES[body]
    message = refused(vetter, main(text, BACKDOOR if "@other" in text else ""), refusals.OPERATION_REFUSED, *says)
    assert message.startswith("the registration is refused: objective has a ")


def test_a_refusal_of_a_composite_names_its_stage(vetter):
    def model(x, a):
        return a @ x

    composite = made(
        hvpd.composite(model, lambda z: jnp.mean(z**2)), np.ones(3, np.float32), np.ones((5, 3), np.float32)
    )
    backdoor = """
        module {{ func.func public @main(%z: tensor<{0}xf32>, %a: tensor<5x3xf32>) -> tensor<f32> {{
          %y = stablehlo.custom_call @backdoor(%z) : (tensor<{0}xf32>) -> tensor<f32>
          return %y : tensor<f32>
        }} }}
    """
    for name, size in [("loss", 5), ("model", 3)]:
        with pytest.raises(ServiceError, match=rf"refused: {name} has a stablehlo.custom_call .*backdoor") as error:
            vetter.vet(parts(composite, **{name: artifact(backdoor.format(size))}))
        assert error.value.reason == refusals.OPERATION_REFUSED


def test_an_objective_that_cannot_be_differentiated_twice_is_refused(vetter):
    loop = made(
        lambda x: jnp.sum(lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x * 2, x)), np.ones(3, np.float32)
    )
    with pytest.raises(ServiceError, match="cannot differentiate it even once") as error:
        vetter.vet(parts(loop))
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, refusals.NOT_DIFFERENTIABLE)


def test_branches_for_other_devices_only_are_refused(vetter):
    def branching(x):
        return lax.platform_dependent(x, cuda=lambda x: jnp.sum(x**2), tpu=lambda x: jnp.sum(x**3))

    other = _export.export(branching, np.ones(3), (), platforms=("cuda", "tpu"), precision="highest")
    with pytest.raises(ServiceError, match="has branches for cuda, tpu, and this server's device is cpu") as error:
        vetter.vet(parts(other), "cpu")
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, refusals.BUNDLE_INCOMPATIBLE)
    assert "hvp" in vetter.vet(parts(other), "cuda").programs
