"""A client whose server lies: nothing goes to other services, every call ends, and each
lie that costs the caller its result is an HvpdError.
"""

import contextlib
import itertools
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import hvpd
from hvpd._cli import main
from hvpd._registration import portable
from hvpd._transport.reach import is_proxied
from hvpd._wire import vector_protocol, vector_socket
from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2, tensor_pb2
from tests.fuzz.liar import OBJECTIVE, POINT, Liar, N, X
from tests.support.waiting import until

PART = b"chosen by a liar"
assert len(PART) == vector_protocol.PROOF_BYTES


class Listener:
    """Another service on the client's machine. It sends a given text when a client
    connects, and notes the bytes that it receives.
    """

    def __init__(self, banner=b"", unix_id=None):
        self._banner = banner
        self.connections = 0
        self.received = b""
        if unix_id is None:
            self._socket = socket.create_server(("127.0.0.1", 0))
            self.port = self._socket.getsockname()[1]
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(vector_socket.unix_name(unix_id))
            self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                other, _ = self._socket.accept()
                self.connections += 1
                with other, contextlib.suppress(OSError):
                    other.sendall(self._banner)
                    while piece := other.recv(1000):
                        self.received += piece

    def close(self):
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(30)


class Tunnelled(Liar):
    """A liar that learns the client's own address in each call, and states ports as if
    they were there.
    """

    def __init__(self):
        super().__init__()
        self.vector_port = 0
        self.ticket = curvature_pb2.CreateVectorTicketResponse()
        self.port = 0

    def honest(self, method, requests):
        if method == "GetServer":
            yield server_pb2.GetServerResponse(
                min_protocol=1,
                max_protocol=1,
                platform="cpu",
                max_block_width=64,
                port=self.port,
                vector_port=self.vector_port,
            ).SerializeToString()
        elif method == "CreateVectorTicket":
            yield self.ticket.SerializeToString()
        else:
            yield from super().honest(method, requests)


@pytest.fixture
def liar():
    handler, server = Tunnelled(), grpc.server(ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((handler,))
    handler.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler
    server.stop(None).wait()


@pytest.fixture
def connect(liar):
    """Connect clients that wait a minute for each call. A call that hangs is a
    DeadlineError, which no test here expects.
    """
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            hvpd.connect(f"127.0.0.1:{liar.port}", **{"retry_timeout": 0.01, "timeout": 60.0} | settings)
        )


@pytest.fixture
def listening():
    """Make listeners, which end with the test."""
    with contextlib.ExitStack() as stack:

        def listen(banner=b"", unix_id=None):
            listener = Listener(banner, unix_id)
            stack.callback(listener.close)
            return listener

        yield listen


def tried(client, liar):
    """Multiply until the client has asked for a ticket, and has used or refused it."""
    H = client.objective("quartic").at(X).hessian()

    def asked():
        np.testing.assert_array_equal(H @ np.ones(N), X**2)
        return liar.asked["CreateVectorTicket"] and not client._transport._vectors._opening

    until(asked)
    np.testing.assert_array_equal(H @ np.ones(N), X**2)
    return client._transport._vectors.ready


def ticket(port, **parts):
    whole = {"greeting": PART, "id": PART, "server_proof": PART, "client_proof": PART}
    return curvature_pb2.CreateVectorTicketResponse(port=port, valid_seconds=30, **whole | parts)


# The vector port


