"""Clients and servers with and without the vector port: products are the same, and no
caller notices the difference.
"""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
import trustme

import hvpd
from hvpd._transport.exchange import Asked
from hvpd._wire import vector_socket
from hvpd_server.tenancy import token_file
from tests.support.waiting import until

N = 300
X = np.linspace(0.5, 1.5, N)


def quartic(x, w):
    return jnp.sum(w * x**4) / 12


W = np.linspace(1.0, 2.0, N)


def registered(client, name=None):
    return client.register(quartic, X, W, name=name).at(X).hessian()


def past(client, H):
    """Multiply until products go past gRPC; return whether they do at all."""
    pool = client._transport._vectors
    check(H)
    until(lambda: not pool._opening)
    return pool.ready


def by_tcp(client):
    """Let a client connect as one on another machine does; return it."""
    client._transport._vectors.unix = False
    return client


def check(H, k=None):
    V = np.random.default_rng(0).normal(size=(N, k) if k else N)
    np.testing.assert_allclose(H @ V, ((W * X**2) * V.T).T, rtol=1e-12)


@pytest.fixture(scope="module")
def plain(serve_module):
    """Yield the address of a server for all tests that leave it unchanged."""
    return serve_module().address


@pytest.fixture
def client_of():
    """Connect a client; all clients end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(hvpd.connect(*args, **settings))


def lines(server, text):
    return [line for line in server.lines if text in line]


def test_products_go_past_grpc_with_the_same_results(serve, client_of):
    server = serve()
    client = client_of(server.address)
    H = registered(client)
    before = H @ np.ones(N)
    assert past(client, H)
    assert client._transport._vectors._idle[-1].unix
    check(H)  # This product is the first that is sure to go past gRPC, and so ends the stream.
    until(lambda: server.metric("hvpd_open_streams") == 1)
    for k in (None, 1, 3, 64):
        check(H, k)
    np.testing.assert_array_equal(H @ np.ones(N), before)
    assert H.quadratic_form(np.ones(N)) == pytest.approx((W * X**2).sum(), rel=1e-12)
    check(H, 200)  # It is wider than a launch, so several products go over gRPC.
    statistics = client.statistics()
    assert (statistics.retries, statistics.vectors) == (0, 1 + 1 + 1 + 1 + 1 + 3 + 64 + 1 + 1 + 200)
    assert 0 < statistics.compute_seconds < statistics.seconds
    assert server.metric("hvpd_request_seconds_count") > 0


@pytest.mark.parametrize("cause", ["another machine", "another network namespace"])
def test_where_the_unix_socket_is_not_products_go_by_tcp(plain, client_of, monkeypatch, cause):
    """A container may share the address, and not the namespace of the socket's name."""
    client = client_of(plain)
    if cause == "another machine":
        by_tcp(client)
    else:
        monkeypatch.setattr(vector_socket, "unix_name", lambda unix_id: f"\0hvpd/elsewhere/{unix_id.hex()}")
    H = registered(client)
    assert past(client, H)
    assert not client._transport._vectors._idle[-1].unix
    check(H)


