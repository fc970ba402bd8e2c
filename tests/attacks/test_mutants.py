"""Valid programs with something changed: each is refused with a reason, or compiled and
run beside a neighbour.

The neighbour's products must stay right. The server must stay the same process, and
must keep no file open and little memory. In the suite, this tries the same few each
time. HVPD_FUZZ_EXAMPLES=100000 tries as many, different each time. The vetter's
functions read and import all of these, in one process for many mutants. The mutants
that are imported, and a twentieth of the others, are sent to the server. The summary
has the counts. If $HVPD_FUZZ_COUNTS names a file, each count is added there at once, so
that a run that is interrupted counts, too.
"""

import collections
import concurrent.futures
import contextlib
import functools
import os
import re
import threading
import time
from pathlib import Path

import grpc
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.special
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import objective_pb2, objective_pb2_grpc
from hvpd_server.importer import refusals
from tests.attacks import mutation
from tests.fuzz.wire import send

COUNT = int(os.environ.get("HVPD_FUZZ_EXAMPLES", "0"))
IN_FLIGHT = 3
"""Mutants that the server reads, compiles or runs at the same time."""
X = np.linspace(0.5, 1.7, 16)
A = np.random.default_rng(0).normal(size=(4, 4)) + 4 * np.eye(4)


@jax.custom_jvp
def _softened(x):
    return jnp.sqrt(x**2 + 1)


_softened.defjvp(lambda primals, tangents: (_softened(primals[0]), tangents[0] * primals[0] / _softened(primals[0])))


def _convolved(x):
    kernel = jnp.ones((1, 1, 2, 2), x.dtype)
    return jnp.sum(jax.lax.conv(x.reshape(1, 1, 4, 4), kernel, (1, 1), "SAME") ** 2)


def _looped(x):
    return jax.lax.fori_loop(0, 3, lambda i, total: total + jnp.sin(x[i] * total), jnp.sum(x))


ORIGINALS = {
    "sort": lambda x: jnp.sum(jnp.sort(x) ** 2 * jnp.arange(16.0)),
    "cholesky": lambda x: jnp.sum(jnp.linalg.cholesky(x.reshape(4, 4) @ x.reshape(4, 4).T + 9 * jnp.eye(4))),
    "solve": lambda x: jnp.sum(jnp.linalg.solve(jnp.asarray(A), x.reshape(4, 4)) ** 2),
    "qr": lambda x: jnp.sum(jnp.linalg.qr(x.reshape(4, 4) + jnp.asarray(A))[1] ** 3),
    "eigh": lambda x: jnp.sum(jnp.linalg.eigh(x.reshape(4, 4) + x.reshape(4, 4).T + jnp.asarray(A + A.T))[0] ** 3),
    "triangular": lambda x: jnp.sum(jax.scipy.linalg.solve_triangular(jnp.asarray(A), x[:4]) ** 2),
    "fft": lambda x: jnp.sum(jnp.abs(jnp.fft.rfft(x)) ** 2),
    "conv": _convolved,
    "pool": lambda x: jnp.sum(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (4,), (2,), "VALID") ** 2),
    "scatter": lambda x: jnp.sum(jnp.zeros(8).at[jnp.arange(16) % 8].add(x) ** 3),
    "gather": lambda x: jnp.sum(x[jnp.array([3, 1, 2, 15])] ** 3),
    "loop": _looped,
    "scan": lambda x: jax.lax.scan(lambda c, v: (c * v + 1, None), 1.0, x)[0],
    "cond": lambda x: jax.lax.cond(x[0] > 1, lambda x: jnp.sum(x**3), lambda x: jnp.sum(x**4), x),
    "mark": lambda x: jnp.sum(_softened(x) * jax.lax.stop_gradient(x)),
    "special": lambda x: jnp.sum(jax.scipy.special.erfinv(x / 2) + jax.nn.relu(x - 1)),
    "random": lambda x: jnp.sum(x * jax.random.normal(jax.random.key(0), (16,))) ** 2,
    "top_k": lambda x: jnp.sum(jax.lax.top_k(x, 3)[0] ** 3),
    "cumsum": lambda x: jnp.sum(jnp.cumsum(x) ** 2) + jnp.sum(jnp.cumprod(x[:4])),
}


def _rows(x, rows):
    return jnp.mean(jnp.tanh(rows @ x) ** 2) + jnp.sum(x**2)


ROWS = np.random.default_rng(1).normal(size=(6, 16))
DATA = {"rows": (_rows, {"any_rows": True}), "chunks": (_rows, {"row_reduction": "mean"})}
"""Originals whose data has a symbolic number of rows."""

NAMES = [*ORIGINALS, *DATA]


