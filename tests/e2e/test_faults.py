"""Faults around a solve: the server is killed, drains, is full, evicts, or is absent,
or the client is gone. No result is lost.
"""

import concurrent.futures
import ctypes
import hashlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from grpc_health.v1 import health_pb2, health_pb2_grpc

import hvpd
from hvpd_server.tenancy import token_file
from tests.support.objectives import quadratic


@pytest.fixture(scope="module")
def spd():
    A = np.random.default_rng(0).normal(size=(60, 60))
    return A @ A.T / 60 + np.eye(60)


def test_killed_and_restarted_between_two_products_of_one_operator(serve, spd):
    server = serve()
    with hvpd.connect(server.address) as client:
        H = client.register(quadratic, np.zeros(60), spd, name="spd").at(np.ones(60)).hessian()
        v = np.arange(60.0)
        before = H @ v
        server.kill()
        server.start()
        after = H @ v
        assert client.statistics().retries > 0
    assert np.allclose(before, spd @ v, rtol=1e-12)
    assert np.allclose(after, spd @ v, rtol=1e-12)


def test_killed_in_the_middle_of_a_running_solve(serve, spd):
    """The server dies while CG runs and comes back; CG ends with the right answer."""
    server = serve()
    with hvpd.connect(server.address) as client:
        H = client.register(quadratic, np.zeros(60), spd).at(np.ones(60)).hessian()
        products = 0

        def matvec(v):
            nonlocal products
            products += 1
            if products == 5:
                killer.start()
            return H @ v

        def kill():
            server.kill()
            server.start()

        killer = threading.Thread(target=kill)
        b = np.arange(60.0)
        solution, code = scipy.sparse.linalg.cg(
            scipy.sparse.linalg.LinearOperator((60, 60), matvec, dtype=float), b, rtol=1e-12
        )
        killer.join(120)
    assert code == 0
    assert np.allclose(solution, np.linalg.solve(spd, b), rtol=1e-8)


def test_objectives_data_and_names_survive_a_restart(serve, spd):
    server = serve()
    with hvpd.connect(server.address) as client:
        digest = client.register(quadratic, np.zeros(60), spd, name="team/spd").digest
    assert server.terminate() == 0
    assert "hvpd: stopped" in server.lines
    server.start()
    with hvpd.connect(server.address) as client:
        found = client.objective("team/spd")
        assert found.digest == digest
        assert np.allclose(found.at(np.ones(60)).hessian() @ np.ones(60), spd @ np.ones(60))


def test_sigterm_lets_a_running_product_finish(serve):
    """SIGTERM comes during a product that takes about a second. The product is
    answered, and then the server ends.
    """
    server = serve()
    with hvpd.connect(server.address, retry_timeout=0.5) as client:

        def slow(x, A):
            return jnp.sum(jnp.linalg.matrix_power(A, 200) @ x) ** 2

        n = 700
        A = np.eye(n)[np.random.default_rng(0).permutation(n)]
        H = client.register(slow, np.zeros(n), A).at(np.ones(n)).hessian()
        H @ np.ones(n)
        idle = hvpd.connect(server.address)
        idle.objective(H.point.objective.digest).at(np.ones(n)).hessian() @ np.ones(n)  # leaves an idle stream open
        launched = server.metric("hvpd_launches_total")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(lambda: H @ np.tile(np.ones((n, 1)), 64))
            while server.metric("hvpd_launches_total") == launched:
                assert not future.done()  # 64 vectors are many launches, or one that waits for its compile
            assert server.terminate() == 0
            assert np.allclose(future.result(60), 2 * n)
        with pytest.raises(
            hvpd.UnavailableError, match=f"no answer from the hvpd server at {re.escape(server.address)}"
        ):
            H @ np.ones(n)
        idle.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads of another process can be signalled on Linux only")
def test_sigterm_ends_a_server_whichever_thread_it_reaches(serve):
    """The kernel may give SIGTERM to another thread than the main one, or to the main
    thread just before it waits for a lock.
    """
    server = serve()
    pid = server.process.pid
    threads = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]
    assert ctypes.CDLL(None, use_errno=True).tgkill(pid, max(threads), signal.SIGTERM) == 0, ctypes.get_errno()
    assert server.process.wait(60) == 0