def test_threads_of_one_client_do_not_wait_for_each_other(plain, client_of):
    client = client_of(plain)
    H = registered(client)
    assert past(client, H)
    failures = []

    def solve():
        for _ in range(50):
            try:
                check(H)
            except BaseException as error:  # noqa: BLE001 - the test raises it
                failures.append(error)

    threads = [threading.Thread(target=solve) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert client.statistics().retries == 0


def test_a_server_that_has_none_is_spoken_to_by_grpc(serve, client_of):
    client = client_of(serve("--vector-port", "off").address)
    assert client._transport.server.vector_port == 0
    assert not past(client, registered(client))
    check(client.objectives() and registered(client))


@contextlib.contextmanager
def relayed(to, address=("127.0.0.1", 0)):
    """Relay one connection at an address to a port of this machine. Yield the relay's
    port, and what the client has sent so far.
    """
    sent = bytearray()

    def pump(source, target, seen):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                seen += piece
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def forward(listener):
        with contextlib.suppress(OSError):
            ours, _ = listener.accept()
            theirs = socket.create_connection(("127.0.0.1", to))
            with ours, theirs:
                back = threading.Thread(target=pump, args=(theirs, ours, bytearray()))
                back.start()
                pump(ours, theirs, sent)
                back.join(30)

    with socket.create_server(address) as listener:
        thread = threading.Thread(target=forward, args=(listener,))
        thread.start()
        yield listener.getsockname()[1], sent
        thread.join(30)
        assert not thread.is_alive()


def test_a_client_behind_a_proxy_does_not_go_past_it(serve, client_of):
    with relayed(serve().port) as (port, _), hvpd.connect(f"127.0.0.1:{port}") as client:
        assert not past(client, registered(client))
        check(registered(client))


def test_vectors_go_past_a_mesh_that_encrypts_only_grpcs_port(serve):
    """The mesh keeps the port's number, so the client cannot notice it."""
    server, v = serve(), np.random.default_rng(7).normal(size=N)
    with relayed(server.port, ("127.0.0.2", server.port)) as (port, mesh):
        with hvpd.connect(f"127.0.0.2:{port}", insecure=True) as client:
            pool, vectors = by_tcp(client)._transport._vectors, client._transport.server.vector_port
            with relayed(vectors, ("127.0.0.2", vectors)) as (_, network):
                H = registered(client)
                assert past(client, H)
                H @ v
                assert v.tobytes() in network
                assert v.tobytes() not in mesh
                pool.close()


def test_a_blocked_port_costs_callers_nothing(plain, client_of, monkeypatch):
    """The client tries the connection beside its products, and then for a while no
    more.
    """
    client = by_tcp(client_of(plain))
    H = registered(client)
    tried = threading.Semaphore(0)
    connect, blocked = socket.create_connection, threading.Event()

    def black_hole(address, timeout):
        tried.release()
        assert blocked.wait(30)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", black_hole)
    for _ in range(20):
        check(H)
    assert tried.acquire(timeout=30)
    blocked.set()
    until(lambda: not client._transport._vectors._opening)
    for _ in range(20):
        check(H)
    assert not tried.acquire(blocking=False)
    assert client.statistics().retries == 0
    monkeypatch.setattr(socket, "create_connection", connect)
    client._transport._vectors._not_before = 0.0
    assert past(client, H)


def test_another_service_on_the_port_gets_no_vectors(plain, client_of, monkeypatch):
    client = by_tcp(client_of(plain))
    H = registered(client)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        got = []

        def listen():
            other, _ = listener.accept()
            with other:
                other.settimeout(30)
                other.sendall(bytes(64))  # More than a greeting has.
                while piece := other.recv(1000):
                    got.append(piece)

        thread = threading.Thread(target=listen)
        thread.start()
        connect = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda address, *rest: connect(listener.getsockname(), *rest))
        assert not past(client, H)
        thread.join(30)
        assert not thread.is_alive()
    assert got == []


BIG = np.linspace(0.5, 1.5, 1 << 16)
"""512 KiB: products of it use shared memory."""


def big(client):
    """Return the operator of a large point, when its products are in shared memory."""
    H = client.register(lambda x: jnp.sum(x**4) / 12, BIG).at(BIG).hessian()
    vectors = client._transport._vectors
    until(lambda: check_big(H) or vectors.ready)
    check_big(H)
    assert vectors._idle[-1]._segment is not None
    return H


def check_big(H, v=None):
    v = np.random.default_rng(0).normal(size=len(BIG)) if v is None else v
    np.testing.assert_allclose(H @ v, (BIG**2 * v.T).T, rtol=1e-12)


def segments(pid):
    """Return how many segments of shared memory a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:hvpd-vectors")


MULTIPLY = """
import sys
import numpy as np
import hvpd

with hvpd.connect(sys.argv[1]) as client:
    objective = client.objective(sys.argv[2])
    H, v = objective.at(np.ones(objective.n)).hessian(), np.ones(objective.n)
    while client._transport._vectors.ready is False or client._transport._vectors._idle[-1]._segment is None:
        H @ v
    print("multiplying", flush=True)
    while True:
        H @ v
