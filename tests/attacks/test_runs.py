"""Requests of Krylov runs that no client makes: each is refused in words, before it
takes memory or the device, and the run of another request goes on.
"""

import grpc
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._errors import failure_of_rpc
from hvpd.v1 import curvature_pb2, krylov_pb2, krylov_pb2_grpc

N = 6
INF, NAN = float("inf"), float("nan")


def quartic(x, data):
    return jnp.sum(data * x**4) / 12


@pytest.fixture(scope="module")
def point(client):
    return client.register(quartic, np.ones(N), np.arange(1.0, N + 1), name="attacks/runs").at(np.ones(N))


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield krylov_pb2_grpc.KrylovServiceStub(channel)


def operator(point, **changes):
    product = curvature_pb2.ProductSpec(point_id=point._id, operator=curvature_pb2.OPERATOR_HESSIAN)
    made = krylov_pb2.RunOperator(product=product)
    for name, value in changes.items():
        setattr(made if name in ("scale", "shift") else made.product, name, value)
    return made


def listed(name, *shape, dtype="float64"):
    return krylov_pb2.RunArray(name=name, dtype=dtype, shape=shape)


def reason(call):
    with pytest.raises(grpc.RpcError) as error:
        found = call()
        list(found)
    failure = failure_of_rpc(error.value)
    assert failure.message
    return failure.reason


E = np.eye(N)


@pytest.mark.parametrize(
    ("changes", "arrays", "data", "expected"),
    [
        ({"steps": -1}, [("Q", 1, N)], E[:1], "STEPS"),
        ({"steps": 1 << 30}, [("Q", 1, N)], E[:1], "STEPS"),
        ({"steps": 1 << 20}, [("Q", 3, N)], 2 * E[:3], "NOT_ORTHONORMAL"),
        ({"reorthogonalize": "half"}, [("Q", 1, N)], E[:1], "REORTHOGONALIZE"),
        ({"pin_seconds": -1}, [("Q", 1, N)], E[:1], "PIN_SECONDS"),
        ({}, [], E[:0], "ARRAYS"),
        ({}, [("Q", 1, N), ("Q", 1, N)], E[:2], "ARRAYS"),
        ({}, [("R", 1, N)], E[:1], "ARRAYS"),
        ({}, [("Q", 1, N, 1)], E[:1], "ARRAYS"),
        ({}, [("Q", 1, N + 1)], E[:1], "ARRAYS"),
        ({}, [("Q", -1, N)], E[:1], "ARRAYS"),
        ({}, [("Q", 0, N)], E[:0], "ARRAYS"),
        ({}, [("Q", 1 << 39, N)], E[:1], "MEMORY_BUDGET"),
        ({}, [("Q", 1 << 62, N)], E[:1], "ARRAYS"),
        ({}, [("Q", 1, N), ("U", N, 1 << 38)], E[:1], "MEMORY_BUDGET"),
        ({}, [("Q", 1, N), ("U", N, 1)], E[:2], "ARRAYS"),
        ({}, [("Q", 1, N)], E[:2], "SIZE_MISMATCH"),
        ({}, [("Q", 2, N)], E[:1], "SIZE_MISMATCH"),
        ({}, [("Q", N + 1, N)], np.vstack([E, E[:1]]), "SHAPE"),
        ({}, [("Q", 1, N)], E[:1] * NAN, "NOT_ORTHONORMAL"),
        ({}, [("Q", 1, N)], E[:1] * 0, "NOT_ORTHONORMAL"),
        ({}, [("Q", 2, N)], np.vstack([E[:1], E[:1]]), "NOT_ORTHONORMAL"),
    ],
)
def test_a_wrong_start_is_refused(point, stub, changes, arrays, data, expected):
    spec = krylov_pb2.RunSpec(
        operator=operator(point), reorthogonalize="full", steps=1, arrays=[listed(*each) for each in arrays]
    )
    for name, value in changes.items():
        setattr(spec, name, value)
    request = krylov_pb2.StartRunRequest(spec=spec, chunk=np.ascontiguousarray(data).tobytes())
    assert reason(lambda: stub.StartRun(iter([request]))) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scale": NAN}, "NOT_FINITE"),
        ({"shift": INF}, "NOT_FINITE"),
        ({"operator": 77}, "UNKNOWN_OPERATOR"),
        ({"operator": curvature_pb2.OPERATOR_GGN}, "NO_SUCH_OPERATOR"),
        ({"point_id": "0" * 64}, "POINT_NOT_RESIDENT"),
        ({"block": 9}, "UNKNOWN_BLOCK"),
        ({"priority": 1000}, "PRIORITY"),
        ({"mode": "backwards"}, "UNKNOWN_MODE"),
        ({"precision": "low"}, "UNKNOWN_PRECISION"),
    ],
)
def test_a_wrong_operator_is_refused(point, stub, changes, expected):
    spec = krylov_pb2.RunSpec(
        operator=operator(point, **changes), reorthogonalize="full", steps=1, arrays=[listed("Q", 1, N)]
    )
    request = krylov_pb2.StartRunRequest(spec=spec, chunk=E[:1].tobytes())
    assert reason(lambda: stub.StartRun(iter([request]))) == expected
    computation = krylov_pb2.ComputationSpec(operator=operator(point, **changes))
    computation.estimate.method = "xtrace"
    computation.estimate.products = 2
    assert reason(lambda: stub.Compute(iter([krylov_pb2.ComputeRequest(spec=computation)]))) == expected


