"""The compiled programs of a bundle give mathematically right results, and this server
refuses other programs.

Truth is `jax.hessian` of the user's own function, in float64, and SciPy's closed forms.
No gRPC, no engine.
"""

import concurrent.futures
import gc
import threading
import time
import traceback
from unittest import mock

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from hvpd.v1 import objective_pb2
from hvpd_server.admission.vetting_process import derive
from hvpd_server.derivation.compiling import Target
from hvpd_server.device import device as device_module
from hvpd_server.device.device import host
from hvpd_server.device.executables import Built, InProcess
from hvpd_server.device.programs import Programs
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer.refusals import Limits
from hvpd_server.importer.table import Refused
from hvpd_server.liveness import LOST

pytestmark = pytest.mark.slow  # Real programs, compiled and run.

WAIT = 60

WIDTHS = range(1, 10)


@pytest.fixture(scope="module")
def compiler():
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def programs_of(device, compiler):
    def programs_of(export, *, bundle=None, blobs=None, on_compile=lambda seconds, outcome: None):
        """Return the programs of a bundle, or of a changed one. `blobs` replaces
        programs by their names.
        """
        replaced = {export.bundle.programs[name].digest: content for name, content in (blobs or {}).items()}
        contents = {**export.blobs, **replaced}
        bundle = bundle or export.bundle
        parts = {name: bytes(contents[program.digest]) for name, program in bundle.programs.items()}
        described = derive({"bundle": bundle.SerializeToString(), **parts}, device.platform, Limits())
        build = InProcess(bundle, described, device.parts, lambda digest: bytes(contents[digest]))
        return Programs(described, device, build, compiler, on_compile)

    return programs_of


@pytest.fixture
def kernels_of(programs_of):
    return lambda *args, **options: programs_of(*args, **options).for_rows(0)


def block(example, width):
    return np.random.default_rng(width).standard_normal((width, example.x.size)).astype(example.x.dtype)


def residuals(programs, prepared, arguments):
    """Return the residuals that `apply` takes, from the places that the derivation
    states.
    """
    return [
        prepared[each.result] if each.WhichOneof("source") == "result" else arguments[each.argument]
        for each in programs.described.residuals
    ]


# Against the truth


def test_value_and_gradient(objective_example, kernels_of):
    example = objective_example
    value, gradient = kernels_of(example.export).call("value_and_grad", 0, example.x, *example.data)
    rtol = {"float64": 1e-12, "float32": 1e-5}[example.x.dtype.name]
    np.testing.assert_allclose(value, example.value, rtol=rtol)
    np.testing.assert_allclose(gradient, example.gradient, rtol=rtol, atol=rtol * np.abs(example.gradient).max())
    assert gradient.dtype == example.x.dtype


@pytest.mark.parametrize("width", WIDTHS)
def test_hvp_of_every_width(objective_example, kernels_of, assert_product, width):
    example, V = objective_example, block(objective_example, width)
    products = kernels_of(example.export).call("hvp", width, example.x, V, *example.data)
    assert_product(host(products), example.hessian, V)


