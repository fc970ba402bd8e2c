"""Several servers on one store: each sees what another has changed at its next request,
and a server that is killed leaves the store whole.
"""

import subprocess
import sys
import threading

import pytest

from hvpd._wire import codec
from hvpd.v1 import objective_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store import exclusion
from hvpd_server.store.objects import CHANGES, Directory
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import Store
from hvpd_server.store.tenant_content import Owners
from hvpd_server.store.verify import verify
from tests.support.waiting import until

D, E = "ab" * 32, "cd" * 32


class Replica:
    """What a server has of a store."""

    def __init__(self, root, limit=None):
        self.store = Store(root)
        self.owners = Owners(self.store, lambda tenant: limit)
        self.quarantine = Quarantine(self.store.objects, 1)
        self.store.watch(self.quarantine.load)

    def register(self, tenant, digest, name="", *, shared=False):
        full = self.owners.full_name(tenant, name)
        with self.store.changing():
            self.owners.add_objective(tenant, digest, shared=shared, name=full)
            self.store.add_objective(digest, full, owned=bool(tenant))

    def names(self, tenant):
        return [(name, digest) for name, digest, _ in self.owners.listing(tenant)]


@pytest.fixture
def replicas(tmp_path):
    opened = [Replica(tmp_path / "store", limit=None) for _ in range(2)]
    yield opened
    for each in opened:
        each.store.close()


def test_an_objective_is_found_at_the_other_server(replicas):
    one, two = replicas
    assert two.names("a") == []
    one.register("a", D, "mlp")
    assert two.owners.find("a", "mlp")[:2] == ("a/mlp", D)
    assert two.owners.find("a", "mlp") == one.owners.find("a", "mlp")
    two.register("a", E, "mlp")
    assert one.names("a") == [("a/mlp", E), ("", D)]
    assert one.owners.find("a", D[:8])[:2] == ("", D)


def test_owners_are_those_of_all_servers(replicas):
    one, two = replicas
    one.register("a", D, "mlp")
    assert two.names("b") == []
    with pytest.raises(ServiceError, match="no objective"):
        two.owners.find("b", D)
    two.register("b", D)
    assert one.names("b") == [("", D)]
    one.register("a", D, "mlp", shared=True)
    assert two.names("c") == [("a/mlp", D)]


def test_an_owned_objective_is_closed_while_its_owner_is_unknown(replicas):
    one, two = replicas
    one.register("a", D, "mlp")
    (path,) = one.store.root.glob(f"owners/*/objectives/{D}")
    path.unlink()
    one.store.objects.bump(CHANGES, "")
    assert two.names("b") == []
    assert not two.owners.may_use("b", D)
    assert two.names("") == [("a/mlp", D)]


def test_a_deletion_holds_at_the_other_server(replicas):
    one, two = replicas
    one.register("a", D, "mlp")
    two.store.sync()
    one.store.remove_name("a/mlp")
    one.store.remove_objective(D)
    one.owners.remove_objective("a", D)
    assert two.names("a") == two.names("") == []
    assert not two.store.registered(D)
    assert two.owners.owners_of(D) == {}
    two.register("b", D, "mine")
    assert one.names("a") == []
    assert one.names("b") == [("b/mine", D)]


def test_a_quarantine_holds_at_the_other_server_until_it_is_released(replicas):
    one, two = replicas
    two.quarantine.check(D)
    one.quarantine.strike(D, "it did this")
    with pytest.raises(ServiceError, match="it did this"):
        two.quarantine.check(D)
    assert two.quarantine.release(D) == 1
    one.quarantine.check(D)


def test_a_check_is_told_by_the_other_server(replicas):
    one, two = replicas
    found = objective_pb2.RegistrationCheck(verdict=objective_pb2.VERDICT_FAILED, reason="wrong")
    one.store.add_check(D, found, "a")
    assert two.store.check(D, "a") == found
    assert two.store.checks(D) == [found]


