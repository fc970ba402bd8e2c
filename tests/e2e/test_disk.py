"""A disk that is really full. Requests that need room are refused, others go on, no
file is half-written, and free room repairs all.
"""

import os
import resource
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from hvpd.v1 import objective_pb2
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import Store
from hvpd_server.tenancy import token_file
from tests.support.objectives import quadratic
from tests.support.waiting import until

N = 60


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Yield a file system of 48 MiB, in memory."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system can only be mounted by root")
    place = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def fill(disk):
    """Return fill(but=0), which fills the disk except for some bytes, and returns a
    function that frees it.
    """
    ballast = disk / "ballast"

    def fill(but=0):
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                size = file.tell()
        os.truncate(ballast, max(size - but, 0))
        return lambda: ballast.unlink(missing_ok=True)

    yield fill
    ballast.unlink(missing_ok=True)


def tree(store):
    """Return every file of a store except its cache."""
    return sorted(path for path in store.rglob("*") if path.is_file() and "cache" not in path.parts)


@pytest.fixture(scope="module")
def place(serve_module, disk):
    """Yield a server whose store is on that disk, with an objective, and a client."""
    server = serve_module(store=disk / "store")
    A = np.random.default_rng(0).normal(size=(N, N))
    A = A @ A.T / N + np.eye(N)
    with hvpd.connect(server.address, retry_timeout=0.5) as client:
        client.register(quadratic, np.zeros(N), A, name="disk/quadratic").at(np.zeros(N)).hessian() @ np.ones(N)
        yield server, client, A


def solve(client, A):
    H = client.objective("disk/quadratic").at(np.ones(N)).hessian()
    solution, code = scipy.sparse.linalg.cg(H, np.arange(N), rtol=1e-12)
    assert code == 0
    np.testing.assert_allclose(solution, np.linalg.solve(A, np.arange(N)), rtol=1e-8)


@pytest.mark.parametrize("but", [0, 5_000, 60_000])
def test_a_full_disk_refuses_new_objectives_and_serves_stored_ones(place, fill, but):
    """The disk has no room at all, room for some of the files, or room for most of
    them.
    """
    server, client, A = place
    empty = fill(but)
    before = tree(server.store)
    B = np.random.default_rng(but).normal(size=(200, 200))

    def register():
        return client.register(lambda x, B: jnp.sum((B @ x) ** 2) / 2 + but, np.zeros(200), B, name=f"disk/new{but}")

    with pytest.raises(hvpd.OverloadedError, match=r"room|bytes.*free") as error:
        register()
    assert error.value.reason == "DISK_FULL"
    assert list((server.store / "incoming").iterdir()) == []
    assert set(before) <= set(tree(server.store))
    assert all(path.parent.parent.name == "blobs" for path in set(tree(server.store)) - set(before))
    with pytest.raises(hvpd.NotFoundError):
        client.objective(f"disk/new{but}")
    solve(client, A)
    empty()
    np.testing.assert_allclose(register().hessp(np.zeros(200), np.ones(200)), B.T @ (B @ np.ones(200)))


def test_products_of_widths_that_were_never_compiled_on_a_full_disk(place, fill):
    """The server cannot keep the compiled program, and uses it nevertheless."""
    server, client, A = place
    fill()
    cached = sorted((server.store / "cache").rglob("*"))
    V = np.random.default_rng(0).normal(size=(N, 37))
    H = client.objective("disk/quadratic").at(np.full(N, 2.0)).hessian()
    np.testing.assert_allclose(H @ V, A @ V, rtol=1e-10)
    np.testing.assert_allclose(H @ V[:, :3], A @ V[:, :3], rtol=1e-10)
    assert sorted((server.store / "cache").rglob("*")) == cached


def test_a_restart_on_a_full_disk_serves_the_registered_objectives(place, fill):
    server, client, A = place
    empty = fill()
    server.kill()
    server.start()
    with hvpd.connect(server.address, retry_timeout=5) as again:
        solve(again, A)
    solve(client, A)
    empty()


def test_records_on_a_full_disk_are_the_old_ones_or_the_new(disk, fill, tmp_path):
    """Tokens, quarantine, names, derivations and checks are each written aside and
    renamed.
    """
    store = Store(disk / "records")
    try:
        quarantine = Quarantine(store.root, 3)
        tokens = disk / "tokens.json"
        token_file.create(tokens, "vision", ["use"])
        quarantine.strike("0" * 64, "before")
        store.add_objective("0" * 64, "a")
        store.add_derivation("0" * 64, "1", objective_pb2.Derivation(mode="auto"))
        kept = {path: path.read_bytes() for path in [tokens, *tree(store.root)] if path.name != "changed"}
        empty = fill()
        for write in (
            lambda: token_file.create(tokens, "vision", ["use"]),
            lambda: quarantine.strike("0" * 64, "on a full disk"),
            lambda: store.add_objective("0" * 64, "b"),
            lambda: store.add_derivation("0" * 64, "2", objective_pb2.Derivation(mode="linearized")),
        ):
            with pytest.raises(OSError, match="No space left"):
                write()
        assert {path: path.read_bytes() for path in [tokens, *tree(store.root)] if path.name != "changed"} == kept
        assert sorted(path.name for path in disk.iterdir() if "tokens" in path.name) == ["tokens.json"]
        empty()
        quarantine.strike("0" * 64, "after")
        assert quarantine._record("0" * 64).strikes == 2
        assert list((store.root / "quarantine").iterdir()) == [store.root / "quarantine" / ("0" * 64)]
    finally:
        store.close()


def test_a_server_may_run_out_of_descriptors_and_goes_on(serve):
    """Clients beyond the limit wait or are refused. They are served when others have
    left.
    """
    server = serve()
    with hvpd.connect(server.address) as client:
        H = client.register(lambda x: jnp.sum(x**4) / 12, np.ones(3)).at(np.ones(3)).hessian()
        pool = client._transport._vectors
        until(lambda: (H @ np.ones(3)).any() and pool.ready)  # From then on products go past gRPC.
        for _ in range(3):  # Compiling opens files, and so does XLA in a thread's first computation.
            H @ np.ones(3)
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        used = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 5, hard))
        others = []
        for _ in range(12):
            try:
                others.append(hvpd.connect(server.address, connect_timeout=0.5))
            except hvpd.UnavailableError:
                break
        else:
            pytest.fail("the limit was none")
        assert np.array_equal(H @ np.ones(3), np.ones(3))
        for other in others:
            other.close()
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        with hvpd.connect(server.address, connect_timeout=60) as newcomer:
            assert np.array_equal(
                newcomer.objective(H.point.objective.digest).hessp(np.ones(3), np.ones(3)), np.ones(3)
            )