@functools.cache
def exported(original):
    """Return an original's bundle, and its program as text."""
    fun, options = DATA.get(original) or (ORIGINALS[original], {})
    data = (ROWS,) if original in DATA else ()
    made = _export.export(
        fun, X, data, platforms=("cpu",), precision="highest", fixed_bucket=2 if COUNT else None, **options
    )
    with jax.interpreters.mlir.make_ir_context() as context:
        module = stablehlo.deserialize_portable_artifact(
            context, bytes(made.blobs[made.bundle.programs["objective"].digest])
        )
        return made, str(ir.Module.parse(module) if isinstance(module, bytes | str) else module)


def parts(original):
    """Return an original as the vetter takes it, with its program as text."""
    made, text = exported(original)
    return {"bundle": made.bundle.SerializeToString(), "objective": text.encode()}


@pytest.fixture(scope="module")
def read():
    """Return mutants by original: in the suite the same few, read by one process."""
    if COUNT:
        return lambda original: mutation.mutants({original: parts(original)}, COUNT // len(NAMES), time.time_ns())
    found = list(mutation.mutants({name: parts(name) for name in NAMES}, 4, "suite"))
    return lambda original: [each for each in found if each.original == original]


@pytest.fixture(scope="module")
def attacked(serve_module):
    return serve_module("--launch-timeout", "30")


@pytest.fixture(scope="module")
def neighbour(attacked):
    """Multiply all the time, and fail if one product is wrong or late."""
    stop, failures, counted = threading.Event(), [], [0]
    truth = X**2

    def multiply():
        with hvpd.connect(attacked.address) as client:
            H = client.register(lambda x: jnp.sum(x**4) / 12, X, name="neighbour", platforms=("cpu",)).at(X).hessian()
            while not stop.is_set():
                v = np.random.default_rng(counted[0]).normal(size=16)
                if not np.allclose(H @ v, truth * v, rtol=1e-12):
                    failures.append(v)
                counted[0] += 1
                stop.wait(0.05)  # A caller between whose products other work is done.

    thread = threading.Thread(target=multiply)
    thread.start()
    yield failures, counted
    stop.set()
    thread.join(60)


@pytest.fixture(scope="module")
def leaks(attacked):
    """Return what the server has gained since the first call: open files, and MiB of
    memory.
    """
    process, before = Path(f"/proc/{attacked.process.pid}"), []

    def gained():
        resident = re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text())
        held = len(list((process / "fd").iterdir())), int(resident[1]) // 1024
        before.append(held)
        return held[0] - before[0][0], held[1] - before[0][1]

    return gained


@pytest.mark.parametrize("original", NAMES)
def test_a_changed_program_is_refused_or_harms_no_neighbour(attacked, neighbour, leaks, tried, read, original):
    failures, counted = neighbour
    made, text = exported(original)
    before, process = counted[0], attacked.process.pid
    with grpc.insecure_channel(attacked.address) as channel, hvpd.connect(attacked.address, retry_timeout=5) as client:
        for content in made.blobs.values():
            send(channel, bytes(content))
        assert registered(channel, made, text, f"mutant/{original}") == "", "an unchanged program is served"

        def attack(index, mutant):
            tried("mutants of programs")
            if COUNT and mutant.reason in refusals.REASONS and index % 20:
                return
            name = f"mutant/{original}/{index}"
            refused = registered(channel, made, mutant.text, name)
            tried("mutants of programs, sent to a server")
            assert not (mutant.reason in refusals.REASONS and not refused), mutant
            assert not refused or refused in refusals.REASONS, mutant
            if not refused:
                with contextlib.suppress(hvpd.HvpdError):
                    client.objective(name).at(X).hessian() @ np.ones((16, 2))
                client.delete(name)
                tried("mutants of programs, compiled and run")
            assert attacked.process.poll() is None, mutant
            assert not failures, mutant

        with concurrent.futures.ThreadPoolExecutor(IN_FLIGHT) as pool:
            under_way = collections.deque()
            for index, mutant in enumerate(read(original)):
                under_way.append(pool.submit(attack, index, mutant))
                while len(under_way) > IN_FLIGHT:
                    under_way.popleft().result()
            for each in under_way:
                each.result()
        client.delete(f"mutant/{original}")  # Until here, it kept the data of all its mutants.
    assert attacked.process.pid == process
    assert counted[0] > before
    files, mebibytes = leaks()
    assert files < 50  # The descriptors of connections, of calls under way and of compiles.
    assert mebibytes < 500  # The compiled programs, of which the server keeps some, and the heap's gaps.


def registered(channel, made, text, name):
    """Register an original with a text as its program, under a name. Return the reason
    of a refusal, or an empty text.
    """
    blob = text.encode()
    bundle = objective_pb2.Bundle.FromString(made.bundle.SerializeToString())
    bundle.programs["objective"].digest = send(channel, blob)
    bundle.programs["objective"].size_bytes = len(blob)
    digest = send(channel, bundle.SerializeToString())
    request = objective_pb2.CreateObjectiveRequest(digest=digest, name=name)
    try:
        objective_pb2_grpc.ObjectiveServiceStub(channel).CreateObjective(request, timeout=400)
    except grpc.RpcError as error:
        for detail in rpc_status.from_call(error).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                return info.reason
        raise
    return ""