def test_uploads_at_the_other_server_count_for_a_tenant(replicas, upload):
    one, two = replicas
    one.owners._limit_of = two.owners._limit_of = lambda tenant: 200_000
    for index, replica in enumerate([one, two, one, two]):
        content = bytes([index]) * 50_000
        if index == 3:
            for each in replicas:
                with pytest.raises(ServiceError) as full, each.owners.adding_blob("a", codec.digest(content), 60_000):
                    pass
                assert full.value.reason == "TENANT_STORAGE"
            return
        with replica.owners.adding_blob("a", codec.digest(content), len(content)):
            upload(replica.store, content)
        assert one.owners.stored_bytes("a") == two.owners.stored_bytes("a") == 50_000 * (index + 1)


def test_a_removed_blob_counts_no_more_at_the_other_server(replicas, upload):
    one, two = replicas
    with one.owners.adding_blob("a", codec.digest(b"x" * 9000), 9000):
        digest = upload(one.store, b"x" * 9000)
    assert two.owners.stored_bytes("a") == 9000
    two.owners.remove_blob("a", digest)
    assert one.owners.stored_bytes("a") == 0
    assert not one.store.has(digest)


def test_what_arrives_at_one_server_survives_the_start_of_another(replicas, upload, tmp_path):
    one, _ = replicas
    content = b"y" * 5000
    with one.store.upload(codec.digest(content), len(content)) as uploading:
        uploading.append(0, content[:100])
        third = Replica(tmp_path / "store")
        uploading.append(100, content[100:])
        uploading.commit()
    assert third.store.read(codec.digest(content)) == content
    third.store.close()


def test_changes_from_many_servers_at_once_are_all_kept(replicas, start, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)

    def change(number):
        for index in range(30):
            replicas[number % 2].register(f"t{number}", f"{index:032x}{number:032x}", f"n{index}")

    for future in [start(change, number) for number in range(4)]:
        future.result(60)
    expected = {(f"t{number}/n{index}", f"{index:032x}{number:032x}") for number in range(4) for index in range(30)}
    for each in replicas:
        assert set(each.names("")) == expected
        assert all(len(each.names(f"t{number}")) == 30 for number in range(4))


def test_a_file_is_replaced_only_if_it_is_still_the_one(tmp_path):
    one, two = Directory(tmp_path), Directory(tmp_path)
    assert one.replace("names/a", b"1", None)
    assert not two.replace("names/a", b"2", None)
    tag = two.stat("names/a").tag
    assert one.replace("names/a", b"3", tag)
    assert not two.replace("names/a", b"4", tag)
    assert two.get("names/a") == b"3"


def test_only_one_of_many_creates_a_file(tmp_path, start):
    servers = [Directory(tmp_path) for _ in range(8)]
    together = threading.Barrier(8)

    def create(number):
        together.wait(10)
        return servers[number].replace("names/a", str(number).encode(), None)

    won = [future.result(20) for future in [start(create, number) for number in range(8)]]
    (winner,) = [number for number, tag in enumerate(won) if tag is not None]
    assert servers[0].get("names/a") == str(winner).encode()


def test_a_server_that_holds_the_lock_for_too_long_is_an_error(replicas, start, monkeypatch):
    one, two = replicas
    monkeypatch.setattr(exclusion, "SECONDS", 0.05)
    with one.store.changing():
        with pytest.raises(ServiceError, match="nothing was changed") as busy:
            start(two.register, "a", D, "mlp").result(10)
        assert (busy.value.code, busy.value.reason) == (Code.UNAVAILABLE, "STORE_BUSY")
    two.register("a", D, "mlp")
    assert one.names("a") == [("a/mlp", D)]


