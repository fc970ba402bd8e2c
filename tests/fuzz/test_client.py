"""The client under attack: each call ends, with any answer of a server. If the call has
no result, it raises an HvpdError.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

import hvpd
from hvpd.v1 import blob_pb2, curvature_pb2, krylov_pb2, objective_pb2, server_pb2
from tests.fuzz import wire
from tests.fuzz.liar import EXPORT, Liar, N, X


@pytest.fixture(scope="module")
def liar():
    handler = Liar()
    server = grpc.server(ThreadPoolExecutor(64))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler, f"127.0.0.1:{port}"
    server.stop(None).wait()


@contextlib.contextmanager
def talking(liar, lies):
    handler, address = liar
    with hvpd.connect(address, retry_timeout=0.01, timeout=1.0) as client:
        handler.lies = lies
        try:
            yield client
        finally:
            handler.lies = {}


CALLS = {
    "GetServer": lambda client: hvpd.connect(
        client.address, connect_timeout=1, retry_timeout=0.01, timeout=1.0
    ).close(),
    "GetObjective": lambda client: (
        client.objective("quartic").slices(),
        client.objective("quartic").dense_layers(),
        client.objective("quartic").derivative_rules(),
        client.objective("quartic").registration_check(),
    ),
    "ListObjectives": lambda client: client.objectives(),
    "GetPlan": lambda client: (client.objective("quartic").plan(), client.objective("quartic").compiles()),
    "FindMissingBlobs": lambda client: client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",)),
    "UploadBlob": lambda client: client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",)),
    "CreateObjective": lambda client: client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",)),
    "CreatePoint": lambda client: client.objective("quartic").at(X).gradient,
    "StreamProducts": lambda client: client.objective("quartic").at(X).hessian() @ np.ones((N, 3)),
    "ComputeFactors": lambda client: client._transport.factors(
        curvature_pb2.ComputeFactorsRequest(), [2, 3], np.dtype(float), restore=lambda: None
    ),
    "StartRun": lambda client: client.objective("quartic").at(X).hessian().lanczos(3),
    "Compute": lambda client: client.objective("quartic").at(X).hessian().solve(np.ones(N)),
}

KINDS = {
    "GetServer": server_pb2.GetServerResponse,
    "GetObjective": objective_pb2.GetObjectiveResponse,
    "ListObjectives": objective_pb2.ListObjectivesResponse,
    "GetPlan": objective_pb2.GetPlanResponse,
    "FindMissingBlobs": blob_pb2.FindMissingBlobsResponse,
    "UploadBlob": blob_pb2.UploadBlobResponse,
    "CreateObjective": objective_pb2.CreateObjectiveResponse,
    "CreatePoint": curvature_pb2.CreatePointResponse,
    "StreamProducts": curvature_pb2.StreamProductsResponse,
    "ComputeFactors": curvature_pb2.ComputeFactorsResponse,
    "StartRun": krylov_pb2.StartRunResponse,
    "Compute": krylov_pb2.ComputeResponse,
}


@st.composite
def details(draw, whole=True):
    """Draw a google.rpc.Status, as bytes, with details of all kinds."""
    status = status_pb2.Status(code=draw(st.integers(0, 17)), message=draw(st.text(max_size=20)))
    for _ in range(draw(st.integers(0, 3))):
        packed = any_pb2.Any()
        seconds = draw(st.sampled_from([-1, -(10**10), 0, 1, 10**10, 2**62]))
        packed.Pack(
            draw(
                st.sampled_from(
                    [
                        error_details_pb2.ErrorInfo(reason=draw(wire.NAMES), domain="hvpd"),
                        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds)),
                        error_details_pb2.ErrorInfo(reason="POINT_NOT_RESIDENT", domain="hvpd"),
                    ]
                )
            )
        )
        if not whole and draw(st.booleans()):
            packed.value = draw(st.binary(max_size=20))
        status.details.append(packed)
    data = status.SerializeToString()
    return data if whole or draw(st.booleans()) else draw(wire.damaged(st.just(data)))


def ends(whole):
    return st.none() | st.tuples(st.integers(1, 16), st.text(max_size=20), st.none() | details(whole=whole))


def fails_well(call, client):
    started = time.monotonic()
    try:
        result = call(client)
    except hvpd.HvpdError:
        result = None
    assert time.monotonic() - started < 20
    return result


@pytest.mark.parametrize("method", CALLS)
@settings(settings.get_profile("fuzz-slow"))
@given(data=st.data())
def test_answers_of_any_bytes(liar, tried, method, data):
    kind = KINDS[method]
    sent = data.draw(
        st.lists(wire.looks_like(kind) | wire.message(kind).map(lambda m: m.SerializeToString()), max_size=4)
    )
    tried("answers of a server that lies")
    with talking(liar, {method: (sent, data.draw(ends(whole=False)))}) as client:
        fails_well(CALLS[method], client)
        liar[0].lies = {}
        np.testing.assert_array_equal(client.objective("quartic").at(X).hessian() @ np.ones(N), X**2)


@settings(settings.get_profile("fuzz"))
@given(derivation=wire.message(objective_pb2.Derivation))
def test_derivations_of_any_content(liar, tried, derivation):
    """The layers have leaves that x lacks, and modes and programs are unknown."""
    tried("derivations of a server that lies")
    objective = objective_pb2.Objective(digest=EXPORT.digest, bundle=EXPORT.bundle, derivation=derivation)
    sent = [objective_pb2.GetObjectiveResponse(objective=objective).SerializeToString()]
    with talking(liar, {"GetObjective": (sent, None)}) as client:
        fails_well(lambda client: client.objective("quartic").dense_layers(), client)
        fails_well(lambda client: client.objective("quartic").at(X).kfac(), client)
        np.testing.assert_array_equal(client.objective("quartic").at(X).hessian() @ np.ones(N), X**2)


@st.composite
def answers(draw):
    """Draw products in pieces, of the right tags or others, too short, too long, twice,
    with errors, NaN.
    """
    messages = []
    for _ in range(draw(st.integers(0, 6))):
        size = draw(st.sampled_from([0, 0, 8 * N, 8 * N, 16 * N, 24 * N, 1, 7, 8, 1 << 20]))
        chunk = draw(st.sampled_from([np.full(size // 8 + 1, np.nan).tobytes()[:size], bytes(size)]))
        made = curvature_pb2.StreamProductsResponse(tag=draw(st.sampled_from([0, 1, 1, 2, 3, 2**64 - 1])), chunk=chunk)
        if draw(st.booleans()):
            made.info.CopyFrom(draw(wire.message(curvature_pb2.ProductInfo)))
        if draw(st.sampled_from([True, False, False])):
            made.error.ParseFromString(draw(details()))
        messages.append(made.SerializeToString())
    return messages


@settings(settings.get_profile("fuzz-slow"))
@given(sent=answers(), end=ends(whole=True), wide=st.booleans())
def test_products_that_are_none(liar, tried, sent, end, wide):
    """130 vectors are three products of one exchange. All of the returned product came
    from the server.
    """
    tried("products of a server that lies")
    with talking(liar, {"StreamProducts": (sent, end)}) as client:
        H = client.objective("quartic").at(X).hessian()
        V = np.ones((N, 130 if wide else 3))
        result = fails_well(lambda client: H @ V, client)
        assert result is None or not wide
        assert result is None or not np.any(np.where(np.isnan(result), 0, result))
