"""A tenant that reads no answers cannot fill the server's memory: a real server with
tenants.
"""

import contextlib
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

import hvpd
from hvpd.v1 import curvature_pb2, curvature_pb2_grpc
from hvpd_server.tenancy import token_file
from tests.support.objectives import quartic
from tests.support.waiting import until

MIB = 1 << 20
WAIT = 60
N = 100_000
STREAMS, PRODUCTS = 24, 100
LIMIT = 64 * MIB
BUFFERED = 32
"""Mebibytes of each stream that gRPC itself holds: its window, and memory around it.
hvpd does not count them.
"""


def memory(server):
    """Return the server's resident memory in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


@pytest.fixture
def place(serve, tmp_path):
    """Yield a server, and a client of each tenant."""
    tokens = tmp_path / "tokens.json"
    made = {name: token_file.create(tokens, name, ["use", "publish"])[0] for name in ("evil", "neighbour")}
    token_file.limit(tokens, "evil", {"transit_bytes": LIMIT})
    server = serve("--tokens", str(tokens), store=tmp_path / "store", forked=False)  # Its own memory is measured.
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(hvpd.connect(server.address, token=made[name])) for name in made}
        yield server, clients, made["evil"]


class Unread:
    """Streams that ask for products as fast as the server takes them, and read no
    answer.

    Args:
        address: The server's address.
        token: A tenant's token.
        point: The tenant's point, of length N.
    """

    def __init__(self, address, token, point, pipelined):
        self._stop = threading.Event()
        self._channels = [
            grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(STREAMS)
        ]
        self._spec = curvature_pb2.ProductSpec(
            point_id=point._id, operator=curvature_pb2.OPERATOR_HESSIAN, k=1, pipelined=pipelined
        )
        metadata = (("authorization", f"Bearer {token}"),)
        self.sent = [0] * STREAMS
        self._calls = [
            curvature_pb2_grpc.CurvatureServiceStub(channel).StreamProducts(self._requests(index), metadata=metadata)
            for index, channel in enumerate(self._channels)
        ]

    def _requests(self, index):
        chunk = np.ones(N).tobytes()
        for tag in range(PRODUCTS):
            self.sent[index] += 1
            yield curvature_pb2.StreamProductsRequest(tag=tag, spec=self._spec, chunk=chunk)
        self._stop.wait(WAIT)

    def close(self):
        self._stop.set()
        for call in self._calls:
            call.cancel()
        for channel in self._channels:
            channel.close()


@pytest.mark.parametrize("pipelined", [True, False])
def test_unread_answers_count_for_the_tenant_and_are_bounded(place, pipelined):
    server, clients, token = place
    point = clients["evil"].register(quartic, np.ones(N)).at(np.ones(N))
    np.testing.assert_allclose(point.hessian() @ np.ones(N), np.ones(N))
    x = np.arange(30.0)
    H = clients["neighbour"].register(quartic, x).at(x).hessian()
    before = memory(server)
    with contextlib.closing(Unread(server.address, token, point, pipelined)) as unread:
        sent, most, quiet = [], 0, 0
        while quiet < 50:  # The loop ends when no stream takes more, or all is sent.
            quiet = quiet + 1 if sent == list(unread.sent) and all(sent) else 0
            sent = list(unread.sent)
            np.testing.assert_array_equal(H @ np.ones(30), x**2)
            most = max(most, clients["evil"].usage().transit_bytes)
        assert most <= LIMIT
        assert memory(server) - before < 2 * LIMIT + STREAMS * BUFFERED * MIB
        assert clients["neighbour"].usage().transit_bytes == 0
        if pipelined:  # Without pipelining there is at most one product of each stream.
            assert most > LIMIT / 2
            with hvpd.connect(server.address, token=token, retry_timeout=0) as impatient:
                objective = impatient.objective(point.objective.digest)
                with pytest.raises(hvpd.OverloadedError, match=r"Retry after earlier answers are read") as error:
                    objective.at(np.ones(N)).hessian() @ np.ones((N, 8))
            assert error.value.reason == "TENANT_TRANSIT"
    until(lambda: not clients["evil"].usage().transit_bytes)
    np.testing.assert_allclose(point.hessian() @ np.ones((N, 8)), np.ones((N, 8)))
