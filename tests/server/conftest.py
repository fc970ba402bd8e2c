"""Fixtures of the server's tests: threads that are always joined, the CPU as a device,
and objectives with known Hessians.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._registration import export as _export
from hvpd._wire import codec
from hvpd_server.admission import spawn
from hvpd_server.admission.vetting import Vetter
from hvpd_server.device.device import devices
from hvpd_server.engine.engine import Engine
from hvpd_server.store.store import Store
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.tenancy.limits import Limits
from tests.support.clock import Clock
from tests.support.zygote import vetters_by_fork


@pytest.fixture
def start():
    """Yield a function that runs a call in a thread of its own, and returns a future.
    All threads must have ended when the test ends.
    """
    threads = []

    def start(function, *args, **kwargs):
        future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the future raises it
                future.set_exception(error)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return future

    yield start
    deadline = time.monotonic() + 10
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    assert not [thread for thread in threads if thread.is_alive()]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "store")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def upload():
    """Store a blob, chunk by chunk; return its digest."""

    def upload(store, content, *, chunk_bytes=codec.CHUNK_BYTES):
        digest = codec.digest(content)
        with store.upload(digest, len(memoryview(content).cast("B"))) as uploading:
            offset = 0
            for chunk in codec.chunks(content, chunk_bytes):
                uploading.append(offset, chunk)
                offset += len(chunk)
            uploading.commit()
        return digest

    return upload


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Yield the cache of compiled programs. It is one for all engines, because most
    tests use the same few programs, and because jax opens no second one.
    """
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def device(cache):
    """Yield the CPU as a device. It sets jax's options for the whole process. They are
    reset at the end, so that modules run in any order.
    """
    options = (
        "jax_enable_x64",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_cpu_enable_async_dispatch",
    )
    before = {option: jax.config.values[option] for option in options}
    yield devices(cache)[0]
    for option, value in before.items():
        jax.config.update(option, value)


@dataclasses.dataclass(frozen=True)
class Example:
    """An objective, the point to look at, and jax's own results there without hvpd."""

    fun: Callable[..., Any]
    x: np.ndarray
    data: tuple[np.ndarray, ...]
    export: _export.Export
    value: float
    gradient: np.ndarray
    hessian: np.ndarray

    @property
    def bundle(self):
        return self.export.bundle

    def read(self, digest):
        return bytes(self.export.blobs[digest])


def export(fun: Callable[..., Any], x: Any, *data: Any, platforms: Sequence[str] = ("cpu",)) -> _export.Export:
    return _export.export(fun, x, data, platforms=platforms, precision="highest")


def example(fun: Callable[..., Any], x: np.ndarray, *data: np.ndarray) -> Example:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        value, gradient = jax.jit(jax.value_and_grad(fun))(x, *data)
        hessian = jax.jit(jax.hessian(fun))(x, *data)
    return Example(fun, x, data, export(fun, x, *data), float(value), np.asarray(gradient), np.asarray(hessian))


def _rosen(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def _logistic(x, features, labels):
    return jnp.mean(jnp.logaddexp(0.0, -labels * (features @ x))) + 0.05 * jnp.sum(x**2)


def _logistic_example(dtype):
    rng = np.random.default_rng(1)
    features, x = rng.standard_normal((30, 6)).astype(dtype), rng.standard_normal(6).astype(dtype)
    return example(_logistic, x, features, np.sign(features[:, 0]))


@pytest.fixture(scope="session")
def rosen():
    """Return Rosenbrock's function, whose derivatives SciPy has in closed form."""
    return example(_rosen, np.random.default_rng(0).uniform(-1.5, 1.5, 7))


@pytest.fixture(scope="session")
def logistic():
    """Return a logistic regression with data, in float64."""
    return _logistic_example(np.float64)


@pytest.fixture(scope="session")
def logistic32():
    """Return a logistic regression with data, in float32."""
    return _logistic_example(np.float32)


@pytest.fixture(params=["rosen", "logistic", "logistic32"])
def objective_example(request):
    """Return each example in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", name="export")
def export_fixture():
    """Return a function that exports objectives which only one test needs."""
    return export


@pytest.fixture(scope="session")
def make_example():
    """Return a function that makes such examples, with their truth."""
    return example


@pytest.fixture(scope="session")
def assert_product():
    """Compare products V[k,n] -> HV[k,n] with a dense Hessian, relative to their norm:
    1e-10 in float64, 1e-5 in float32.
    """

    def check(products, hessian, vectors):
        expected = np.asarray(vectors, np.float64) @ np.asarray(hessian, np.float64)
        assert products.dtype == vectors.dtype
        assert products.shape == vectors.shape
        error = np.linalg.norm(products - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() <= {"float64": 1e-10, "float32": 1e-5}[vectors.dtype.name]

    return check


@pytest.fixture(scope="session")
def vetter():
    """Yield a vetter that reads the programs of all tests, because it takes a while to
    start.
    """
    with contextlib.closing(Vetter()) as started:
        yield started


@pytest.fixture
def forked_vetters(zygotes, monkeypatch):
    """Fork the processes of the test's own vetters, which is faster than starting
    Python for each.
    """
    if zygotes is not None:
        monkeypatch.setattr(spawn, "start", vetters_by_fork(zygotes.vetters()))


@pytest.fixture
def open_engine(tmp_path, cache, device, upload, vetter, monkeypatch):
    """Open an engine on the test's store, with examples registered. An earlier engine
    on that store is closed first.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # Power cannot fail here, and fsync is slow.
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "cache").symlink_to(cache)
    engines = []

    def close():
        for engine in engines:
            engine.close()
            engine.store.close()
        engines.clear()

    def open_engine(*examples, memory_budget_bytes=1 << 30, max_block_width=16, max_launches=None):
        close()
        limits = Limits(memory_budget_bytes, max_block_width, max_pending=4096, max_launches=max_launches)
        engines.append(Engine(Store(tmp_path / "store"), [device], limits, Metrics(), vetter=vetter))
        for each in examples:
            for content in each.export.blobs.values():
                upload(engines[-1].store, content)
            engines[-1].registration.register(each.export.digest, "")
        return engines[-1]

    yield open_engine
    close()