def test_points_that_do_not_fit_come_back_by_themselves(serve):
    """The budget holds two points, and three take turns."""
    n = 1000
    server = serve("--memory-budget", str(2 * 2 * n * 8))
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x: jnp.sum(x**4) / 12, np.zeros(n))
        points = [objective.at(np.full(n, float(value))) for value in (1, 2, 3)]
        for _ in range(2):
            for point in points:
                assert np.array_equal(point.hessian() @ np.ones(n), point.x**2)
        assert client.statistics().retries > 0
        with pytest.raises(hvpd.OverloadedError, match=r"larger than the server's memory budget.*--memory-budget"):
            client.register(lambda x: jnp.sum(x**2), np.zeros(4 * n)).at(np.zeros(4 * n))
    assert server.metric("hvpd_evictions_total") > 0


def test_a_full_disk_refuses_and_recovers(serve):
    """The server's process may write no file above 64 KiB. The system refuses as it
    does on a full disk.
    """
    server = serve()
    with hvpd.connect(server.address) as client:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        A = np.random.default_rng(0).normal(size=(200, 200))
        with pytest.raises(hvpd.OverloadedError, match="the server's store has no room") as error:
            client.register(quadratic, np.zeros(200), A, name="large")
        assert error.value.reason == "DISK_FULL"
        assert list((server.store / "incoming").iterdir()) == []
        with pytest.raises(hvpd.NotFoundError):
            client.objective("large")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        objective = client.register(quadratic, np.zeros(200), A, name="large")
        assert np.allclose(objective.hessp(np.zeros(200), np.ones(200)), (A + A.T) @ np.ones(200) / 2)


def test_a_blob_corrupted_on_disk_is_found_set_aside_and_healed(serve, spd):
    server = serve()
    with hvpd.connect(server.address) as client:
        objective = client.register(quadratic, np.zeros(60), spd, name="healed")
        digest = objective._bundle.data[0].digest
    server.kill()
    blob = server.store / "blobs" / digest[:2] / digest
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    server.start()
    with hvpd.connect(server.address) as client:
        with pytest.raises(hvpd.HvpdError, match="corrupt on the server's disk") as error:
            client.objective("healed").at(np.ones(60))
        assert error.value.reason == "BLOB_CORRUPT"
        assert [path.name.split(".")[0] for path in (server.store / "corrupt").iterdir()] == [digest]
        again = client.register(quadratic, np.zeros(60), spd, name="healed")
        assert np.allclose(again.hessp(np.ones(60), np.ones(60)), spd @ np.ones(60))


def test_no_server_at_the_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # The port is taken, and nothing answers on it, because nothing listens.
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        for timeout in (0.5, None):
            says = f"no hvpd server answers at {address}.*: port .* refuses connections: is `hvpd serve` running"
            with pytest.raises(hvpd.UnavailableError, match=says) as error:
                hvpd.connect(address, connect_timeout=timeout)
            assert error.value.reason == "CONNECTION_REFUSED"
        assert time.monotonic() - started < 8
        assert isinstance(error.value, ConnectionError)


def test_a_host_without_an_address():
    started = time.monotonic()
    with pytest.raises(hvpd.UnavailableError, match=r"gpu-box.invalid has no address .*spelling") as error:
        hvpd.connect("gpu-box.invalid:7070")
    assert error.value.reason == "HOST_NOT_FOUND"
    assert time.monotonic() - started < 8


def test_a_stated_timeout_waits_for_a_server_that_starts(serve):
    server = serve()
    server.kill()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(hvpd.connect, server.address, connect_timeout=120)
        with pytest.raises(hvpd.UnavailableError, match="refuses connections"):
            hvpd.connect(server.address)
        assert not connecting.done()
        server.start()
        with connecting.result() as client:
            assert client.server.version == hvpd.__version__


def test_something_that_is_not_grpc_at_the_address():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(hvpd.UnavailableError, match="no hvpd server answers"):
            hvpd.connect(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout=0.5)