@pytest.mark.parametrize("width", WIDTHS)
def test_prepare_and_apply_of_every_width(objective_example, programs_of, assert_product, width):
    example, V = objective_example, block(objective_example, width)
    programs = programs_of(example.export)
    kernels = programs.for_rows(0)
    value, gradient, *prepared = kernels.call("prepare", 0, example.x, *example.data)
    products = kernels.call("apply", width, V, *residuals(programs, prepared, [example.x, *example.data]))
    assert_product(host(products), example.hessian, V)
    direct = kernels.call("value_and_grad", 0, example.x, *example.data)
    np.testing.assert_allclose(value, direct[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, direct[1], rtol=1e-5, atol=1e-6)


def test_residuals_that_are_arguments_are_not_made_again(logistic, programs_of):
    """The feature matrix is most of `apply`'s input, and is on the device already."""
    sources = {each.WhichOneof("source") for each in programs_of(logistic.export).described.residuals}
    assert sources == {"result", "argument"}


def test_rosenbrock_against_closed_forms(rosen, kernels_of):
    kernels = kernels_of(rosen.export)
    value, gradient = kernels.call("value_and_grad", 0, rosen.x)
    np.testing.assert_allclose(value, scipy.optimize.rosen(rosen.x), rtol=1e-12)
    np.testing.assert_allclose(gradient, scipy.optimize.rosen_der(rosen.x), rtol=1e-10)
    V = block(rosen, 3)
    expected = [scipy.optimize.rosen_hess_prod(rosen.x, v) for v in V]
    np.testing.assert_allclose(kernels.call("hvp", 3, rosen.x, V), expected, rtol=1e-10)


def test_a_quadratic_form_has_its_matrix_as_hessian(make_example, kernels_of):
    rng = np.random.default_rng(3)
    A = rng.standard_normal((40, 90))
    Q = (A.T @ A).astype(np.float64)
    example = make_example(lambda x: x @ (Q @ x) / 2, rng.standard_normal(90))
    assert [list(tensor.shape) for tensor in example.bundle.captured] == [[90, 90]]
    V = block(example, 2)
    np.testing.assert_allclose(kernels_of(example.export).call("hvp", 2, example.x, V, Q), V @ Q, rtol=1e-10, atol=1e-8)


# Compiling


def test_a_program_is_compiled_once_for_a_width_however_many_ask(rosen, kernels_of, start):
    seconds = []
    kernels = kernels_of(rosen.export, on_compile=lambda took, outcome: seconds.append(took))
    together = threading.Barrier(8)

    def ask():
        together.wait(WAIT)
        return kernels.request("hvp", 2)

    requested = [future.result(WAIT) for future in [start(ask) for _ in range(8)]]
    assert all(each is requested[0] for each in requested)
    requested[0].result(WAIT)
    assert len(seconds) == 1
    assert seconds[0] > 0


def test_programs_are_ready_width_by_width(rosen, kernels_of):
    kernels = kernels_of(rosen.export)
    assert kernels.widths("hvp") == []
    assert not kernels.ready("hvp", 4)
    for name, width in [("hvp", 4), ("hvp", 1), ("apply", 2), ("prepare", 0)]:
        kernels.request(name, width).result(WAIT)
    assert kernels.widths("hvp") == [1, 4]
    assert kernels.widths("apply") == [2]
    assert kernels.ready("prepare")
    assert not kernels.ready("value_and_grad")
    assert not kernels.ready("hvp", 2)


def test_a_program_that_the_compiler_refuses_is_an_answer_and_asked_again_later(rosen, kernels_of, monkeypatch):
    """Each try takes a compiler's time, so there is one a minute."""
    tried, compile_ = [], Target.compile

    def refuse(device, function, specs, **settings):
        if len(specs) == 2:
            raise RuntimeError("XLA does not know this")
        return compile_(device, function, specs, **settings)

    monkeypatch.setattr(Target, "compile", refuse)
    kernels = kernels_of(rosen.export, on_compile=lambda _, outcome: tried.append(outcome))
    minutes_later = time.perf_counter() + 300
    for tries in (*[1] * 10, 2):
        if tries == 2:
            monkeypatch.setattr(time, "perf_counter", lambda: minutes_later)
        with pytest.raises(ServiceError, match=r"cannot compile hvp \(width 2\)") as refused:
            kernels.request("hvp", 2).result(WAIT)
        assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "COMPILE_FAILED")
        assert tried == ["failed"] * tries
        assert (
            len(traceback.extract_tb(refused.value.__traceback__)) < 10
        )  # It does not keep the frames of earlier callers.
    (told,) = kernels.compiles()
    assert (told.state, told.width) == (objective_pb2.Compile.STATE_FAILED, 2)
    assert "cannot compile hvp" in told.error
    assert not kernels.ready("hvp", 2)
    assert kernels.widths("hvp") == []
    kernels.call("value_and_grad", 0, rosen.x)


def test_a_compile_without_memory_is_tried_again_at_once(rosen, kernels_of, monkeypatch):
    """Caches may have been evicted meanwhile."""
    kernels, compile_ = kernels_of(rosen.export), Target.compile

    def out_of_memory(*args, **settings):
        monkeypatch.setattr(Target, "compile", compile_)
        raise ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "no memory")

    monkeypatch.setattr(Target, "compile", out_of_memory)
    with pytest.raises(ServiceError, match="no memory"):
        kernels.request("hvp", 1).result(WAIT)
    kernels.request("hvp", 1).result(WAIT)


@pytest.mark.parametrize(("platform", "bucket", "asked"), [("cuda", 4, True), ("cuda", 0, False), ("cpu", 4, False)])
def test_a_fixed_bucket_has_a_gpu_add_in_the_same_order(rosen, programs_of, monkeypatch, platform, bucket, asked):
    """XLA knows the options on every platform."""
    options, compile_ = [], jax.stages.Lowered.compile

    def noting(lowered, compiler_options=None, **settings):
        options.append(compiler_options)
        return compile_(lowered, compiler_options, **settings)

    monkeypatch.setattr(jax.stages.Lowered, "compile", noting)
    programs = programs_of(rosen.export, bundle=changed(rosen.export.bundle, fixed_bucket=bucket))
    monkeypatch.setattr(programs._build._target, "platform", platform)
    programs.for_rows(0).request("hvp", 4).result(WAIT)
    found = options[-1] or {}
    assert (found.get("xla_gpu_deterministic_ops"), found.get("xla_gpu_exclude_nondeterministic_ops")) == (
        (True, True) if asked else (None, None)
    )


