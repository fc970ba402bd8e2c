"""Backups of a store in use by the commands of docs/operate/run.md, their restored
stores, and `hvpd store verify`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import hvpd
from hvpd._cli import main
from hvpd._wire import codec
from hvpd_server.store.verify import verify
from hvpd_server.tenancy import token_file
from tests.support.objectives import quadratic
from tests.support.waiting import until

N = 20
PAGE = (Path(__file__).parents[2] / "docs/operate/run.md").read_text()


def matrix(seed):
    A = np.random.default_rng(seed).normal(size=(N, N))
    return A + A.T


def commands(title):
    """Return the shell commands below a title of the page."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return "".join(re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


def shell(title, store, backup):
    """Run the page's commands with these paths, except those that need a user of their
    own.
    """
    text = commands(title).replace("chown -R hvpd:hvpd", "ls -d")
    text = text.replace("hvpd store", f"{sys.executable} -m hvpd._cli store")
    for written, path in (("/var/lib/hvpd", store), ("/backup", backup)):
        assert written in text
        text = text.replace(written, str(path))
    done = subprocess.run(["bash", "-eu", "-c", text], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def back_up(store, backup):
    shell("Back up", store, backup)


def restore(store, backup):
    assert shell("Restore", store, backup).rstrip().endswith(": whole")


class Registering:
    """A client that registers new objectives, of new data and with new names, and moves
    a name, until the test ends it.
    """

    def __init__(self, address, **settings):
        self._settings = {"address": address, **settings}
        self._stop = threading.Event()
        self.registered = threading.Semaphore(0)
        self.error = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            with hvpd.connect(**self._settings) as client:
                seed = 100
                while not self._stop.is_set():
                    seed += 1
                    for name in (f"new/{seed}", "moving"):
                        client.register(quadratic, np.zeros(N), matrix(seed), name=name, platforms=("cpu",))
                    self.registered.release()
        except BaseException as error:  # noqa: BLE001 - raised when it is stopped
            self.error = error
            self.registered.release(1000)

    def __enter__(self):
        assert self.registered.acquire(timeout=120)
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
        assert self.error is None, self.error


def test_a_backup_under_registrations_has_all_that_was_there_when_it_began(serve, tmp_path):
    server = serve()
    with hvpd.connect(server.address) as client:
        for seed in range(3):
            client.register(quadratic, np.zeros(N), matrix(seed), name=f"old/{seed}", platforms=("cpu",))
        with Registering(server.address) as load:
            for _ in range(3):
                back_up(server.store, tmp_path / "backup")
                assert load.registered.acquire(timeout=120)
        later = client.register(quadratic, np.zeros(N), matrix(99), name="later", platforms=("cpu",)).digest
    server.kill()
    store = tmp_path / "restored"
    restore(store, tmp_path / "backup")
    assert not (store / "objectives" / later).exists()

    restored = serve(store=store)
    with hvpd.connect(restored.address) as client:
        names = [listing.name for listing in client.objectives()]
        assert {"old/0", "old/1", "old/2", "moving"} < set(names)
        for name in names:
            if name != "moving":
                seed = int(name.partition("/")[2])
                H = client.objective(name).at(np.ones(N)).hessian()
                np.testing.assert_allclose(H @ np.eye(N), matrix(seed), rtol=1e-12, atol=1e-12)
    assert not [line for line in restored.lines if "ERROR" in line]


def test_a_backup_made_during_registrations_has_the_owners(serve, tmp_path):
    """An objective without its owner would be open to all tenants."""
    tokens = tmp_path / "tokens.json"
    mine, _ = token_file.create(tokens, "vision", ["use", "publish"])
    others, _ = token_file.create(tokens, "audio", ["use"])
    server = serve("--tokens", str(tokens))
    with Registering(server.address, token=mine) as load:
        for _ in range(3):
            back_up(server.store, tmp_path / "backup")
            assert load.registered.acquire(timeout=120)
    server.kill()
    restore(tmp_path / "restored", tmp_path / "backup")
    restored = serve("--tokens", str(tokens), store=tmp_path / "restored")
    with hvpd.connect(restored.address, token=mine) as client, hvpd.connect(restored.address, token=others) as other:
        assert len(client.objectives()) > 1
        assert other.objectives() == []


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync: apt-get install rsync")
def test_a_second_backup_adds_the_new_objectives(serve, tmp_path):
    server = serve()
    backup = tmp_path / "backup"
    with hvpd.connect(server.address) as client:
        first = client.register(quadratic, np.zeros(N), matrix(0), name="moved", platforms=("cpu",)).digest
        shell("Back up new objectives", server.store, backup)
        second = client.register(quadratic, np.zeros(N), matrix(1), name="moved", platforms=("cpu",)).digest
        with Registering(server.address):
            shell("Back up new objectives", server.store, backup)
    assert verify(backup).problems == []
    assert {first, second} < {path.name for path in (backup / "objectives").iterdir()}
    names = [json.loads(path.read_text()) for path in (backup / "names").iterdir()]
    assert {"name": "moved", "digest": second} in names


@pytest.fixture(scope="module")
def owned(serve_module, tmp_path_factory):
    """Yield a store with two objectives of one tenant, and their digests."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.json"
    token, _ = token_file.create(tokens, "vision", ["use", "publish"])
    server = serve_module("--tokens", str(tokens))
    with hvpd.connect(server.address, token=token) as client:
        digests = [
            client.register(quadratic, np.zeros(N), matrix(seed), name=f"m/{seed}", platforms=("cpu",)).digest
            for seed in range(2)
        ]
    assert server.terminate() == 0
    return server.store, digests


ORDER = (
    re.search(r"tar -cf \S+ (.*) \|\|", commands("Back up"))[1]
    .replace("$(ls -d quarantine 2>/dev/null || true) ", "")
    .split()
)


def records(store, digest):
    """Return an objective's files in the order in which they are written, without its
    own blobs.
    """
    named = [path for path in (store / "names").iterdir() if digest in path.read_text()]
    owned = list(store.glob(f"owners/*/objectives/{digest}"))
    return [store / "derived" / digest, *owned, store / "objectives" / digest, *named]


@pytest.mark.parametrize("gap", range(1, len(ORDER)))
def test_objectives_that_change_during_a_backup_keep_their_owners(owned, tmp_path, gap):
    """One objective is registered, and one deleted, between two of the directories."""
    original, (deleted, registered) = owned
    assert ORDER.count("owners") == 2
    store, backup = tmp_path / "store", tmp_path / "backup"
    shutil.copytree(original, store)
    for path in records(store, registered):
        path.unlink()
    for index, part in enumerate(ORDER):
        if index == gap:
            for path in records(store, deleted):
                path.unlink()
            for path in records(original, registered):
                shutil.copy(path, store / path.relative_to(original))
        shutil.copytree(store / part, backup / part, dirs_exist_ok=True)
    found = {path.name for path in (backup / "objectives").iterdir()}
    assert found == ({deleted} if gap > ORDER.index("objectives") else {registered})
    assert found <= {path.name for path in backup.glob("owners/*/objectives/*")}
    assert [problem for problem in verify(backup).problems if "name" not in problem] == []


def test_a_backup_copied_in_another_order_can_lack_blobs(serve, tmp_path):
    """This shows the reason for the page's order: here blobs come first, as in a copy
    by the alphabet.
    """
    server = serve()
    backup = tmp_path / "backup"
    with hvpd.connect(server.address) as client:
        shutil.copytree(server.store / "blobs", backup / "blobs")
        client.register(quadratic, np.zeros(N), matrix(0), name="between", platforms=("cpu",))
        for part in ("names", "objectives", "owners"):
            shutil.copytree(server.store / part, backup / part)
    problems = verify(backup).problems
    assert len(problems) == 1
    assert re.fullmatch(r"objective \w{64} 'between': its blob \w{64} is missing", problems[0])


@pytest.mark.parametrize("cached", [False, True])
def test_a_restored_store_is_warm_before_it_serves_and_sooner_with_its_cache(serve, tmp_path, cached):
    """Compiled programs are no part of a backup. If they are copied along, the server
    finds them at any path of the store.
    """
    server = serve()
    with hvpd.connect(server.address) as client:
        H = client.register(quadratic, np.zeros(N), matrix(0), name="old", platforms=("cpu",)).at(np.ones(N)).hessian()
        H @ np.ones(N)
    back_up(server.store, tmp_path / "backup")
    assert server.terminate() == 0
    lost, elsewhere = server.store, tmp_path / "elsewhere"
    restore(elsewhere, tmp_path / "backup")
    if cached:
        shutil.copytree(lost / "cache", elsewhere / "cache")
    server = serve(store=elsewhere)
    compiled, found = (
        server.metric(f'hvpd_compiles_total{{outcome="{outcome}"}}') for outcome in ("compiled", "cached")
    )
    assert (compiled > 0, found > 0) == (not cached, cached)
    with hvpd.connect(server.address) as client:
        H = client.objective("old").at(np.ones(N)).hessian()
        np.testing.assert_allclose(H @ np.ones(N), matrix(0) @ np.ones(N), rtol=1e-12)
    assert server.terminate() == 0


@pytest.fixture(scope="module")
def original(serve_module):
    """Yield a store with an objective of one array, and an array that was only
    uploaded.
    """
    server = serve_module()
    with hvpd.connect(server.address) as client:
        objective = client.register(quadratic, np.zeros(N), matrix(0), name="team/a", platforms=("cpu",))
        objective.at(np.zeros(N), matrix(1))
        until(lambda: objective.registration_check().verdict != "pending")
    assert server.terminate() == 0
    return server.store, objective.digest


@pytest.fixture
def copy(original, tmp_path):
    store, digest = original
    return Path(shutil.copytree(store, tmp_path / "store")), digest


def blob(store, digest):
    return store / "blobs" / digest[:2] / digest


def data():
    return codec.digest(codec.payload(matrix(0)))


def test_a_whole_store(copy, capsys):
    store, _ = copy
    found = verify(store)
    assert (found.objectives, found.names, found.problems) == (1, 1, [])
    assert codec.digest(codec.payload(matrix(1))) in found.unreferenced
    assert data() not in found.unreferenced
    assert found.blobs == sum(1 for path in (store / "blobs").rglob("*") if path.is_file())
    assert found.unreferenced_bytes < found.blob_bytes
    assert main.main(["store", "verify", "--store", str(store)]) == 0
    assert capsys.readouterr().out.endswith(": whole\n")
    assert main.main(["store", "verify", "--store", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_it_changes_nothing_and_runs_beside_a_server(serve, copy, capsys):
    store, _ = copy
    server = serve(store=store)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert main.main(["store", "verify", "--store", str(store)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert server.terminate() == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda store, digest: blob(store, data()).unlink(), "objective DIGEST 'team/a': its blob DATA is missing"),
        (lambda store, digest: blob(store, data()).write_bytes(b"?"), "objective DIGEST 'team/a': its blob DATA is damaged"),
        (lambda store, digest: blob(store, digest).unlink(), "objective DIGEST 'team/a': its blob DIGEST is missing"),
        (lambda store, digest: os.truncate(blob(store, digest), 9), "objective DIGEST 'team/a': its blob DIGEST is damaged"),
        (lambda store, digest: (store / "objectives" / digest).unlink(), "name 'team/a' points at DIGEST, which is not registered"),
        (lambda store, digest: (store / "objectives" / digest).write_text("{"), "objectives/DIGEST is damaged"),
        (lambda store, digest: (store / "objectives" / digest).write_text("{}"), "objectives/DIGEST is damaged"),
        (lambda store, digest: (store / "checks" / digest).write_text("[]"), "checks/DIGEST is damaged"),
        (lambda store, digest: next((store / "names").iterdir()).write_text("{}"), "is damaged: it is not that of its name"),
        (lambda store, digest: next((store / "names").iterdir()).write_bytes(b"\xff"), "is damaged"),
        (lambda store, digest: (store / "blobs/zz").mkdir() or (store / "blobs/zz/zz").touch(), "blobs/zz/zz is damaged"),
        (lambda store, digest: (store / f"objectives/{codec.digest(b'')}").write_text('{"create_time_ns": 1}'), "is missing"),
    ],
)  # fmt: skip
def test_damage_is_told(copy, damage, says, capsys):
    store, digest = copy
    damage(store, digest)
    assert main.main(["store", "verify", "--store", str(store)]) == 1
    said = capsys.readouterr().out
    assert says.replace("DIGEST", digest).replace("DATA", data()) in said
    assert re.search(r": \d+ problems$", said.rstrip())


def test_a_blob_that_is_no_bundle_is_told(copy):
    store, _ = copy
    digest = codec.digest(b"\xff")
    blob(store, digest).parent.mkdir(exist_ok=True)
    blob(store, digest).write_bytes(b"\xff")
    (store / "objectives" / digest).write_text('{"create_time_ns": 1}')
    assert [problem for problem in verify(store).problems if "is no bundle" in problem]


def test_verify_refuses_a_folder_that_is_no_store(tmp_path, capsys, monkeypatch):
    assert main.main(["store", "verify", "--store", str(tmp_path)]) == 1
    assert f"{tmp_path} is no store of hvpd" in capsys.readouterr().err
    monkeypatch.setenv("HVPD_STORE", str(tmp_path / "nothing"))
    assert main.main(["store", "verify"]) == 1
    assert f"{tmp_path / 'nothing'} is no store" in capsys.readouterr().err