@pytest.fixture
def run(point):
    with point.hessian().lanczos(3) as started:
        yield started


def position(run, **changes):
    made = run._space._position()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run_id": "0" * 32}, "RUN_NOT_RESIDENT"),
        ({"run_id": "\u202e" * 1000}, "RUN_NOT_RESIDENT"),
        ({"point_id": "0" * 64}, "RUN_OF_ANOTHER_POINT"),
        ({"changes": 7}, "RUN_NOT_RESIDENT"),
        ({"rows": 99}, "RUN_NOT_RESIDENT"),
        ({"rows": -1}, "RUN_NOT_RESIDENT"),
        ({"waiting": 5}, "RUN_NOT_RESIDENT"),
        ({"waiting": -1}, "RUN_NOT_RESIDENT"),
    ],
)
def test_a_position_that_no_run_has_is_not_resident(run, stub, changes, expected):
    wrong, right = position(run, **changes), position(run)
    assert reason(lambda: stub.ExtendRun(krylov_pb2.ExtendRunRequest(position=wrong, steps=1))) == expected
    Y = np.eye(1).tobytes()
    combine = krylov_pb2.CombineRunRequest(position=wrong, rows=1, columns=1, chunk=Y)
    assert reason(lambda: stub.CombineRun(iter([combine]))) == expected
    combine.position.CopyFrom(right)
    assert len(list(stub.CombineRun(iter([combine])))) == 1


@pytest.mark.parametrize(
    ("rows", "columns", "chunk", "expected"),
    [
        (0, 1, b"", "SHAPE"),
        (99, 1, b"", "SHAPE"),
        (1, 0, b"", "SHAPE"),
        (1, -5, b"", "SHAPE"),
        (1, 1 << 30, b"", "SHAPE"),
        (2, 2, b"\0" * 8, "SIZE_MISMATCH"),
        (1, 1, np.full(1, NAN).tobytes(), "NOT_FINITE"),
    ],
)
def test_a_wrong_matrix_is_refused(run, stub, rows, columns, chunk, expected):
    for kind, method in (
        (krylov_pb2.CombineRunRequest, stub.CombineRun),
        (krylov_pb2.RestartRunRequest, lambda requests: [stub.RestartRun(requests)]),
    ):
        request = kind(position=position(run), rows=rows, columns=columns, chunk=chunk)
        assert reason(lambda method=method, request=request: method(iter([request]))) == expected
    assert run.extend(1).steps == 4


def test_a_narrow_matrix_gives_a_wide_answer(run, stub):
    columns = 1 << 20
    request = krylov_pb2.CombineRunRequest(position=position(run), rows=1, columns=columns)
    chunks = [krylov_pb2.CombineRunRequest(chunk=bytes(1 << 20)) for _ in range(8)]
    answers = stub.CombineRun(iter([request, *chunks]))
    assert sum(len(answer.chunk) for answer in answers) == columns * N * 8