class Failing:
    """An accelerator after an error that makes all later calls fail."""

    platform = "gpu"


def test_a_device_that_failed_for_good_ends_the_process(rosen, kernels_of, monkeypatch):
    """The supervisor then starts another server, which may get the device again. Other
    runtime errors fail one product only.
    """
    kernels, ended = kernels_of(rosen.export), []
    error = jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    def fail(*args):
        raise error

    monkeypatch.setattr(device_module.os, "_exit", ended.append)
    monkeypatch.setitem(kernels._ready, ("value_and_grad", 0), fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        kernels.call("value_and_grad", 0, rosen.x)
    monkeypatch.setattr(jax, "local_devices", lambda: [Failing()])
    monkeypatch.setattr(jax, "device_put", lambda array, device: array)
    with pytest.raises(jax.errors.JaxRuntimeError):
        kernels.call("value_and_grad", 0, rosen.x)
    assert ended == []
    monkeypatch.setattr(jax, "device_put", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        kernels.call("value_and_grad", 0, rosen.x)
    assert ended == [LOST]


@pytest.mark.parametrize(
    ("says", "expected"),
    [("random_device::random_device(const std::string&): device not available", ServiceError), ("else", ValueError)],
)
def test_a_computation_without_descriptors_asks_the_caller_to_retry(
    export, rosen, kernels_of, monkeypatch, says, expected
):
    """The text is libstdc++'s, in a thread's first computation."""
    kernels = kernels_of(rosen.export)
    kernels.request("value_and_grad").result()

    def fails(*args):
        raise ValueError(says)

    monkeypatch.setitem(kernels._ready, ("value_and_grad", 0), fails)
    with pytest.raises(expected) as error:
        kernels.call("value_and_grad", 0, rosen.x)
    if expected is ServiceError:
        assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "DESCRIPTORS")
        assert error.value.retry_after > 0


def test_a_device_out_of_memory_is_an_answer_and_the_next_call_works(export, rosen, kernels_of):
    """The allocator itself refuses 128 TiB."""

    def wide(x):
        rows = jnp.arange(2.0**25).reshape(-1, 8) * x[0]
        return jnp.sum(jnp.sin(rows @ rows.T))

    kernels = kernels_of(export(wide, np.ones(3)))
    with pytest.raises(ServiceError, match="the device is out of memory") as refused:
        # The call itself may return before it is known.
        host(kernels.call("value_and_grad", 0, np.ones(3))[0])
    assert (refused.value.code, refused.value.reason) == (Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY")
    kernels_of(rosen.export).call("value_and_grad", 0, rosen.x)


def test_a_program_takes_vectors_of_one_width(logistic, kernels_of):
    kernels = kernels_of(logistic.export)
    compiled = kernels.request("hvp", 3).result(WAIT)
    assert [tuple(aval.shape) for aval in compiled.in_avals[0]] == [(6,), (3, 6), (30, 6), (30,)]
    assert compiled.out_info.shape == (3, 6)


def test_a_principal_block_is_a_program_of_its_own(export, kernels_of):
    x = {"a": np.arange(3.0), "b": np.arange(2.0) + 1, "c": np.ones(())}
    fun = lambda x: jnp.sum(x["a"] ** 3) * x["c"] + jnp.prod(x["b"]) * x["a"][0]  # noqa: E731
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(x)
        hessian = np.asarray(jax.hessian(lambda flat: fun(unravel(flat)))(flat))
    V = np.random.default_rng(0).standard_normal((2, 4))
    product = kernels_of(export(fun, x)).call("hvp[0,2]", 2, np.asarray(flat), V)
    kept = [0, 1, 2, 5]
    np.testing.assert_allclose(product, V @ hessian[np.ix_(kept, kept)], rtol=1e-12)


# Programs that this server refuses


def changed(bundle, **fields):
    copy = objective_pb2.Bundle.FromString(bundle.SerializeToString())
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


@pytest.fixture
def branching():
    def fun(x):
        return jax.lax.platform_dependent(
            x, cpu=lambda x: jnp.sum(x**2), cuda=lambda x: 2 * jnp.sum(x**2), tpu=lambda x: 3 * jnp.sum(x**2)
        )

    return fun


def test_branches_for_other_platforms_only_are_refused(export, kernels_of, branching):
    cuda = export(branching, np.ones(3), platforms=("cuda", "tpu"))
    with pytest.raises(Refused, match=r"has branches for cuda, tpu, .* device is cpu: register with") as refused:
        kernels_of(cuda)
    assert refused.value.reason in ("BUNDLE_INCOMPATIBLE", "BUNDLE_INVALID")


@pytest.mark.parametrize("platforms", [("cpu", "cuda"), ("tpu", "cuda", "cpu"), ("cpu",)])
def test_the_branch_of_the_device_is_taken(export, kernels_of, branching, platforms):
    made = export(branching, np.ones(3), platforms=platforms)
    assert list(made.bundle.platforms) == list(platforms)
    products = kernels_of(made).call("hvp", 1, np.array([1.0, 2.0, 3.0]), np.ones((1, 3)))
    np.testing.assert_allclose(products, [[2.0, 2.0, 2.0]], rtol=1e-12)


def test_a_program_without_branches_is_for_every_platform(export):
    both, one = (export(lambda x: jnp.sum(x**3), np.ones(3), platforms=p) for p in [("cpu", "cuda"), ("tpu",)])
    assert both.digest == one.digest
    assert not both.bundle.platforms


def test_kernels_for_a_number_of_rows_live_while_they_are_referenced(rosen, programs_of):
    programs = programs_of(rosen.export)
    held = programs.for_rows(0)
    assert programs.for_rows(0) is held
    held.request("value_and_grad").result(WAIT)
    del held
    gc.collect()
    assert not programs.for_rows(0).ready("value_and_grad")


def test_compiles_are_told_in_the_order_in_which_they_were_asked_for(rosen, kernels_of):
    kernels = kernels_of(rosen.export)
    for name, width in [("value_and_grad", 0), ("hvp", 4), ("hvp", 1)]:
        kernels.request(name, width)
    concurrent.futures.wait([kernels.request("hvp", 1), kernels.request("hvp", 4), kernels.request("value_and_grad")])
    compiles = kernels.compiles()
    assert [(compile_.program, compile_.width) for compile_ in compiles] == [
        ("value_and_grad", 0),
        ("hvp", 4),
        ("hvp", 1),
    ]
    assert {compile_.state for compile_ in compiles} == {objective_pb2.Compile.STATE_READY}
    assert all(compile_.seconds > 0 for compile_ in compiles)


def test_a_compile_says_while_it_waits_and_while_it_runs(device):
    running, finish = threading.Event(), threading.Event()

    def compile_(rows, name, width):
        running.set()
        assert finish.wait(WAIT)
        return Built(None, "compiled", 0)

    with concurrent.futures.ThreadPoolExecutor(1) as alone:
        described = objective_pb2.Derivation(mode="forward_over_reverse")
        kernels = Programs(described, device, compile_, alone).for_rows(0)
        kernels.request("hvp", 1)
        kernels.request("hvp", 2)
        assert running.wait(WAIT)
        states = [compile_.state for compile_ in kernels.compiles()]
        finish.set()
    assert states == [objective_pb2.Compile.STATE_COMPILING, objective_pb2.Compile.STATE_QUEUED]


def _flipped(blob):
    return bytes(255 - byte for byte in blob)


JUNK = {
    "nothing": lambda blob: b"",
    "zeros": lambda blob: bytes(len(blob)),
    "half": lambda blob: blob[: len(blob) // 2],
    "the end": lambda blob: blob[len(blob) // 2 :],
    "flipped": _flipped,
    "text": lambda blob: b"not a program",
}


@pytest.mark.parametrize("junk", JUNK)
def test_bytes_that_are_no_program_are_refused(rosen, kernels_of, junk):
    content = JUNK[junk](rosen.read(rosen.bundle.programs["objective"].digest))
    with pytest.raises(Refused, match="objective ") as refused:
        kernels_of(rosen.export, blobs={"objective": content})
    assert refused.value.reason in ("BUNDLE_INCOMPATIBLE", "BUNDLE_INVALID")


def test_a_compile_that_cannot_begin_is_asked_again(rosen, programs_of, monkeypatch, compiler):
    programs = programs_of(rosen.export)
    kernels = programs.for_rows(0)
    with monkeypatch.context() as patched:
        patched.setattr(compiler, "submit", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="thread"):
            kernels.request("value_and_grad")
    kernels.request("value_and_grad").result(WAIT)
