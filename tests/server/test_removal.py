"""What is deleted is gone, for whom it should be, and takes nothing with it that somebody else has."""

import os
import time

import pytest

from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server._errors import Code, ServiceError
from hvpd_server._owners import Owners
from hvpd_server._removal import PRUNE_AGE_SECONDS, Removal


class Place:
    """A store, whose objectives are bundles of programs and data that nobody runs."""

    def __init__(self, store, upload):
        self.store = store
        self.owners = Owners(store)
        self._upload = upload
        self.removal = Removal(store, self.owners, store.bundle)

    def blob(self, tenant, content):
        digest = self._upload(self.store, content)
        self.owners.add_blob(tenant, digest)
        return digest

    def register(self, tenant, name, *parts, shared=False):
        """An objective of these contents."""
        bundle = objective_pb2.Bundle(data=[tensor_pb2.Tensor(digest=self.blob(tenant, part)) for part in parts])
        digest = self.blob(tenant, bundle.SerializeToString(deterministic=True))
        self.owners.add_objective(tenant, digest, shared=shared)
        self.store.add_objective(digest, self.owners.full_name(tenant, name))
        return digest

    def delete(self, name, tenant="", *, anybodys=False):
        return self.removal.delete(name, tenant, anybodys=anybodys or not tenant)

    def names(self, tenant=""):
        return [name or digest for name, digest, _ in self.owners.listing(tenant)]

    def contents(self):
        return {self.store.read(digest) for digest in self.store.blobs()}

    def age(self, seconds):
        """Makes all blobs, and whose they are, so much older."""
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
    assert (found.digest, found.gone, found.freed_bytes) == (digest, False, 0)
    assert place.names() == ["two"]
    found = place.delete("two")
    assert found.gone
    assert found.freed_bytes > len(b"datamore")
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


def test_what_another_objective_needs_stays(place):
    place.register("", "one", b"shared", b"own")
    other = place.register("", "two", b"shared")
    place.delete("one")
    assert place.contents() == {b"shared", place.store.read(other)}
    place.delete("two")
    assert place.contents() == set()


def test_a_tenant_deletes_its_own_and_nobody_elses(place):
    for tenant in "ab":
        place.register(tenant, "mlp", b"data", tenant.encode(), shared=True)
    assert refused(place.delete, "a/mlp", "b") == (Code.PERMISSION_DENIED, "NOT_YOURS")
    assert refused(place.delete, place.owners.find("a", "mlp")[1], "b") == (Code.PERMISSION_DENIED, "NOT_YOURS")
    assert place.delete("mlp", "b").gone
    assert place.names("b") == ["a/mlp"]
    assert {b"data", b"a"} <= place.contents()
    assert b"b" not in place.contents()
    assert place.owners.stored_bytes("b") == 0


def test_what_a_tenant_cannot_see_is_not_there_to_be_deleted(place):
    place.register("a", "mlp", b"data")
    assert refused(place.delete, "a/mlp", "b") == (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND")
    place.owners.add_blob("b", place.owners.find("a", "mlp")[1])
    assert refused(place.delete, "a/mlp", "b") == (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND")


def test_what_two_tenants_have_registered_goes_with_the_second(place):
    digests = {place.register(tenant, "mlp", b"data") for tenant in "ab"}
    assert len(digests) == 1
    found = place.delete("mlp", "a")
    assert (found.gone, found.freed_bytes) == (False, 0)
    assert place.names("a") == []
    assert place.names("b") == ["b/mlp"]
    assert not place.owners.may_use("a", found.digest)
    assert place.delete("mlp", "b").gone
    assert place.contents() == set()
    assert Owners(place.store).listing("") == []


def test_who_operates_the_server_deletes_anybodys(place):
    place.register("a", "mlp", b"data")
    place.register("b", "mlp", b"data")
    assert not place.delete("a/mlp", "root", anybodys=True).gone
    assert place.names() == ["b/mlp"]
    digest = place.owners.find("b", "mlp")[1]
    assert place.delete(digest, "root", anybodys=True).gone
    assert place.contents() == set()


def test_who_operates_the_server_means_its_own_name_first(place):
    place.register("root", "mlp", b"1")
    place.register("", "mlp", b"2")
    place.delete("mlp", "root", anybodys=True)
    assert place.names() == ["mlp"]


def test_what_was_registered_without_tokens_is_not_for_tenants_to_delete(place):
    place.register("", "old", b"data")
    place.register("a", "new", b"data")
    assert refused(place.delete, "old", "a") == (Code.PERMISSION_DENIED, "NOT_YOURS")
    place.delete("new", "a")
    assert b"data" in place.contents()  # It has no owner, and needs it all the same.
    assert place.owners.stored_bytes("a") == 0


def test_an_objective_whose_bundle_is_lost_can_be_deleted(place):
    digest = place.register("a", "mlp", b"data")
    place.store.remove_blob(digest)
    assert place.delete("mlp", "a").gone
    assert place.names() == []


def test_pruning_takes_what_belongs_to_no_objective_and_is_old(place):
    place.register("a", "mlp", b"data")
    for tenant, content in (("a", b"x of a solve"), ("b", b"x of a solve"), ("a", b"only a's")):
        place.blob(tenant, content)
    assert place.removal.prune("a").count == 0  # All is young: it may be on its way to become an objective.
    place.age(PRUNE_AGE_SECONDS + 1)
    found = place.removal.prune("a")
    sizes = len(b"x of a solve"), len(b"only a's")
    assert (found.count, found.size_bytes, found.freed_bytes) == (2, sum(sizes), sizes[1])
    assert {b"data", b"x of a solve"} <= place.contents()
    assert not place.owners.has_blob("a", place.blob("", b"only a's"))
    assert place.removal.prune("b").freed_bytes == sizes[0]
    assert place.owners.find("a", "mlp")


def test_without_tenants_pruning_takes_what_nothing_refers_to(place):
    place.register("", "mlp", b"data")
    place.register("a", "mlp", b"data of a")
    for tenant, content in (("", b"nobody's"), ("a", b"a's")):
        place.blob(tenant, content)
    place.age(PRUNE_AGE_SECONDS + 1)
    assert place.removal.prune("").freed_bytes == len(b"nobody's")
    assert {b"data", b"data of a", b"a's"} <= place.contents()


def test_a_tenant_stores_no_more_than_it_may(store, upload):
    owners = Owners(store, {"a": 10}.get)

    def put(tenant, content):
        digest = upload(store, content)
        with owners.adding_blob(tenant, digest, len(content)):
            pass
        return digest

    put("a", b"123456")
    assert owners.stored_bytes("a") == 6
    with pytest.raises(
        ServiceError, match=r"has 6 bytes stored, and may have 10: 5 more are too many.*`hvpd prune`"
    ) as error:
        put("a", b"abcde")
    assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "TENANT_STORAGE")
    put("a", b"123456")  # It has it already.
    put("b", b"a lot more than ten bytes")
    last = put("a", b"abcd")
    assert owners.stored_bytes("a") == Owners(store).stored_bytes("a") == 10
    owners.remove_blob("a", last)
    assert owners.stored_bytes("a") == 6


def test_an_upload_that_fails_counts_nothing(store, upload):
    owners = Owners(store, {"a": 10}.get)
    with pytest.raises(ZeroDivisionError), owners.adding_blob("a", "ab" * 32, 9):
        assert owners.stored_bytes("a") == 9  # Two at once cannot have the same room.
        raise ZeroDivisionError
    assert owners.stored_bytes("a") == 0