"""


def test_large_vectors_lie_in_shared_memory_that_ends_with_either_side(serve, client_of):
    """After `kill -9` of a client in the middle of products, the server has nothing of
    it. After `kill -9` of the server, the client asks the next one.
    """
    server, before = serve(), segments("self")
    client = client_of(server.address)
    H = big(client)
    assert segments(server.process.pid) == 1
    check_big(H, np.random.default_rng(1).normal(size=(len(BIG), 3)))
    assert H.quadratic_form(np.ones(len(BIG))) == pytest.approx((BIG**2).sum(), rel=1e-12)
    assert segments(server.process.pid) == 1  # A wider block needs more, and takes its place.
    other = subprocess.Popen(
        [sys.executable, "-c", MULTIPLY, server.address, H.point.objective.digest], stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout.readline() == b"multiplying\n"
        assert segments(server.process.pid) == 2
        other.kill()
    until(lambda: segments(server.process.pid) == 1)
    check_big(H)
    server.kill()
    server.start()
    check_big(H)
    assert client.statistics().retries > 0
    client._transport._vectors._not_before = 0.0
    until(lambda: check_big(H) or client._transport._vectors.ready)
    check_big(H)
    until(lambda: segments("self") <= before + 1 and segments(server.process.pid) == 1)


def test_a_client_that_changes_its_vectors_meanwhile_changes_only_its_own_products(plain, client_of):
    """Both clients ask at one point, so that their products share launches."""
    client, faulty = client_of(plain), client_of(plain)
    H, J = big(client), big(faulty)
    stop = threading.Event()
    memory = faulty._transport._vectors._idle[-1]._segment.memory.view(float)

    def change():
        while not stop.is_set():
            memory[:] = np.nan

    def ask():
        while not stop.is_set():
            J @ np.ones(len(BIG))

    threads = [threading.Thread(target=each) for each in (change, ask)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            check_big(H)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    check_big(J)


def unix_sockets():
    """Return the names of all servers' Unix sockets."""
    listed = Path("/proc/net/unix").read_text().split()
    return {word for word in listed if word.startswith("@hvpd/vectors/")}


@pytest.mark.parametrize("way", ["TCP", "Unix socket"])
def test_a_solve_rides_through_kill_9_and_finds_the_other_port(serve, client_of, way):
    server = serve()
    client = client_of(server.address)
    if way == "TCP":
        by_tcp(client)
    H = registered(client)
    assert past(client, H)

    def peer():
        return client._transport._vectors._idle[-1]._connection.socket.getpeername()

    peers = {peer()}
    b = np.random.default_rng(1).normal(size=N)
    for _ in range(2):
        server.kill()
        started = threading.Thread(target=server.start)
        started.start()
        x, info = scipy.sparse.linalg.cg(H, b, rtol=1e-10)
        started.join()
        assert info == 0
        np.testing.assert_allclose(x, b / (W * X**2), rtol=1e-8)
        client._transport._vectors._not_before = 0.0
        assert past(client, H)
        peers.add(peer())
    assert client.statistics().retries > 0
    assert len(peers) == 3
    if way == "Unix socket":  # The names of the killed servers' sockets are gone.
        until(lambda: {f"@{each[1:].decode()}" for each in peers} & unix_sockets() == {f"@{peer()[1:].decode()}"})


def test_a_draining_server_ends_cleanly_and_refuses_new_products(serve, client_of):
    server = serve()
    client = client_of(server.address, retry_timeout=0.5)
    H = registered(client)
    assert past(client, H)
    assert server.terminate() == 0
    with pytest.raises(hvpd.UnavailableError):
        H @ np.ones(N)