def test_no_vector_port_is_used_past_a_proxy_of_the_environment(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not is_proxied("gpu-box")
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert is_proxied("gpu-box")
    monkeypatch.setenv("no_proxy", "gpu-box")
    assert not is_proxied("gpu-box")


@pytest.mark.parametrize(
    ("banner", "parts"),
    [
        (b"", {"id": b"\r\nFLUSHALL\r\n" * 1000}),
        (b"", {"greeting": b"", "id": b"\r\nFLUSHALL\r\n" * 1000}),
        (b"", {"greeting": b""}),
        (b"220 mail.example ", {"greeting": b"220 mail.example "}),
        (b"220 mail.example ESMTP server", {"greeting": b"220 mail.example"}),
        (PART + PART + PART, {}),
        (vector_protocol.MAGIC + bytes(vector_protocol.PROOF_BYTES), {}),
        (vector_protocol.MAGIC + PART, {"id": PART * 2}),
        (vector_protocol.MAGIC + PART, {"id": b""}),
        (vector_protocol.MAGIC + PART, {"server_proof": b""}),
        (vector_protocol.MAGIC + PART, {"client_proof": PART * 1000}),
    ],
)
def test_a_service_that_a_ticket_points_at_receives_nothing(liar, connect, listening, monkeypatch, banner, parts):
    monkeypatch.setattr(
        "hvpd._transport.vector_pool._OPENING_SECONDS", 1.0
    )  # A service that waits for the client to speak first.
    listener = listening(banner)
    liar.vector_port, liar.ticket = listener.port, ticket(listener.port, **parts)
    assert not tried(connect(), liar)
    listener.close()
    assert listener.received == b""
    assert listener.connections == all(len(part) == vector_protocol.PROOF_BYTES for part in parts.values())


def test_a_listener_that_knows_the_greeting_and_not_the_proof_receives_no_secret_and_no_vector(
    liar, connect, listening
):
    listener = listening(vector_protocol.MAGIC + PART + bytes(vector_protocol.PROOF_BYTES))
    liar.vector_port, liar.ticket = listener.port, ticket(listener.port)
    assert not tried(connect(), liar)
    listener.close()
    assert listener.received == vector_protocol.MAGIC + PART


@pytest.mark.parametrize(
    ("banner", "size", "connections"),
    [
        (b"", 16, 1),
        (PART + PART, 16, 1),
        (vector_protocol.MAGIC + bytes(vector_protocol.PROOF_BYTES), 16, 1),
        (vector_protocol.MAGIC + PART, 15, 0),
        (vector_protocol.MAGIC + PART, 40, 0),
    ],
)
def test_a_unix_socket_that_a_ticket_names_receives_nothing(
    liar, connect, listening, monkeypatch, banner, size, connections
):
    """Only sockets of servers have such names. An id of another size is refused."""
    monkeypatch.setattr("hvpd._transport.vector_pool._OPENING_SECONDS", 0.3)
    unix_id = secrets.token_bytes(size)
    port, listener = listening(), listening(banner, unix_id)
    liar.vector_port, liar.ticket = port.port, ticket(port.port, unix_id=unix_id)
    assert not tried(connect(), liar)
    for each in (port, listener):
        each.close()
        assert (each.received, each.connections) == (b"", connections)


def test_a_port_that_the_server_does_not_state_is_not_connected_to(liar, connect, listening):
    stated, other = listening(), listening(vector_protocol.MAGIC + PART)
    liar.vector_port, liar.ticket = stated.port, ticket(other.port)
    assert not tried(connect(), liar)
    for listener in (stated, other):
        listener.close()
        assert listener.connections == 0


@pytest.mark.parametrize("port", [-1, 0, 65536, 65536 + 22, 2**31 - 1, -(2**31)])
def test_a_port_that_is_none_is_not_connected_to(liar, connect, port):
    client = connect()
    liar.vector_port, liar.ticket = port, ticket(port)
    client._transport._vectors.offered = True  # As if the first answer had been another.
    assert not tried(client, liar)


def test_past_a_tunnel_there_is_no_vector_port(liar, connect, listening):
    """The client's port is another than the one that the server states."""
    listener = listening(vector_protocol.MAGIC + PART)
    client = connect()
    liar.vector_port, liar.ticket, liar.port = listener.port, ticket(listener.port), 1
    with pytest.raises(ConnectionError, match="not for the vector port that the server states"):
        client._transport._ticket(30)
    assert listener.connections == 0


# Answers


def product(tag, **fields):
    return curvature_pb2.StreamProductsResponse(tag=tag, **fields).SerializeToString()


def multiply(client):
    return client.objective("quartic").at(X).hessian() @ np.ones(N)


def factors(client):
    request = curvature_pb2.ComputeFactorsRequest()
    return client._transport.factors(request, [2, 3], np.dtype(float), restore=lambda: None)


def register(client):
    return client.register(lambda x: jnp.sum(x**4) / 12, X, platforms=("cpu",))


def objective(**fields):
    """Return answers of GetObjective and CreateObjective, with some fields of the
    bundle changed.
    """
    made = objective_pb2.GetObjectiveResponse(objective=OBJECTIVE)
    for name, value in fields.items():
        if isinstance(value, (list, tensor_pb2.TreeSpec)):
            made.objective.bundle.ClearField(name)
            made.objective.bundle.MergeFrom(objective_pb2.Bundle(**{name: value}))
        else:
            setattr(made.objective.bundle, name, value)
    return made.SerializeToString()


def pages():
    """Yield pages of objectives without end, each with another token."""
    for number in itertools.count(1):
        response = objective_pb2.ListObjectivesResponse(next_page_token=str(number))
        yield response.SerializeToString()


ENDLESS = {
    "products of nothing": ("StreamProducts", lambda: itertools.repeat(product(1)), multiply, "without content"),
    "products of nothing, with figures": (
        "StreamProducts",
        lambda: itertools.repeat(product(1, info=curvature_pb2.ProductInfo(batch_width=1))),
        multiply,
        "without content",
    ),
    "products that were not asked for": (
        "StreamProducts",
        lambda: itertools.repeat(product(7, chunk=b"12345678")),
        multiply,
        "not asked for",
    ),
    "points of nothing": (
        "CreatePoint",
        lambda: itertools.repeat(curvature_pb2.CreatePointResponse(point=POINT).SerializeToString()),
        multiply,
        "without content",
    ),
    "a wish for x": (
        "CreatePoint",
        lambda: itertools.repeat(curvature_pb2.CreatePointResponse(x_wanted=True).SerializeToString()),
        multiply,
        "without content",
    ),
    "factors of nothing": ("ComputeFactors", lambda: itertools.repeat(b""), factors, "without content"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_answer_that_never_ends_is_an_error(liar, connect, what):
    method, answers, call, says = ENDLESS[what]
    liar.lies[method] = answers(), None
    with pytest.raises(hvpd.HvpdError, match=says) as error:
        call(connect())
    assert not isinstance(error.value, hvpd.DeadlineError)


def test_pages_that_never_end_are_an_error(liar, connect, monkeypatch):
    monkeypatch.setattr("hvpd._listing._MOST_PAGES", 100)
    client, answers = connect(), pages()
    method = client._transport.channel.objectives
    monkeypatch.setattr(
        method, "ListObjectives", lambda *_, **__: objective_pb2.ListObjectivesResponse.FromString(next(answers))
    )
    with pytest.raises(hvpd.HvpdError, match="without end"):
        client.objectives()


def test_figures_of_a_product_are_counted_once(liar, connect):
    """A result may come byte by byte, and each message could have figures that the
    client keeps until the end.
    """
    info = curvature_pb2.ProductInfo(batch_width=1)
    result = np.ones(N).tobytes()
    liar.lies["StreamProducts"] = [product(1, info=info, chunk=result[i : i + 1]) for i in range(8 * N)], None
    client = connect()
    np.testing.assert_array_equal(multiply(client), np.ones(N))
    assert client.statistics().products == 1


def test_x_is_sent_once_however_often_it_is_asked_for(liar, connect):
    liar.lies["CreatePoint"] = [curvature_pb2.CreatePointResponse(x_wanted=True).SerializeToString()] * 3, None
    client = connect()
    sent = []
    create = client._transport.channel.create_point
    client._transport.channel.create_point = lambda messages, **settings: create(
        (sent.append(message) or message for message in messages), **settings
    )
    with pytest.raises(hvpd.HvpdError):
        multiply(client)
    assert len(sent) <= 2


def test_blobs_that_were_not_offered_are_not_sent(liar, connect):
    liar.lies["FindMissingBlobs"] = (
        [blob_pb2.FindMissingBlobsResponse(missing_digests=["0" * 64]).SerializeToString()],
        None,
    )
    client = connect()
    for call in (lambda: client._transport.store({"1" * 64: b"data"}), lambda: register(client)):
        with pytest.raises(hvpd.HvpdError, match="1 blobs that were not offered"):
            call()
    assert not liar.asked["UploadBlob"]


def test_a_blob_that_is_asked_for_many_times_is_sent_once(liar, connect):
    client = connect()
    missing = blob_pb2.FindMissingBlobsResponse(missing_digests=["1" * 64] * 1000)
    liar.lies["FindMissingBlobs"] = [missing.SerializeToString()], None
    assert client._transport.missing(["1" * 64]) == ["1" * 64]


@pytest.mark.parametrize("identity", ["", "1" * 63, "../" * 10, "0" * 100_000])
def test_a_point_has_a_digest_for_its_id(liar, connect, identity):
    point = curvature_pb2.Point(id=identity, value=1.0)
    gradient = curvature_pb2.CreatePointResponse(chunk=np.ones(N).tobytes())
    liar.lies["CreatePoint"] = (
        [curvature_pb2.CreatePointResponse(point=point).SerializeToString(), gradient.SerializeToString()],
        None,
    )
    with pytest.raises(hvpd.HvpdError, match="id that is no digest"):
        multiply(connect())


Spec = tensor_pb2.TreeSpec


@pytest.mark.parametrize(
    "bundle",
    [
        {"n": N + 1},
        {"n": -N},
        {"n": 2**62, "x_leaves": [tensor_pb2.ArraySpec(dtype="float64", shape=[2**62])]},
        {"n": 2**62, "x_leaves": [tensor_pb2.ArraySpec(dtype="float64", shape=[2**31, 2**31])]},
        {"x_leaves": [tensor_pb2.ArraySpec(dtype="float64", shape=[-1, -N])]},
        {"x_leaves": [tensor_pb2.ArraySpec(dtype="float64", shape=[2**63 - 1] * 100_000)]},
        {"x_leaves": []},
        {"dtype": "V1000000000"},
        {"dtype": "object"},
        {"x_tree": Spec(kind=77)},
        {"x_tree": Spec(kind=Spec.KIND_LIST, children=[Spec(kind=Spec.KIND_LEAF)] * 2)},
        {
            "n": 100_000,
            "x_leaves": [tensor_pb2.ArraySpec(dtype="float64", shape=[])] * 100_000,
            "x_tree": Spec(
                kind=Spec.KIND_DICT,
                keys=[Spec.Key(text="a" * 1_000_000)],
                children=[Spec(kind=Spec.KIND_LIST, children=[Spec(kind=Spec.KIND_LEAF)] * 100_000)],
            ),
        },
    ],
    ids=lambda bundle: "-".join(bundle),
)
def test_an_objective_that_contradicts_itself_is_refused_at_once(liar, connect, bundle):
    liar.lies["GetObjective"] = [objective(**bundle)], None
    started = time.monotonic()
    with pytest.raises(hvpd.HvpdError, match="an objective that cannot be read") as error:
        connect().objective("quartic")
    assert len(str(error.value)) < 2000
    assert time.monotonic() - started < 20


def test_layers_of_one_leaf_again_and_again_are_refused(liar, connect):
    layer = objective_pb2.DenseLayer(kernel=0)
    made = objective_pb2.GetObjectiveResponse.FromString(
        objective(n=6, x_leaves=[tensor_pb2.ArraySpec(dtype="float64", shape=[2, 3])])
    )
    made.objective.derivation.dense_layers.append(layer)
    liar.lies["GetObjective"] = [made.SerializeToString()], None
    client = connect()
    assert len(client.objective("quartic").dense_layers()) == 1
    made.objective.derivation.dense_layers.append(layer)
    liar.lies["GetObjective"] = [made.SerializeToString()], None
    with pytest.raises(hvpd.HvpdError, match="do not make one"):
        client.objective("quartic").dense_layers()


def test_factors_that_no_memory_has_room_for_are_an_error(connect):
    request = curvature_pb2.ComputeFactorsRequest()
    with pytest.raises(hvpd.HvpdError, match="too little memory"):
        connect()._transport.factors(request, [2**28], np.dtype(float), restore=lambda: None)


@pytest.mark.parametrize(
    "version", ["0.0.1", "abc", "1", "1.2", "1.2.3.4", "9" * 100_000, "-1.0.0", "\u0661.\u0662.\u0663"]
)
def test_a_version_of_stablehlo_that_is_none_is_refused(version):
    with pytest.raises(hvpd.IncompatibleError, match="the server reads StableHLO"):
        portable.oldest_reader(version)


@pytest.mark.parametrize("count", [0, 2])
def test_the_usage_of_one_tenant_is_one(liar, connect, count):
    liar.lies["GetUsage"] = [server_pb2.GetUsageResponse(usages=[server_pb2.Usage()] * count).SerializeToString()], None
    with pytest.raises(hvpd.HvpdError, match=f"usage of {count} tenants"):
        connect().usage()


@pytest.mark.parametrize("seconds", [10**9, 315_576_000_000])
def test_a_pause_that_the_server_asks_for_ends_with_the_time_to_retry(liar, connect, seconds):
    retry = any_pb2.Any()
    retry.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds)))
    status = status_pb2.Status(code=8, message="full", details=[retry])
    liar.lies["GetObjective"] = [], (8, "full", status.SerializeToString())
    started = time.monotonic()
    with pytest.raises(hvpd.OverloadedError, match="full"):
        connect(timeout=None, retry_timeout=5.0).objective("quartic")
    assert time.monotonic() - started < 20