@pytest.mark.parametrize(
    ("changes", "arrays", "expected"),
    [
        ({"method": "gmres"}, {"B": E[:1]}, "METHOD"),
        ({"tol": NAN}, {"B": E[:1]}, "SOLVE"),
        ({"tol": -1.0}, {"B": E[:1]}, "SOLVE"),
        ({"maxiter": -1}, {"B": E[:1]}, "SOLVE"),
        ({"maxiter": 1 << 41}, {"B": E[:1]}, "SOLVE"),
        ({"shifts": []}, {"B": E[:1]}, "SOLVE"),
        ({"shifts": [INF]}, {"B": E[:1]}, "SOLVE"),
        ({"shifts": [0.0] * 5000}, {"B": E[:1]}, "SOLVE"),
        ({}, {"B": E[:1] * NAN}, "SOLVE"),
        ({}, {"B": E[:1], "X": E[:2]}, "SOLVE"),
        ({}, {"B": np.zeros((4096, N))}, "SOLVE"),
        ({"shifts": [0.0, 1.0]}, {"B": E[:1], "X": E[:1]}, "SOLVE"),
        ({"kind": "magic"}, {"B": E[:1]}, "PRECONDITIONER"),
        ({"kind": "diagonal"}, {"B": E[:1]}, "ARRAYS"),
        ({"kind": "diagonal"}, {"B": E[:1], "M": E[0] * NAN}, "PRECONDITIONER"),
        ({"kind": "low_rank"}, {"B": E[:1], "M_U": E[:, :2], "M_weights": np.ones(3)}, "PRECONDITIONER"),
        (
            {"kind": "kronecker"},
            {
                "B": E[:1],
                "M_elements_0": np.array([[0, 99]]),
                "M_a_0": E[:1, :1],
                "M_g_0": E[:2, :2],
                "M_weights_0": E[:1, :2],
            },
            "PRECONDITIONER",
        ),
        (
            {"kind": "kronecker"},
            {
                "B": E[:1],
                "M_elements_0": np.array([[0, 0]]),
                "M_a_0": E[:1, :1],
                "M_g_0": E[:2, :2],
                "M_weights_0": E[:1, :2],
            },
            "PRECONDITIONER",
        ),
        ({"kind": "kronecker"}, {"B": E[:1], "M_elements_1": np.array([[0, 1]])}, "PRECONDITIONER"),
    ],
)
def test_a_wrong_solve_is_refused(point, stub, changes, arrays, expected):
    spec = krylov_pb2.SolveSpec(method="cg", tol=1e-5, maxiter=10, shifts=[0.0])
    for name, value in changes.items():
        if name == "shifts":
            spec.shifts[:] = value
        elif name == "kind":
            spec.preconditioner.kind = value
        else:
            setattr(spec, name, value)
    computation = krylov_pb2.ComputationSpec(
        operator=operator(point),
        solve=spec,
        arrays=[listed(name, *array.shape, dtype=array.dtype.name) for name, array in arrays.items()],
    )
    chunk = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    assert reason(lambda: stub.Compute(iter([krylov_pb2.ComputeRequest(spec=computation, chunk=chunk)]))) == expected


@pytest.mark.parametrize(
    ("changes", "gradient", "expected"),
    [
        ({"radius": 0.0}, E[0], "SOLVE"),
        ({"radius": NAN}, E[0], "SOLVE"),
        ({"tol": -1.0}, E[0], "SOLVE"),
        ({"maxiter": -1}, E[0], "SOLVE"),
        ({}, E[0] * NAN, "SOLVE"),
        ({}, E[0, :2], "ARRAYS"),
    ],
)
def test_a_wrong_step_is_refused(point, stub, changes, gradient, expected):
    spec = krylov_pb2.StepSpec(radius=1.0, tol=1e-5, maxiter=10)
    for name, value in changes.items():
        setattr(spec, name, value)
    computation = krylov_pb2.ComputationSpec(
        operator=operator(point), step=spec, arrays=[listed("gradient", *gradient.shape)]
    )
    request = krylov_pb2.ComputeRequest(spec=computation, chunk=gradient.tobytes())
    assert reason(lambda: stub.Compute(iter([request]))) == expected


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"tridiagonals": {"probes": 0, "steps": 1}},
        {"tridiagonals": {"probes": 1, "steps": N + 1}},
        {"tridiagonals": {"probes": 1 << 30, "steps": N}},
        {"tridiagonals": {"probes": 1, "steps": 1, "reorthogonalize": "maybe"}},
        {"estimate": {"method": "guess", "products": 2}},
        {"estimate": {"method": "xdiag", "products": 2}},
        {"estimate": {"method": "xtrace", "products": 1}},
        {"estimate": {"method": "hutchinson", "products": -1}},
        {"estimate": {"method": "hutchinson", "products": 1 << 30}},
    ],
)
def test_a_wrong_estimate_is_refused(point, stub, kind):
    computation = krylov_pb2.ComputationSpec(operator=operator(point), **kind)
    found = reason(lambda: stub.Compute(iter([krylov_pb2.ComputeRequest(spec=computation)])))
    assert found in ("SPEC_MISSING", "STEPS", "METHOD")


def test_an_indefinite_preconditioner_is_said(point, stub):
    """A vector as M is checked by the client; here a server gets it unchecked."""
    spec = krylov_pb2.SolveSpec(method="cg", tol=1e-5, maxiter=10, shifts=[0.0])
    spec.preconditioner.kind = "diagonal"
    computation = krylov_pb2.ComputationSpec(
        operator=operator(point), solve=spec, arrays=[listed("B", 1, N), listed("M", N)]
    )
    chunk = np.concatenate([np.ones(N), -np.ones(N)]).tobytes()
    found = reason(lambda: stub.Compute(iter([krylov_pb2.ComputeRequest(spec=computation, chunk=chunk)])))
    assert found == "NOT_POSITIVE_DEFINITE"


def test_the_server_is_as_before(server, point):
    assert server.process.poll() is None
    np.testing.assert_allclose(point.hessian() @ np.ones(N), np.arange(1.0, N + 1))
    assert server.metric('hvpd_resident_bytes{kind="run"}') >= 0
    assert not [line for line in server.lines if "Traceback" in line]
