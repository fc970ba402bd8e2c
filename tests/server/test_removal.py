"""Deletion removes an objective from its tenants, and takes nothing that another tenant
has.
"""

import contextlib
import functools
import os
import time

import pytest

from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store import tenant_content
from hvpd_server.store.removal import PRUNE_AGE_SECONDS, Removal
from hvpd_server.store.tenant_content import Owners


class Place:
    """A store whose objectives are bundles of programs and data that never run."""

    def __init__(self, store, upload):
        self.store = store
        self.owners = Owners(store)
        self._upload = upload
        self.in_use = []
        self.removal = Removal(store, self.owners, store.bundle, lambda: self.in_use)

    def blob(self, tenant, content):
        digest = self._upload(self.store, content)
        self.owners.add_blob(tenant, digest)
        return digest

    def register(self, tenant, name, *parts, shared=False):
        """Register an objective of these contents."""
        bundle = objective_pb2.Bundle(data=[tensor_pb2.Tensor(digest=self.blob(tenant, part)) for part in parts])
        digest = self.blob(tenant, bundle.SerializeToString(deterministic=True))
        self.owners.add_objective(tenant, digest, shared=shared)
        self.store.add_objective(digest, self.owners.full_name(tenant, name))
        return digest

    def delete(self, name, tenant="", *, every_tenant=False, expected=""):
        return self.removal.delete(name, tenant, expected=expected, every_tenant=every_tenant or not tenant)

    def names(self, tenant=""):
        return [name or digest for name, digest, _ in self.owners.listing(tenant)]

    def contents(self):
        return {self.store.read(digest) for digest in self.store.blobs()}

    def age(self, seconds):
        """Make all blobs and their owners' records so much older."""
        then = time.time() - seconds
        for path in [*self.store.root.glob("blobs/*/*"), *self.store.root.glob("owners/*/blobs/*")]:
            os.utime(path, (then, then))


@pytest.fixture
def place(store, upload):
    return Place(store, upload)


def refused(call, *args, **settings):
    with pytest.raises(ServiceError) as error:
        call(*args, **settings)
    return error.value.code, error.value.reason


