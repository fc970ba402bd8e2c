"""The largest eigenvalues of a remote Hessian, from proto/ alone: no hvpd here.

    python examples/wire/lanczos.py HOST:PORT NAME

It needs grpcio, grpcio-tools, protobuf and numpy. The protocol's stubs are made at the
start. It finds the objective by its name, makes the point x = (1, 1/2, 1/3, ...),
multiplies one vector, multiplies the same vector on a stream, and runs Lanczos.
docs/reference/walkthrough.md explains each step.
"""

import hashlib
import queue
import sys
from pathlib import Path

import grpc
import numpy as np

PROTO = Path(__file__).parents[2] / "proto"
CHUNK = 1 << 20


def stubs(name):
    """Return the messages and the services of a file in proto/hvpd/v1."""
    return grpc.protos_and_services(f"hvpd/v1/{name}.proto")


def create_point(curvature, service, objective, x):
    """Make x resident; return the point's id, value and gradient."""
    data = x.tobytes()
    digest = hashlib.sha256(data).hexdigest()
    spec = curvature.PointSpec(objective_digest=objective.digest, default_data=True, x_digest=digest)
    # A small x goes with the first message. A larger one is sent when the server asks.
    requests = queue.SimpleQueue()
    requests.put(curvature.CreatePointRequest(spec=spec, inline_x=data if len(data) <= CHUNK else b""))
    point, gradient = None, b""
    for answer in service.CreatePoint(iter(requests.get, None)):
        if answer.WhichOneof("content") == "x_wanted":
            for start in range(0, len(data), CHUNK):
                requests.put(curvature.CreatePointRequest(chunk=data[start : start + CHUNK]))
            requests.put(None)
        elif answer.WhichOneof("content") == "point":
            point = answer.point
            requests.put(None)
        else:
            gradient += answer.chunk
    return point.id, point.value, np.frombuffer(gradient, x.dtype)


def stream_product(curvature, service, spec, v):
    """Multiply one vector on a stream, in chunks of 1 MiB."""
    data = v.tobytes()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    first = curvature.StreamProductsRequest(tag=7, spec=spec, chunk=chunks[0])
    rest = [curvature.StreamProductsRequest(tag=7, chunk=chunk) for chunk in chunks[1:]]
    answer = b""
    for message in service.StreamProducts(iter([first, *rest])):
        assert message.tag == 7
        if message.HasField("error"):
            raise RuntimeError(message.error.message)
        answer += message.chunk
    return np.frombuffer(answer, v.dtype)


def lanczos(multiply, n, dtype, steps):
    """Return the eigenvalues of the tridiagonal matrix after some steps."""
    basis = [np.ones(n, dtype) / np.sqrt(dtype.type(n))]
    diagonal, off_diagonal = [], []
    for _ in range(min(steps, n)):
        w = multiply(basis[-1])
        diagonal.append(w @ basis[-1])
        for _ in range(2):  # Orthogonalize twice, as rounding asks for.
            for q in basis:
                w = w - (q @ w) * q
        norm = np.linalg.norm(w)
        if norm < 1e-10 * abs(diagonal[0]):
            break
        off_diagonal.append(norm)
        basis.append(w / norm)
    size = len(diagonal)
    off_diagonal = off_diagonal[: size - 1]
    return np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))


def main(address, name):
    sys.path.insert(0, str(PROTO))  # where protos_and_services looks
    objectives, objective_services = stubs("objective")
    curvature, curvature_services = stubs("curvature")
    with grpc.insecure_channel(address) as channel:
        objective_service = objective_services.ObjectiveServiceStub(channel)
        service = curvature_services.CurvatureServiceStub(channel)

        objective = objective_service.GetObjective(objectives.GetObjectiveRequest(name=name)).objective
        dtype, n = np.dtype(objective.bundle.dtype), objective.bundle.n
        x = (1 / np.arange(1, n + 1)).astype(dtype)
        point_id, value, gradient = create_point(curvature, service, objective, x)
        print(f"n {n}")
        print(f"value {value:.12g}")
        print(f"gradient {np.linalg.norm(gradient):.12g}")

        spec = curvature.ProductSpec(point_id=point_id, operator=curvature.OPERATOR_HESSIAN, k=1)

        def multiply(v):
            request = curvature.ComputeProductRequest(spec=spec, vectors=v.tobytes())
            return np.frombuffer(service.ComputeProduct(request).vectors, dtype)

        v = np.ones(n, dtype)
        print(f"product {np.linalg.norm(multiply(v)):.12g}")
        print(f"streamed {np.linalg.norm(stream_product(curvature, service, spec, v)):.12g}")
        print(f"largest {lanczos(multiply, n, dtype, 40)[-1]:.12g}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/wire/lanczos.py HOST:PORT NAME")
    main(*sys.argv[1:])