def test_a_registration_whose_name_changed_meanwhile_registers_nothing(open_engine, rosen, logistic, upload, tmp_path):
    engine = open_engine()
    other = Replica(tmp_path / "store")
    for example in (rosen, logistic):
        for content in example.export.blobs.values():
            upload(engine.store, content)

    def register(example, accept=lambda objective: None):
        return engine.registration.register(example.export.digest, "n", accept=accept)

    with pytest.raises(ServiceError, match=rf"points at objective {D[:12]} now, and nothing") as lost:
        register(rosen, lambda objective: other.register("", D, "n"))
    assert (lost.value.code, lost.value.reason) == (Code.ABORTED, "NAME_CHANGED")
    assert not engine.store.registered(rosen.export.digest)
    assert other.names("") == [("n", D)]
    register(rosen)
    assert other.owners.find("", "n")[1] == rosen.export.digest
    with pytest.raises(ServiceError, match="is deleted now"):
        register(logistic, lambda objective: other.store.remove_name("n"))
    # The same objective from two callers is no race.
    register(logistic, lambda objective: other.register("", logistic.export.digest, "n"))
    other.store.close()


def test_an_objective_that_another_server_registers_is_loaded_in_the_background(open_engine, rosen, upload, tmp_path):
    engine = open_engine()
    other = Replica(tmp_path / "store")
    for content in rosen.export.blobs.values():
        upload(other.store, content)
    digest = rosen.export.digest
    other.register("", digest, "n")
    assert engine.owners.find("", "n")[1] == digest
    assert engine.objectives.loaded() == []
    for _ in range(5):
        engine.objectives.prepare(digest)
    until(lambda: engine.objectives.loaded() == [digest])
    until(lambda: engine.objectives.load(digest).kernels.compiles())

    other.store.remove_name("n")
    other.store.remove_objective(digest)
    engine.registration.follow()
    assert engine.objectives.loaded() == []
    other.store.close()


KILLED = """
import os, pathlib, signal, sys
from hvpd_server.store import objects
from hvpd_server.store.tenant_content import Owners
from hvpd_server.store.store import Store
from hvpd_server import files

store = Store(pathlib.Path(sys.argv[1]))
owners = Owners(store)
last = int(sys.argv[2])
count = 0

def hooked(owner, name):
    function = getattr(owner, name)

    def call(*args, **kwargs):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, call)

for owner, name in ((files.os, "fsync"), (pathlib.Path, "replace"), (pathlib.Path, "unlink"), (os, "write")):
    hooked(owner, name)
digest = "cd" * 32
with store.changing():
    owners.add_objective("a", digest, shared=False, name="a/mlp")
    store.add_objective(digest, "a/mlp", owned=True)
with store.changing():
    store.remove_name("a/old")
    store.remove_objective("ab" * 32)
    owners.remove_objective("a", "ab" * 32)
print(count)
"""


def test_a_server_that_is_killed_in_a_change_leaves_the_old_or_the_new(tmp_path):
    """The server is killed before each of its writes in turn. Another server is open
    all the time, and goes on.
    """
    steps, step = None, 0
    seen = set()
    while steps is None:
        step += 1
        assert step < 60
        root = tmp_path / str(step)
        other = Replica(root)
        other.register("a", D, "old")
        child = subprocess.run(
            [sys.executable, "-c", KILLED, root, str(step)], capture_output=True, text=True, timeout=60, check=False
        )
        if child.returncode == 0:
            steps = int(child.stdout)
        else:
            assert child.returncode == -9, child.stderr
        again = Replica(root)
        assert again.names("a") == other.names("a")
        assert again.names("b") == []
        problems = [line for line in verify(root).problems if "its blob" not in line]
        assert [line for line in problems if "is not registered" not in line] == []
        seen.add(tuple(again.names("a")))
        other.register("a", "ef" * 32, "later")
        again.store.sync()
        assert again.names("a") == other.names("a")
        assert ("a/later", "ef" * 32) in other.names("a")
        for each in (other, again):
            each.store.close()
    assert step == steps + 1
    assert {(("a/old", D),), (("a/mlp", E),)} <= seen