def test_a_timeout_is_kept_and_the_next_product_is_made(plain, client_of, monkeypatch):
    client = client_of(plain, timeout=60)

    def slow(x, A):
        return jnp.sum(jnp.linalg.matrix_power(A, 300) @ x) ** 2

    H = client.register(slow, np.zeros(600), np.eye(600)).at(np.ones(600)).hessian()
    until(lambda: np.allclose(H @ np.ones(600), 1200) and client._transport._vectors.ready)
    stream = client._transport._vectors._idle[-1]
    with monkeypatch.context() as patch:
        patch.setattr(client._transport._retry, "timeout", 0.005)
        with pytest.raises(hvpd.DeadlineError, match=r"did not answer within timeout=0\.005 s|deadline passed"):
            H @ np.ones(600)
    until(lambda: np.allclose(H @ np.ones(600), 1200) and client._transport._vectors.ready)
    assert stream not in client._transport._vectors._idle


def test_a_product_that_fails_says_which_it_was(serve, client_of):
    server = serve()
    client = client_of(server.address)
    H = registered(client)
    assert past(client, H)
    point = H.point
    with pytest.raises(hvpd.HvpdError, match=r"\[request [0-9a-f]+/\d+\]") as error:
        point.multiply(np.ones((1, N)), 99)
    assert error.value.reason == "UNKNOWN_OPERATOR"
    assert error.value.request_id.split("/")[0] == client._transport._vectors._idle[-1].request_id
    until(lambda: lines(server, error.value.request_id))
    check(H)


def test_an_evicted_point_comes_back(serve, client_of):
    client = client_of(serve("--memory-budget", "30K").address)
    objective = client.register(quartic, X, W)
    H = objective.at(X).hessian()
    assert past(client, H)
    for step in range(1, 8):
        objective.at(X + step).hessian() @ np.ones(N)
    check(H)
    assert client.statistics().retries > 0


def test_ctrl_c_in_the_middle_costs_a_connection_and_nothing_else(plain, client_of, monkeypatch):
    client = client_of(plain)
    H = registered(client)
    assert past(client, H)
    stream = client._transport._vectors._idle[-1]

    def struck():
        raise KeyboardInterrupt

    monkeypatch.setattr(stream._connection, "next_event", struck)
    with pytest.raises(KeyboardInterrupt):
        H @ np.ones(N)
    assert stream._connection.socket.fileno() < 0
    assert past(client, H)
    check(H)


def test_an_interrupt_that_breaks_a_lock_is_still_one(plain, client_of, monkeypatch):
    """An interrupt in the middle of threading.Condition.wait breaks its lock. gRPC's
    channels have many such waits.
    """
    client = client_of(plain)
    H = registered(client)

    def interrupt():
        raise KeyboardInterrupt

    def struck():
        try:
            interrupt()
        finally:
            raise RuntimeError("release unlocked lock")

    def broken():
        raise RuntimeError("something else")

    for strikes, raised in ((struck, KeyboardInterrupt), (broken, RuntimeError)):
        assert past(client, H)
        monkeypatch.setattr(client._transport._vectors._idle[-1]._connection, "next_event", strikes)
        try:
            interrupt()  # An earlier interrupt, which the caller still handles.
        except KeyboardInterrupt:
            with pytest.raises(raised):
                H @ np.ones(N)
    check(H)


# Admission


class Secured:
    """The files of a server that encrypts and authenticates."""

    def __init__(self, root):
        self.root, self.authority = root, trustme.CA()
        self.ca, self.tokens = root / "ca.pem", root / "tokens.json"
        self.authority.cert_pem.write_to_path(self.ca)
        self.certify()

    def certify(self, authority=None):
        leaf = (authority or self.authority).issue_cert("127.0.0.1")
        leaf.cert_chain_pems[0].write_to_path(self.root / "server.pem")
        leaf.private_key_pem.write_to_path(self.root / "server.key")

    @property
    def flags(self):
        tls = "--tls-cert", str(self.root / "server.pem"), "--tls-key", str(self.root / "server.key")
        return *tls, "--tokens", str(self.tokens)

    def token(self, tenant, *rights):
        token, grant = token_file.create(self.tokens, tenant, rights or ("use", "publish"))
        return token, grant.id


@pytest.fixture
def secured(tmp_path):
    return Secured(tmp_path)