@pytest.mark.parametrize(
    "address", ["gpu-box", ":7070", "host:port", "host:99999", "http://host:7070", " host:7070", 5, b"h:1"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(hvpd.InvalidArgumentError, match="an address must be host:port"):
        hvpd.connect(address)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout": "a"}, "timeout must be a number of seconds"),
        ({"timeout": float("inf")}, r"timeout must be a number of seconds from 0 to 1e\+09, got inf"),
        ({"connect_timeout": 1e10}, "connect_timeout must be a number of seconds"),
        ({"connect_timeout": -1}, "connect_timeout must be a number of seconds"),
        ({"retry_timeout": float("nan")}, "retry_timeout must be a number of seconds"),
        ({"priority": 101}, "priority must be a whole number from -100 to 100, got 101"),
        ({"priority": 0.5}, "priority must be a whole number"),
        ({"priority": True}, "priority must be a whole number"),
        ({"token": "é"}, "a token must consist of printable ASCII"),
        ({"token": "a\nb"}, "a token must consist of printable ASCII"),
    ],
)
def test_options_of_connect_that_are_none(options, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        hvpd.connect("127.0.0.1:1", **options)


def test_a_closed_client_says_so(server):
    client = hvpd.connect(server.address)
    client.close()
    client.close()
    with pytest.raises(hvpd.HvpdError, match="is closed: connect again, and use"):
        client.objectives()


def test_a_timeout_is_the_callers_and_the_next_call_is_fine(serve):
    server = serve()

    def slow(x, A):
        return jnp.sum(jnp.linalg.matrix_power(A, 300) @ x) ** 2

    A = np.eye(600)
    with hvpd.connect(server.address) as client:
        client.register(slow, np.zeros(600), A, name="slow").at(np.ones(600)).hessian() @ np.ones(600)
    with hvpd.connect(server.address, timeout=0.05) as client:
        H = None
        with pytest.raises(
            hvpd.DeadlineError, match=rf"{server.address} did not answer within timeout=0\.05 s|deadline passed"
        ):
            H = client.objective("slow").at(np.ones(600)).hessian()
            H @ np.tile(np.ones((600, 1)), 64)
    with hvpd.connect(server.address) as client:
        assert np.allclose(client.objective("slow").hessp(np.ones(600), np.ones(600)), 2 * 600)


def test_a_client_killed_with_products_in_flight_harms_no_others(server, client):
    objective = client.register(lambda x: jnp.sum(x**4) / 12, np.zeros(200_000), name="victim")
    program = textwrap.dedent("""
        import sys, threading, numpy as np, hvpd
        client = hvpd.connect(sys.argv[1])
        H = client.objective("victim").at(np.ones(200_000)).hessian()
        H @ np.ones(200_000)
        def work():
            while True:
                H @ np.ones((200_000, 16))
        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        print("ready", flush=True)
        threading.Event().wait()
    """)
    victim = subprocess.Popen([sys.executable, "-c", program, server.address], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    with victim.stdout:
        assert victim.stdout.readline() == "ready\n"
        victim.kill()
    victim.wait(60)
    x = np.full(200_000, 3.0)
    assert np.array_equal(objective.at(x).hessian() @ np.ones(200_000), x**2)


def test_threads_of_one_client_and_of_many_are_batched_and_get_their_own(server):
    """Eight threads of two clients ask at one point. Each gets its own product, and
    they share launches.
    """
    n = 2000
    with hvpd.connect(server.address) as one, hvpd.connect(server.address) as two:
        x = np.linspace(0, 1, n)
        A = np.random.default_rng(0).normal(size=(n, n))
        one.register(quadratic, x, A, name="shared")
        operators = [client.objective("shared").at(x).hessian() for client in (one, two)]
        S = (A + A.T) / 2

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(20):
                v = rng.normal(size=n)
                assert np.allclose(operators[seed % 2] @ v, S @ v, rtol=1e-9, atol=1e-9)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert one.statistics().mean_batch_width + two.statistics().mean_batch_width > 2


def test_two_servers_cannot_share_a_port(serve, tmp_path, command):
    server = serve()
    same_port = command("serve", "--port", str(server.port), "--store", str(tmp_path))
    assert same_port.returncode == 1
    assert same_port.stderr.startswith(f"hvpd: cannot start: --port {server.port}: another program listens on it")


@pytest.mark.parametrize("tenant", [None, "vision"])
def test_more_streams_than_the_server_keeps(serve, tmp_path, tenant):
    """A server of eight calls has sixteen clients, and a tenant has half of the calls.
    The server ends idle streams, and their clients come back without an error.
    """
    token, flags = None, ["--max-calls", "8"]
    if tenant is not None:
        token, _ = token_file.create(tmp_path / "tokens.json", tenant, ["use", "publish"])
        flags += ["--tokens", str(tmp_path / "tokens.json")]
    server = serve(*flags)
    clients = [hvpd.connect(server.address, token=token) for _ in range(16)]
    clients[0].register(lambda x: jnp.sum(x**4) / 12, np.zeros(3), name="many")
    operators = [client.objective("many").at(np.arange(3.0)).hessian() for client in clients]
    for _ in range(2):
        for H in operators:
            assert np.array_equal(H @ np.ones(3), np.arange(3.0) ** 2)
    for client in clients:
        client.close()


def test_data_that_is_needed_counts_and_stays(serve):
    """Data and the points that hold on to it share the budget. An objective in use
    keeps its data.
    """
    n, rows = 100, 200
    server = serve("--memory-budget", str(2 * rows * n * 8 + 10 * 2 * n * 8))
    rng = np.random.default_rng(0)
    with hvpd.connect(server.address) as client:
        matrices = [rng.normal(size=(rows, n)) for _ in range(3)]
        objectives = [client.register(lambda x, X: jnp.sum((X @ x) ** 2) / 2, np.zeros(n), X) for X in matrices]
        for _ in range(2):
            for objective, X in zip(objectives, matrices, strict=True):
                assert np.allclose(objective.hessp(np.zeros(n), np.ones(n)), X.T @ (X @ np.ones(n)))
        assert server.metric("hvpd_resident_bytes") <= 2 * rows * n * 8 + 10 * 2 * n * 8
        with pytest.raises(hvpd.OverloadedError, match="memory budget"):
            client.register(lambda x, X: jnp.sum(X @ x), np.zeros(n), np.zeros((5 * rows, n))).at(np.zeros(n))


def test_a_computation_that_never_ends_blocks_neither_health_nor_others_nor_the_end(serve):
    """The loop's condition depends on x alone, and no derivative goes through it. At
    some points the loop ends, and at others it never does.
    """
    server = serve("--drain", "0.5")

    def trap(x):
        held = jax.lax.stop_gradient(x[0])
        return jnp.sum(x**4) / 12 * jax.lax.while_loop(lambda count: held > 0, lambda count: count + 1, 1.0)

    with hvpd.connect(server.address) as client:
        objective = client.register(trap, np.zeros(3), name="trap")
        good = -np.ones(3)
        assert np.allclose(objective.hessp(good, np.ones(3)), 1)
        with hvpd.connect(server.address, timeout=0.5) as impatient, pytest.raises(hvpd.DeadlineError):
            impatient.objective("trap").at(np.ones(3))
        with grpc.insecure_channel(server.address) as channel:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert np.allclose(objective.hessp(2 * good, np.ones(3)), 4)
    assert server.terminate() == 0


def test_damaged_records_affect_no_other_objective_and_registering_repairs_them(serve, spd):
    """Each record is damaged in another way, all at once."""
    server = serve()
    matrices = {name: spd + index for index, name in enumerate(["named", "marker", "lost", "empty", "sound"])}
    with hvpd.connect(server.address) as client:
        digests = {name: client.register(quadratic, np.zeros(60), A, name=name).digest for name, A in matrices.items()}
        for name in ("no-record", "path", "other"):
            client.register(quadratic, np.zeros(60), matrices["named"], name=name)
    server.kill()
    blobs, markers, names = (server.store / part for part in ("blobs", "objectives", "names"))
    for name, content in {
        "named": b"",
        "no-record": b"[1]",
        "path": b'{"name": "path", "digest": "../../../etc/passwd"}',
        "other": json.dumps({"name": "stray", "digest": digests["sound"]}).encode(),
    }.items():
        record = names / hashlib.sha256(name.encode()).hexdigest()
        assert record.is_file()
        record.write_bytes(content)
    (names / "directory").mkdir()
    (server.store / "incoming" / "directory").mkdir()
    (markers / digests["marker"]).write_bytes(b"")
    (markers / ("0" * 64)).write_text('{"create_time_ns": 1}')
    (blobs / digests["lost"][:2] / digests["lost"]).unlink()
    (blobs / digests["empty"][:2] / digests["empty"]).write_bytes(b"")
    server.start()
    with hvpd.connect(server.address) as client:
        client.objectives()
        sound = client.objective("sound").hessp(np.ones(60), np.ones(60))
        assert np.allclose(sound, matrices["sound"] @ np.ones(60))
        for name, A in matrices.items():
            assert client.register(quadratic, np.zeros(60), A, name=name).digest == digests[name]
            assert np.allclose(client.objective(name).hessp(np.ones(60), np.ones(60)), A @ np.ones(60))
        assert sorted(listing.name for listing in client.objectives()) == sorted(matrices)
        for name in ("no-record", "path", "other"):
            with pytest.raises(hvpd.NotFoundError):
                client.objective(name)


def test_an_objective_is_repaired_after_every_blob_was_altered(serve, spd):
    server = serve()
    with hvpd.connect(server.address) as client:
        digest = client.register(quadratic, np.zeros(60), spd, name="damaged").digest
    server.kill()
    for path in (server.store / "blobs").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" + path.read_bytes()[1:])
    server.start()
    with hvpd.connect(server.address) as client:
        client.objectives()
        assert client.register(quadratic, np.zeros(60), spd, name="damaged").digest == digest
        with pytest.raises(hvpd.HvpdError, match="corrupt on the server's disk"):  # Data is read with the first point.
            client.objective("damaged").at(np.ones(60))
        client.register(quadratic, np.zeros(60), spd, name="damaged")
        product = client.objective("damaged").hessp(np.ones(60), np.ones(60))
        assert np.allclose(product, spd @ np.ones(60))
        assert [listing.name for listing in client.objectives()] == ["damaged"]


def test_the_error_for_a_lost_part_says_to_register_again(serve, spd, tmp_path):
    server = serve(cache=tmp_path)
    with hvpd.connect(server.address) as client:
        bundle = client.register(quadratic, np.zeros(60), spd, name="parts")._bundle
    server.kill()
    digest = bundle.programs["objective"].digest
    (server.store / "blobs" / digest[:2] / digest).write_bytes(b"")
    for compiled in tmp_path.iterdir():
        compiled.unlink()
    server.start()
    with hvpd.connect(server.address) as client:
        with pytest.raises(hvpd.HvpdError, match="has lost a part on the server's disk: register it again"):
            client.objective("parts").at(np.ones(60))
        mended = client.register(quadratic, np.zeros(60), spd, name="parts")
        assert np.allclose(mended.hessp(np.ones(60), np.ones(60)), spd @ np.ones(60))


@pytest.mark.parametrize("call", ["H @ v", "H @ wide", "objective.at(rng.normal(size=20))", "client.objectives()"])
def test_a_client_goes_on_after_ctrl_c(server, client, call):
    """The interrupt comes at random times, many times. Each next call answers
    correctly.

    Python ignores errors in a destructor, so an interrupt in one of gRPC's is lost. The
    test then interrupts again, as a user would.
    """
    client.register(lambda x: jnp.sum(x**4) / 12, np.zeros(20), name="interrupted")
    program = textwrap.dedent("""
        import signal, sys, numpy as np, hvpd
        client = hvpd.connect(sys.argv[1], retry_timeout=30)
        objective = client.objective("interrupted")
        rng = np.random.default_rng(0)
        x, v, wide = np.arange(20.0), np.ones(20), np.ones((20, 100))
        H = objective.at(x).hessian()
        strikes = 0
        for strike in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0007 * strike, 2.0)
                while True:
                    CALL
            except KeyboardInterrupt:
                strikes += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert np.array_equal(H @ v, x**2)
            assert np.array_equal(objective.at(x + strike).hessian() @ v, (x + strike) ** 2)
        print(strikes, flush=True)
    """).replace("CALL", call)
    header = "import signal\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    done = subprocess.run(
        [sys.executable, "-c", header + program, server.address],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout == "40\n", done.stderr[-3000:]


def test_data_that_a_server_has_lost_is_sent_again(serve):
    """The data of `objective.at(x, *data)` was pruned, its file is damaged, or the
    store is another one.
    """
    server = serve()
    rng = np.random.default_rng(0)
    x, first, other = rng.normal(size=(3, 6))
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x, a: jnp.sum(a * x**4) / 12, x, first)
        point = objective.at(x, other)
        step = point.moved(1.0, np.ones(6))
        server.kill()
        path = next(path for path in server.store.glob("blobs/*/*") if path.read_bytes() == other.tobytes())
        path.unlink()
        server.start()
        np.testing.assert_allclose(point.hessian() @ np.ones(6), other * x**2)
        server.kill()
        path.write_bytes(b"damaged")
        server.start()
        np.testing.assert_allclose(step.hessian() @ np.ones(6), other * (x + 1) ** 2)
        server.kill()
        path.unlink()
        server.start()
        other += 1
        with pytest.raises(hvpd.InvalidArgumentError, match="its arrays were changed since it was made"):
            point.hessian() @ np.ones(6)
