"""Valid programs with something changed: each is refused with a reason, or compiled and
run beside a neighbour.

The neighbour's products must stay right. The server must stay the same process, and
must keep no file open and little memory. In the suite, this tries the same few each
time. HVPD_FUZZ_EXAMPLES=100000 tries as many, different each time, and the summary says
how many were admitted.
"""

import contextlib
import os
import random
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
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import objective_pb2, objective_pb2_grpc
from tests.fuzz.wire import send

COUNT = int(os.environ.get("HVPD_FUZZ_EXAMPLES", "0"))
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
    "cumsum": lambda x: jnp.sum(jnp.cumsum(x) ** 2 + jnp.cumprod(x)),
}

NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "17",
    "64",
    "65536",
    "4294967296",
    "4611686018427387904",
    "-9223372036854775808",
]
WORDS = [
    *(
        "LT",
        "GE",
        "EQ",
        "NE",
        "TOTALORDER",
        "FLOAT",
        "SIGNED",
        "true",
        "false",
        "HIGHEST",
        "dense",
        "f32",
        "f64",
        "i32",
        "i1",
        "c64",
    ),
    *(
        "add",
        "multiply",
        "maximum",
        "minimum",
        "subtract",
        "divide",
        "compare",
        "select",
        "and",
        "or",
        "sort",
        "reduce",
        "scatter",
    ),
    *(
        "custom_call",
        "lapack_dgees_ffi",
        "lapack_dgesdd_ffi",
        "lapack_dgeqrf_ffi",
        "lapack_dorgqr_ffi",
        "lapack_dpotrf_ffi",
        "Qr",
    ),
    *(
        "xla_python_cpu_callback",
        "L",
        "U",
        "N",
        "V",
        "C",
        "mode",
        "uplo",
        "transpose",
        "while",
        "case",
        "call",
        "main",
        "return",
    ),
]


def text_of(fun):
    """Return an objective's program as text, and its bundle."""
    made = _export.export(fun, X, (), platforms=("cpu",), precision="highest")
    with jax.interpreters.mlir.make_ir_context() as context:
        module = stablehlo.deserialize_portable_artifact(
            context, bytes(made.blobs[made.bundle.programs["objective"].digest])
        )
        return str(ir.Module.parse(module) if isinstance(module, bytes | str) else module), made


def mutate(text, rng):
    """Change one to three places: a number, a word, a line, or a stretch of text."""
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(6)
        if kind <= 1:
            found = list(re.finditer(r"(?<![\w.%#])-?\d+", text))
            new = rng.choice(NUMBERS)
        elif kind <= 3:
            found = list(
                re.finditer(r"\b(?:[A-Z]{1,12}|true|false|f32|f64|i32|[a-z_]+_ffi|" + "|".join(WORDS) + r")\b", text)
            )
            new = rng.choice(WORDS)
        else:
            lines = text.splitlines(keepends=True)
            first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
            if kind == 4:
                lines[first], lines[second] = lines[second], lines[first]
            else:
                lines[first] = "" if rng.random() < 0.5 else lines[first] * 2
            text = "".join(lines)
            continue
        if found:
            place = rng.choice(found)
            text = text[: place.start()] + new + text[place.end() :]
    return text


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
                stop.wait(0.02)  # A caller between whose products other work is done.

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


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_changed_program_is_refused_or_harms_no_neighbour(attacked, neighbour, leaks, tried, original):
    failures, counted = neighbour
    text, made = text_of(ORIGINALS[original])
    rng = random.Random(time.time_ns() if COUNT else original)
    before, process = counted[0], attacked.process.pid
    with grpc.insecure_channel(attacked.address) as channel, hvpd.connect(attacked.address, retry_timeout=5) as client:
        objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
        for content in made.blobs.values():
            send(channel, bytes(content))
        for index in range(max(COUNT // len(ORIGINALS), 4)):
            blob = (mutate(text, rng) if index else text).encode()
            bundle = objective_pb2.Bundle.FromString(made.bundle.SerializeToString())
            bundle.programs["objective"].digest = send(channel, blob)
            bundle.programs["objective"].size_bytes = len(blob)
            request = objective_pb2.CreateObjectiveRequest(
                digest=send(channel, bundle.SerializeToString()), name=f"mutant/{original}"
            )
            tried("mutants of programs")
            try:
                objectives.CreateObjective(request, timeout=400)
            except grpc.RpcError as error:
                assert index, error.details()  # noqa: PT017 - an unchanged program is served
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (error.details(), blob.decode())  # noqa: PT017
            else:
                tried("mutants of programs, compiled and run")
                with contextlib.suppress(hvpd.HvpdError):
                    client.objective(f"mutant/{original}").at(X).hessian() @ np.ones((16, 2))
                client.delete(f"mutant/{original}")
            assert attacked.process.poll() is None, blob.decode()
            assert not failures, blob.decode()
    assert attacked.process.pid == process
    assert counted[0] > before
    files, mebibytes = leaks()
    assert files < 50  # The descriptors of connections, of calls under way and of compiles.
    assert mebibytes < 500  # The compiled programs, of which the server keeps some, and the heap's gaps.