def test_over_tls_with_a_token_it_is_the_same(secured, serve, client_of):
    token, _ = secured.token("vision")
    client = by_tcp(client_of(serve(*secured.flags).address, token=token, ca=secured.ca))
    H = registered(client)
    assert past(client, H)
    sock = client._transport._vectors._idle[-1]._connection.socket
    assert sock.version() == "TLSv1.3"
    for k in (None, 64):
        check(H, k)
    big = np.random.default_rng(0).normal(size=200_000)
    B = client.register(lambda x: jnp.sum(x**4) / 12, big).at(big).hessian()
    np.testing.assert_allclose(B @ np.ones_like(big), big**2, rtol=1e-12)
    assert client.statistics().retries == 0


def test_clients_show_their_certificates_there_too(secured, serve, client_of):
    leaf = secured.authority.issue_cert("solver.example")
    leaf.cert_chain_pems[0].write_to_path(secured.root / "client.pem")
    leaf.private_key_pem.write_to_path(secured.root / "client.key")
    server = serve(*secured.flags[:4], "--tls-client-ca", str(secured.ca))
    files = {"ca": secured.ca, "cert": secured.root / "client.pem", "key": secured.root / "client.key"}
    client = by_tcp(client_of(server.address, **files))
    H = registered(client)
    for file in files.values():
        file.unlink()  # The client has read its files when it connected.
    assert past(client, H)
    check(H)


def test_another_certificate_is_shown_from_the_next_connection_on(secured, serve, client_of):
    token, _ = secured.token("vision")
    server = serve(*secured.flags)
    client = by_tcp(client_of(server.address, token=token, ca=secured.ca))
    H = registered(client)
    assert past(client, H)

    def shown(client):
        return client._transport._vectors._idle[-1]._connection.socket.getpeercert(binary_form=True)

    before = shown(client)
    secured.certify()
    other = by_tcp(client_of(server.address, token=token, ca=secured.ca))
    H = registered(other)
    assert past(other, H)
    assert shown(other) != before
    check(H)


def test_a_connection_ends_within_two_seconds_of_its_token(secured, serve, client_of):
    """Products fail at once, and idle connections end. A busy machine may delay one
    try. The server looks once a second.
    """
    secured.token("first")  # A server does not start without a file of tokens.
    server = serve(*secured.flags)

    def seconds_to_end():
        (token, identity), (other, idle_identity) = secured.token("vision"), secured.token("speech")
        client = client_of(server.address, token=token, ca=secured.ca)
        idle = client_of(server.address, token=other, ca=secured.ca)
        H, J = registered(client), registered(idle)
        assert past(client, H)
        assert past(idle, J)
        began = time.monotonic()
        for each in (identity, idle_identity):
            token_file.revoke(secured.tokens, each)
        until(lambda: not idle._transport._vectors._idle[-1].quiet)
        seconds = time.monotonic() - began
        with pytest.raises(hvpd.AccessError):
            check(H)
        return seconds

    assert any(seconds_to_end() < 2 for _ in range(5))


def test_a_point_needs_its_x_on_the_vector_port_too(secured, serve, client_of):
    vision, speech = secured.token("vision")[0], secured.token("speech")[0]
    server = serve(*secured.flags)
    client = client_of(server.address, token=vision, ca=secured.ca)
    other = client_of(server.address, token=speech, ca=secured.ca)
    H, J = registered(client), registered(other)
    assert past(client, H)
    assert past(other, J)
    theirs = client.objective(H.point.objective.digest).at(X + 1)
    asked = Asked(theirs._id)

    def restore():
        raise LookupError("it was said not to be there")

    with pytest.raises(LookupError):
        other._transport.multiply(asked, np.ones((1, N)), restore=restore)
    assert client._transport.multiply(asked, np.ones((1, N)), restore=restore).shape == (1, N)


def test_the_port_is_where_it_was_said_to_be(serve, client_of):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = serve("--vector-port", str(port))
    client = client_of(server.address)
    assert client._transport.server.vector_port == port
    assert past(client, registered(client))
    server.kill()
    server.start()
    check(registered(client_of(server.address)))


def test_a_port_that_is_taken_is_said_before_anything_is_served(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "hvpd_server",
                "--port",
                "0",
                "--vector-port",
                str(port),
                "--store",
                str(tmp_path / "store"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port} for vectors" in done.stderr
