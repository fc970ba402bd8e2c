"""Arrays of each kind: to NumPy, and results back to the caller's kind."""

import sys
from types import ModuleType, SimpleNamespace

import array_api_strict as xp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd import _arrays
from hvpd._operators.curvature import HessianOperator

N = 4
MATRIX = np.diag([1.0, 2.0, 3.0, 4.0]) + 0.5
VALUES = np.array([1.0, -2.0, 0.5, 4.0])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def H(dense_point):
    return HessianOperator(dense_point(MATRIX))


class CudaArray:
    """What CuPy's arrays and Numba's have in common, with memory of this process."""

    def __init__(self, values, device="cuda:0"):
        self.values, self.device = np.array(values), Device(device)
        self.shape, self.dtype = self.values.shape, self.values.dtype

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (0, False), "version": 3}

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


class Device(str):
    """A device, which is current inside of a `with`."""

    __slots__ = ()
    current = None

    def __enter__(self):
        Device.current = self

    def __exit__(self, *_):
        Device.current = None


class CupyArray(CudaArray):
    def get(self):
        return self.values.copy()


class NumbaArray(CudaArray):
    def copy_to_host(self):
        return self.values.copy()


NumbaArray.__module__ = "numba.cuda.cudadrv.devicearray"


@pytest.fixture
def cupy(monkeypatch):
    """A stand-in for CuPy, whose arrays are in this process."""
    module = ModuleType("cupy")
    module.ndarray = CupyArray
    module.asarray = lambda array: CupyArray(getattr(array, "values", array), Device.current or "cuda:0")
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


class Exchanged:
    """An array with DLPack only."""

    def __init__(self, values):
        self.values = np.array(values)

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


Exchanged.__module__ = "exchanging.arrays"


def torch_tensor(values):
    return pytest.importorskip("torch").from_numpy(np.array(values))


KINDS = {"jax": jnp.asarray, "array API": xp.asarray, "torch": torch_tensor, "numpy": np.asarray}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_products_come_back_in_the_callers_kind(H, make):
    v, V = make(VALUES), make(np.stack([VALUES, 2 * VALUES], axis=1))
    expected = MATRIX @ VALUES
    for call in (lambda v: H @ v, H.matvec, H.rmatvec, H.dot, lambda v: H * v, H):
        product = call(v)
        assert type(product) is type(v)
        np.testing.assert_allclose(np.asarray(product), expected)
    for call in (lambda V: H @ V, H.matmat, H.rmatmat, H.dot):
        assert type(call(V)) is type(V)
        np.testing.assert_allclose(np.asarray(call(V)), np.stack([expected, 2 * expected], axis=1))
    form = H.quadratic_form(V)
    assert type(form) is type(V)
    np.testing.assert_allclose(np.asarray(form), [VALUES @ expected, 4 * VALUES @ expected])
    assert type(H.quadratic_form(v)) is float


@pytest.mark.parametrize("make", [KINDS["jax"], KINDS["torch"], KINDS["numpy"]], ids=["jax", "torch", "numpy"])
def test_a_vector_on_the_left_comes_back_in_its_kind(H, make):
    v = make(VALUES)
    product = v @ H if type(v) is np.ndarray else H.__rmatmul__(v)
    assert type(product) is type(v)
    np.testing.assert_allclose(np.asarray(product), VALUES @ MATRIX)


def test_composition_and_scaling_stay_scipys(H):
    np.testing.assert_allclose((H @ H) @ VALUES, MATRIX @ MATRIX @ VALUES)
    np.testing.assert_allclose((H * 2) @ VALUES, 2 * MATRIX @ VALUES)
    np.testing.assert_allclose(H.dot(H).dot(VALUES), MATRIX @ MATRIX @ VALUES)
    np.testing.assert_allclose((H.T @ H.H) @ jnp.asarray(VALUES), MATRIX @ MATRIX @ VALUES)


def test_lists_are_numpys(H):
    assert type(H @ [1.0, 2.0, 3.0, 4.0]) is np.ndarray


@pytest.mark.parametrize("shape", [(3,), (N, 2, 1), (2, N)])
def test_wrong_shapes_of_any_kind_are_refused(H, shape):
    for make in KINDS.values():
        with pytest.raises(hvpd.InvalidArgumentError, match=r"multiplies vectors of shape \(4,\)"):
            H @ make(np.ones(shape))


def test_the_dtype_is_the_operators_and_for_tensors_the_callers(H):
    assert (H @ jnp.ones(N, jnp.float32)).dtype == np.float64
    assert (H @ xp.ones(N, dtype=xp.float32)).dtype == xp.float64
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        product = H @ torch.tensor(VALUES, dtype=dtype)
        assert product.dtype == dtype
        np.testing.assert_allclose(product.double(), MATRIX @ VALUES, rtol=1e-2)
    assert (H @ torch.arange(N)).dtype == torch.float64


def test_jax_without_64_bits_gets_numpys_64_bits(H):
    with jax.enable_x64(False):
        product = H @ jnp.ones(N)
    assert type(product) is np.ndarray
    assert product.dtype == np.float64
    np.testing.assert_array_equal(product, MATRIX.sum(axis=1))


def test_a_traced_vector_is_sent_to_as_jax(H):
    for call in (jax.jit(lambda v: H @ v), jax.vmap(lambda v: H @ v)):
        with pytest.raises(hvpd.InvalidArgumentError, match=r"the operand is traced by jax .* `as_jax\(\)`"):
            call(jnp.ones((N, N)))