def test_an_objective_goes_with_its_last_name_and_takes_its_blobs(place):
    digest = place.register("", "one", b"data", b"more")
    place.store.add_objective(digest, "two")
    found = place.delete("one")
    assert (found.digest, found.gone) == (digest, False)
    assert place.names() == ["two"]
    found = place.delete("two")
    assert found.gone
    assert place.names() == []
    assert place.contents() == set()
    assert not place.store.registered(digest)
    assert refused(place.delete, "two") == (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND")


@pytest.mark.parametrize("digits", [8, 64])
def test_by_its_digest_it_goes_with_all_its_names(place, digits):
    digest = place.register("", "one", b"data")
    place.store.add_objective(digest, "two")
    assert place.delete(digest[:digits]).gone
    assert place.names() == []


def test_blobs_that_another_objective_needs_stay(place):
    place.register("", "one", b"shared", b"own")
    other = place.register("", "two", b"shared")
    place.delete("one")
    assert place.contents() == {b"shared", place.store.read(other)}
    place.delete("two")
    assert place.contents() == set()


def test_a_tenant_deletes_its_own_objectives_only(place):
    for tenant in "ab":
        place.register(tenant, "mlp", b"data", tenant.encode(), shared=True)
    assert refused(place.delete, "a/mlp", "b") == (Code.PERMISSION_DENIED, "NOT_YOURS")
    assert refused(place.delete, place.owners.find("a", "mlp")[1], "b") == (Code.PERMISSION_DENIED, "NOT_YOURS")
    assert place.delete("mlp", "b").gone
    assert place.names("b") == ["a/mlp"]
    assert {b"data", b"a"} <= place.contents()
    assert b"b" not in place.contents()
    assert place.owners.stored_bytes("b") == 0


def test_a_tenant_cannot_delete_an_objective_that_it_cannot_see(place):
    place.register("a", "mlp", b"data")
    assert refused(place.delete, "a/mlp", "b") == (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND")
    place.owners.add_blob("b", place.owners.find("a", "mlp")[1])
    assert refused(place.delete, "a/mlp", "b") == (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND")


def test_an_objective_of_two_tenants_goes_when_the_second_deletes_it(place):
    digests = {place.register(tenant, "mlp", b"data") for tenant in "ab"}
    assert len(digests) == 1
    found = place.delete("mlp", "a")
    assert found.gone  # `a` gets this answer, whether or not `b` has it.
    assert not found.removed
    assert place.names("a") == []
    assert place.names("b") == ["b/mlp"]
    assert not place.owners.may_use("a", found.digest)
    found = place.delete("mlp", "b")
    assert (found.gone, found.removed) == (True, True)
    assert place.contents() == set()
    assert Owners(place.store).listing("") == []


def test_an_operator_deletes_objectives_of_every_tenant(place):
    place.register("a", "mlp", b"data")
    place.register("b", "mlp", b"data")
    assert not place.delete("a/mlp", "root", every_tenant=True).gone
    assert place.names() == ["b/mlp"]
    digest = place.owners.find("b", "mlp")[1]
    assert place.delete(digest, "root", every_tenant=True).gone
    assert place.contents() == set()


def test_the_operators_delete_prefers_its_own_name(place):
    place.register("root", "mlp", b"1")
    place.register("", "mlp", b"2")
    place.delete("mlp", "root", every_tenant=True)
    assert place.names() == ["mlp"]


def test_tenants_cannot_delete_objectives_registered_without_tokens(place):
    place.register("", "old", b"data")
    place.register("a", "new", b"data")
    assert refused(place.delete, "old", "a") == (Code.PERMISSION_DENIED, "NOT_YOURS")
    place.delete("new", "a")
    assert b"data" in place.contents()  # It has no owner, and still needs its data.
    assert place.owners.stored_bytes("a") == 0


def test_an_objective_whose_bundle_is_lost_can_be_deleted(place):
    digest = place.register("a", "mlp", b"data")
    place.store.remove_blob(digest)
    assert place.delete("mlp", "a").gone
    assert place.names() == []


def test_pruning_takes_old_blobs_without_an_objective(place):
    place.register("a", "mlp", b"data")
    for tenant, content in (("a", b"x of a solve"), ("b", b"x of a solve"), ("a", b"only a's")):
        place.blob(tenant, content)
    assert place.removal.prune("a").count == 0  # All blobs are young, and may become part of an objective.
    place.age(PRUNE_AGE_SECONDS + 1)
    found = place.removal.prune("a")
    assert (found.count, found.size_bytes) == (2, len(b"x of a solveonly a's"))
    assert {b"data", b"x of a solve"} <= place.contents()
    assert not place.owners.has_blob("a", place.blob("", b"only a's"))
    assert place.removal.prune("b").count == 1
    assert b"x of a solve" not in place.contents()
    assert place.owners.find("a", "mlp")


def test_without_tenants_pruning_takes_blobs_without_a_reference(place):
    place.register("", "mlp", b"data")
    place.register("a", "mlp", b"data of a")
    for tenant, content in (("", b"nobody's"), ("a", b"a's")):
        place.blob(tenant, content)
    place.age(PRUNE_AGE_SECONDS + 1)
    place.removal.prune("")
    assert b"nobody's" not in place.contents()
    assert {b"data", b"data of a", b"a's"} <= place.contents()


B = 4096
"""Least bytes that a blob counts."""


@pytest.fixture
def limited(store):
    """Yield owners of which `a` may store ten blocks."""
    return Owners(store, {"a": 10 * B}.get)


@pytest.fixture
def owners_and_calls(store, monkeypatch):
    """Yield owners, and the digests that were looked for in the store."""
    looked, has = [], store.has
    monkeypatch.setattr(store, "has", lambda digest: looked.append(digest) or has(digest))
    return Owners(store), looked


def put(owners, upload, tenant, content):
    digest = upload(owners._store, content)
    with owners.adding_blob(tenant, digest, len(content)):
        pass
    return digest


def test_a_tenant_stores_no_more_than_it_may(limited, store, upload):
    put(limited, upload, "a", bytes(6 * B))
    put(limited, upload, "a", b"small")
    assert limited.stored_bytes("a") == 7 * B
    with pytest.raises(
        ServiceError,
        match=r"has 28672 bytes stored and 0 bytes arriving, and 12289 more exceed its limit of 40960 .*`hvpd prune`",
    ) as error:
        put(limited, upload, "a", bytes(3 * B + 1))
    assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "TENANT_STORAGE")
    put(limited, upload, "a", b"small")  # The tenant has it already: it counts twice while it arrives, and then once.
    put(limited, upload, "b", bytes(20 * B))
    last = put(limited, upload, "a", bytes(3 * B))
    assert limited.stored_bytes("a") == Owners(store).stored_bytes("a") == 10 * B
    with pytest.raises(ServiceError):
        put(limited, upload, "a", b"")
    limited.remove_blob("a", last)
    assert limited.stored_bytes("a") == 7 * B


def test_an_upload_that_fails_counts_nothing(limited):
    with pytest.raises(ZeroDivisionError), limited.adding_blob("a", "ab" * 32, 9 * B):
        assert limited.stored_bytes("a") == 9 * B  # Two at once cannot have the same room.
        raise ZeroDivisionError
    assert limited.stored_bytes("a") == 0


def test_each_upload_counts_while_it_arrives_and_its_blob_once(limited, store, upload):
    """This holds also for blobs that the tenant has, and for one blob several times at
    once: each upload is its own file.
    """
    digest = put(limited, upload, "a", bytes(3 * B))
    with limited.adding_blob("a", digest, 3 * B), limited.adding_blob("a", digest, 3 * B):
        assert limited.stored_bytes("a") == 9 * B
        with (
            pytest.raises(ServiceError, match=r"24576 bytes arriving") as error,
            limited.adding_blob("a", digest, 3 * B),
        ):
            pass
        assert error.value.retry_after  # The uploads under way end by themselves.
        with pytest.raises(ServiceError) as error, limited.adding_blob("a", "ef" * 32, 8 * B):
            pass
        assert error.value.retry_after is None  # Waiting does not help.
        with contextlib.suppress(ZeroDivisionError), limited.adding_blob("a", "cd" * 32, 1):
            assert limited.stored_bytes("a") == 10 * B
            raise ZeroDivisionError
    assert limited.stored_bytes("a") == 3 * B


def test_only_blobs_in_the_tenants_record_are_looked_up(owners_and_calls, upload):
    """Otherwise the time of an answer would show whether another tenant has a blob."""
    owners, looked = owners_and_calls
    digest = upload(owners._store, b"of b")
    owners.add_blob("b", digest)
    looked.clear()
    answers = [owners.has_blob("a", each) for each in (digest, "cd" * 32)]
    assert (answers, looked) == ([False, False], [])
    assert owners.has_blob("b", digest)
    assert looked == [digest]


def test_a_blob_that_is_lost_can_be_sent_again(limited, store, upload):
    digest = put(limited, upload, "a", bytes(6 * B))
    store.remove_blob(digest)  # It was corrupt, and set aside.
    with limited.adding_blob("a", digest, 6 * B):
        upload(store, bytes(6 * B))
    assert limited.stored_bytes("a") == 6 * B


@pytest.mark.parametrize("tenant", ["", "a"])
def test_an_unreadable_bundle_stops_every_removal(place, tenant, monkeypatch):
    place.register(tenant, "one", b"data of one", b"shared")
    two = place.register(tenant, "two", b"data of two", b"shared")
    place.age(PRUNE_AGE_SECONDS + 1)
    read = place.store.bundle

    def failing(digest):
        if digest == two:
            raise ServiceError(Code.DATA_LOSS, "BLOB_CORRUPT", "too many open files")
        return read(digest)

    monkeypatch.setattr(place.removal, "_bundle", failing)
    before = place.contents()
    assert refused(place.removal.prune, tenant) == (Code.DATA_LOSS, "BLOB_CORRUPT")
    assert refused(place.delete, "one", tenant) == (Code.DATA_LOSS, "BLOB_CORRUPT")
    assert place.contents() == before
    assert len(place.names()) == 2
    assert place.delete("two", tenant).gone  # A damaged bundle does not prevent its own deletion.
    assert {b"data of one", b"shared"} <= place.contents()


def test_blobs_in_use_are_not_pruned(place):
    digest = place.blob("a", b"data of a point")
    place.age(PRUNE_AGE_SECONDS + 1)
    place.in_use = [digest]
    assert place.removal.prune("a").count == 0
    place.in_use = []
    assert place.removal.prune("a").count == 1


def test_a_request_that_is_repeated_deletes_nothing_else(place):
    """The first try took effect, and its answer was lost. The name is now another's, or
    points elsewhere.
    """
    own = place.register("ops", "x", b"own")
    other = place.register("", "x", b"another's")
    assert place.delete("x", "ops", every_tenant=True, expected=own).gone
    assert refused(place.delete, "x", "ops", every_tenant=True, expected=own) == (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND")
    assert place.names() == ["x"]
    assert place.delete("x", "ops", every_tenant=True, expected=other).gone


def test_an_operator_deletes_its_own_objective_and_leaves_that_of_others(place):
    digest = place.register("ops", "x", b"data")
    place.owners.add_objective("b", digest, shared=False)
    for blob in list(place.store.blobs()):
        place.owners.add_blob("b", blob)
    assert not place.delete("x", "ops", every_tenant=True).gone
    assert place.names("b") == [digest]
    assert b"data" in place.contents()


def test_an_owner_without_an_objective_keeps_nothing(place):
    """The server crashed between the record of the owner and that of the objective."""
    digest = place.register("a", "mlp", b"data")
    place.store.remove_name("a/mlp")
    place.store.remove_objective(digest)
    place.age(PRUNE_AGE_SECONDS + 1)
    assert place.removal.prune("a").count == 2
    assert place.contents() == set()


# Records


def test_each_name_and_registration_counts_as_stored(limited, store):
    """A registration has four records of a block each, and each name one."""
    add = functools.partial(register_in, limited, store, "a")
    add("ab" * 32, "one")
    assert limited.stored_bytes("a") == Owners(store).stored_bytes("a") == 5 * B
    add("ab" * 32, "two")
    add("ab" * 32, "two")  # A repetition adds nothing.
    assert limited.stored_bytes("a") == 6 * B
    with pytest.raises(
        ServiceError, match=r"has 24576 bytes stored .* and 20480 more exceed its limit of 40960"
    ) as error:
        add("cd" * 32, "three")
    assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "TENANT_STORAGE")
    assert limited.objectives_of("a") == ["ab" * 32]
    add("cd" * 32, "two")  # The name moves, and so the registration has room.
    assert limited.stored_bytes("a") == 10 * B
    add("cd" * 32, "")  # A full tenant repeats an upload.
    register_in(limited, store, "b", "ef" * 32, "one")
    with pytest.raises(ServiceError):
        limited.check_objective("a", "cd" * 32, "a/three")
    with pytest.raises(ServiceError), limited.adding_blob("a", "ef" * 32, 1):
        pass
    limited.remove_objective("a", "ab" * 32)
    store.remove_name("a/one")
    assert limited.stored_bytes("a") == 5 * B


def test_a_derivation_counts_for_each_tenant_that_registered_its_objective(store):
    digest = "ab" * 32
    store.add_derivation(digest, "1", objective_pb2.Derivation(programs=["hvp" * 1000] * 10))
    size = (store.root / "derived" / digest).stat().st_size
    assert size > 7 * B
    owners = Owners(store, {"a": size + 2 * B}.get)
    with pytest.raises(ServiceError):
        register_in(owners, store, "a", digest, "")
    for tenant in "bc":
        register_in(owners, store, tenant, digest, "")
        assert owners.stored_bytes(tenant) == Owners(store).stored_bytes(tenant) == size + 3 * B


def test_without_a_limit_the_number_of_names_is_bounded(store, monkeypatch):
    monkeypatch.setattr(tenant_content, "MAX_RECORDS", 4)
    owners = Owners(store)
    for name in ("one", "two", "three"):
        register_in(owners, store, "a", "ab" * 32, name)
    before = sorted(store.root.rglob("*"))
    for digest, name in (("ab" * 32, "four"), ("cd" * 32, "one"), ("cd" * 32, "")):
        with pytest.raises(ServiceError, match="Tenant a has 4 names and objectives, and may not") as error:
            register_in(owners, store, "a", digest, name)
        assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_OBJECTIVES")
    assert sorted(store.root.rglob("*")) == before
    register_in(owners, store, "a", "ab" * 32, "three")
    register_in(owners, store, "b", "ab" * 32, "four")
    store.remove_name("a/two")
    register_in(owners, store, "a", "ab" * 32, "four")


def test_without_a_limit_the_number_of_blobs_is_bounded(store, upload, monkeypatch):
    monkeypatch.setattr(tenant_content, "MAX_BLOBS", 2)
    owners = Owners(store)
    first = put(owners, upload, "a", b"1")
    with owners.adding_blob("a", "ab" * 32, 1), pytest.raises(ServiceError) as error:
        put(owners, upload, "a", b"2")  # An upload under way counts, too.
    assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_BLOBS")
    put(owners, upload, "b", b"2")
    owners.remove_blob("a", "ab" * 32)
    owners.remove_blob("a", first)
    put(owners, upload, "a", b"2")


def register_in(owners, store, tenant, digest, name):
    full = owners.full_name(tenant, name)
    owners.add_objective(tenant, digest, shared=False, name=full)
    store.add_objective(digest, full)