# Texts on terminals


EVIL = "\u202egnp.exe\x1b]0;owned\x07\x1b[2J\r\x00\u2066\u200b"


def test_texts_of_a_server_do_not_steer_a_terminal(liar, connect):
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=f"GONE{EVIL}", domain="hvpd"))
    identity = any_pb2.Any()
    identity.Pack(error_details_pb2.RequestInfo(request_id=EVIL))
    status = status_pb2.Status(code=5, message=EVIL * 20, details=[info, identity])
    liar.lies["GetObjective"] = [], (5, EVIL * 20, status.SerializeToString())
    with pytest.raises(hvpd.NotFoundError, match=r"\\u202egnp\.exe\\x1b") as error:
        connect().objective("quartic")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 8000
    assert (error.value.reason, error.value.request_id.isprintable()) == ("NOT_FOUND", True)


def test_names_of_a_server_do_not_steer_a_terminal(liar, connect, capsys):
    made = objective_pb2.GetObjectiveResponse.FromString(objective(precision=EVIL))
    made.objective.name = made.objective.derivation.mode = EVIL
    made.objective.derivation.recognised[EVIL] = made.objective.derivation.presumed[EVIL] = 1
    liar.lies["GetObjective"] = [made.SerializeToString()], None
    listed = objective_pb2.ListObjectivesResponse(objectives=[made.objective])
    liar.lies["ListObjectives"] = [listed.SerializeToString()], None
    liar.lies["GetUsage"] = (
        [server_pb2.GetUsageResponse(usages=[server_pb2.Usage(tenant=EVIL)]).SerializeToString()],
        None,
    )
    served = server_pb2.GetServerResponse(min_protocol=1, max_protocol=1, version=EVIL, device_kind=EVIL, platform=EVIL)
    liar.lies["GetServer"] = [served.SerializeToString()], None
    client = connect()
    found = client.objective("quartic")
    for shown in (repr(client), repr(found), repr(found.at(X)), repr(client.objectives()), repr(client.usage())):
        assert shown.isprintable()
    address = ["--address", client.address]
    for command in (["objectives"], ["usage"], ["info"], ["check", "quartic", "--probes", "1"]):
        assert main.main([*command, *address]) in (0, 3)
        said = capsys.readouterr()
        assert "\\u202e" in said.out
        assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
    liar.lies["GetObjective"] = [], (5, EVIL, None)
    assert main.main(["check", "quartic", *address]) == 1
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))