def test_a_tensor_that_requires_grad_is_refused(H):
    torch = pytest.importorskip("torch")
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"the operand is a tensor that requires grad: pass its \.detach\(\)"
    ):
        H @ torch.ones(N, dtype=torch.float64, requires_grad=True)
    assert type(H @ torch.nn.Parameter(torch.ones(N, dtype=torch.float64)).detach()) is torch.Tensor


def test_views_of_other_libraries_are_not_copied():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(N)
    _arrays.host(tensor, "x")[0] = 7.0
    assert tensor[0] == 7.0
    exchanged = Exchanged(VALUES)
    assert np.shares_memory(_arrays.host(exchanged, "x"), exchanged.values)


def test_conjugated_negated_and_read_only_tensors_are_right():
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([1 + 2j]).conj()
    assert _arrays.host(tensor, "x")[0] == 1 - 2j
    assert _arrays.host(tensor.imag, "x")[0] == -2
    constant = VALUES.copy()
    constant.flags.writeable = False
    assert _arrays.back(constant, torch.ones(1, dtype=torch.float64)).tolist() == VALUES.tolist()


def test_jax_arrays_keep_their_device():
    device = jax.devices()[0]
    product = _arrays.back(VALUES, jax.device_put(jnp.ones(N), device))
    assert product.committed
    assert product.devices() == {device}
    assert not _arrays.back(VALUES, jnp.ones(N)).committed


def test_array_api_arrays_keep_their_device(H):
    other = xp.Device("device1")
    product = H @ xp.asarray(VALUES, device=other)
    assert product.device == other


def test_a_namespace_without_devices_is_enough():
    class Simple:
        def __array_namespace__(self):
            return SimpleNamespace(asarray=lambda array: ("simple", array))

    assert _arrays.back(VALUES, Simple())[0] == "simple"


def test_cupy_arrays_come_back_on_their_device(H, cupy):
    product = H @ CupyArray(VALUES, "cuda:1")
    assert type(product) is CupyArray
    assert product.device == "cuda:1"
    np.testing.assert_allclose(product.values, MATRIX @ VALUES)


def test_numba_arrays_come_back_as_such(H, monkeypatch):
    numba = ModuleType("numba")
    numba.cuda = SimpleNamespace(to_device=NumbaArray)
    monkeypatch.setitem(sys.modules, "numba", numba)
    product = H @ NumbaArray(VALUES)
    assert type(product) is NumbaArray
    np.testing.assert_allclose(product.values, MATRIX @ VALUES)


def test_other_gpu_arrays_need_cupy(H, cupy, monkeypatch):
    product = H @ CudaArray(VALUES)
    assert type(product) is CupyArray
    np.testing.assert_allclose(product.values, MATRIX @ VALUES)
    monkeypatch.delitem(sys.modules, "cupy")
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"the operand is a .*CudaArray on cuda:0 in a GPU's memory.*import cupy"
    ):
        H @ CudaArray(VALUES)


def test_dlpack_alone_is_enough(H, monkeypatch):
    assert type(H @ Exchanged(VALUES)) is np.ndarray
    library = ModuleType("exchanging")
    library.from_dlpack = Exchanged
    monkeypatch.setitem(sys.modules, "exchanging", library)
    product = H @ Exchanged(VALUES)
    assert type(product) is Exchanged
    np.testing.assert_allclose(product.values, MATRIX @ VALUES)


def test_memory_of_other_devices_is_copied_by_dlpack():
    class Far(Exchanged):
        """An array on a GPU, which gives copies on request."""

        def __dlpack__(self, *, dl_device=None, copy=None, **options):
            if dl_device != (1, 0):
                raise BufferError("on a GPU")
            return self.values.copy().__dlpack__(**options)

        def __dlpack_device__(self):
            return (2, 0)

    np.testing.assert_array_equal(_arrays.host(Far(VALUES), "x"), VALUES)


def test_values_that_numpy_cannot_read_are_refused():
    class Sealed:
        device = "npu:0"

        def __dlpack__(self, **_):
            raise BufferError("no export")

        def __dlpack_device__(self):
            return (12, 0)

    with pytest.raises(hvpd.InvalidArgumentError, match=r"x is a tests\.\S*Sealed on npu:0, which NumPy cannot read"):
        _arrays.host(Sealed(), "x")


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (VALUES, "numpy"),
        (np.float64(1), "numpy"),
        (1.0, "numpy"),
        ([1.0], "numpy"),
        (jnp.ones(1), "jax"),
        (xp.ones(1), "__array_namespace__"),
        (Exchanged(VALUES), "__dlpack__"),
        (CudaArray(VALUES), "__cuda_array_interface__"),
        (object(), "numpy"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_a_kind_is_found_by_library_or_protocol(array, kind):
    assert _arrays.kind_of(array).name == kind


def test_pytrees_are_no_arrays():
    assert not any(_arrays.is_array(tree) for tree in ({"a": VALUES}, [VALUES], (VALUES,), None, 1.0))
    assert all(_arrays.is_array(make(VALUES)) for make in KINDS.values())


def test_arrays_of_several_kinds_have_numpy_in_common():
    assert type(_arrays.common([jnp.ones(1), xp.ones(1)])(VALUES)) is np.ndarray
    assert type(_arrays.common([])(VALUES)) is np.ndarray
    assert isinstance(_arrays.common([jnp.ones(1), jnp.ones(2)])(VALUES), jax.Array)
