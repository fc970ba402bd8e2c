"""Objectives, names and blobs have owners: records on the disk, and their effects."""

import json
import os

import pytest

from hvpd._wire import codec
from hvpd.v1 import objective_pb2
from hvpd_server.errors import ServiceError
from hvpd_server.store.tenant_content import Owners

D, E = "ab" * 32, "cd" * 32


@pytest.fixture
def owners(store):
    return Owners(store)


def register(owners, store, tenant, digest, name="", *, shared=False):
    owners.add_objective(tenant, digest, shared=shared)
    store.add_objective(digest, owners.full_name(tenant, name))


def names(owners, tenant):
    return [(name, digest) for name, digest, _ in owners.listing(tenant)]


def test_a_tenant_has_the_blobs_that_it_uploaded(owners, store, upload):
    digest = upload(store, b"content")
    assert not owners.has_blob("a", digest)
    assert owners.has_blob("", digest)
    owners.add_blob("a", digest)
    assert owners.has_blob("a", digest)
    assert not owners.has_blob("b", digest)
    assert Owners(store).has_blob("a", digest)
    (store.root / "blobs" / digest[:2] / digest).unlink()
    assert not owners.has_blob("a", digest)


@pytest.mark.parametrize("digest", ["", "../../names", "AB" * 32, D])
def test_a_blob_that_is_not_stored_has_no_owner(owners, store, digest):
    before = sorted(store.root.rglob("*"))
    for tenant in ("", "a"):
        assert not owners.has_blob(tenant, digest)
    assert sorted(store.root.rglob("*")) == before


def test_an_objective_belongs_to_the_tenant_that_registered_it(owners, store):
    register(owners, store, "a", D, "mlp")
    for known in (owners, Owners(store)):
        assert [known.may_use(tenant, D) for tenant in ("a", "b", "a/", "")] == [True, False, False, True]
        assert names(known, "a") == names(known, "") == [("a/mlp", D)]
        assert names(known, "b") == []
        for name in ("mlp", "a/mlp"):
            assert known.find("a", name)[:2] == ("a/mlp", D)
        for name in (D, D[:8]):
            assert known.find("a", name)[:2] == ("a/mlp", D)
        for name in ("mlp", "a/mlp", D, D[:8], "a/ml"):
            with pytest.raises(ServiceError, match="no objective of") as error:
                known.find("b", name)
            assert error.value.metadata == {"near": ""}


def test_a_shared_objective_is_open_to_all_until_it_is_private_again(owners, store):
    register(owners, store, "a", D, "mlp", shared=True)
    for known in (owners, Owners(store)):
        assert known.find("b", "a/mlp")[:2] == known.find("b", D)[:2] == ("a/mlp", D)
        assert names(known, "b") == [("a/mlp", D)]
        with pytest.raises(ServiceError, match=r"did you mean 'a/mlp'"):
            known.find("b", "mlp")
    register(owners, store, "a", D, "mlp")
    for known in (owners, Owners(store)):
        assert not known.may_use("b", D)
        assert names(known, "b") == []


def test_ones_own_name_comes_before_a_full_one(owners, store):
    register(owners, store, "a", D, "mlp", shared=True)
    register(owners, store, "b", E, "a/mlp")
    assert owners.find("b", "a/mlp")[1] == E
    assert owners.find("a", "mlp")[1] == owners.find("c", "a/mlp")[1] == D
    assert names(owners, "a") == [("a/mlp", D)]


def test_two_owners_of_one_objective_do_not_see_each_other(owners, store):
    register(owners, store, "a", D, "secret-project")
    register(owners, store, "b", D)
    assert names(owners, "b") == [("", D)]
    assert owners.find("b", D)[:2] == ("", D)
    with pytest.raises(ServiceError):
        owners.find("b", "a/secret-project")
    register(owners, store, "b", D, "mine", shared=True)
    assert names(owners, "b") == names(owners, "c") == [("b/mine", D)]
    assert names(owners, "a") == [("a/secret-project", D), ("b/mine", D)]


def test_an_objective_from_before_tokens_stays_open_to_all(owners, store):
    store.add_objective(D, "old")
    register(owners, store, "", E, "x/older")
    for known in (owners, Owners(store)):
        assert names(known, "b") == [("old", D), ("x/older", E)]
        assert known.find("b", "old")[1] == D
    register(owners, store, "a", D, "mine")
    for known in (owners, Owners(store)):
        assert known.may_use("b", D)
        assert known.find("b", "old")[1] == D


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", json.dumps({"tenant": "b", "shared": True}).encode(), b'{"tenant": 5}']
)
def test_a_record_that_is_damaged_opens_nothing(owners, store, content):
    register(owners, store, "a", D, "mlp", shared=True)
    (path,) = (store.root / "owners").glob(f"*/objectives/{D}")
    path.write_bytes(content)
    damaged = Owners(store)
    assert [damaged.may_use(tenant, D) for tenant in ("a", "b", "")] == [False, False, True]
    assert names(damaged, "a") == names(damaged, "b") == []
    register(damaged, store, "a", D, "mlp")
    assert [damaged.may_use(tenant, D) for tenant in ("a", "b")] == [True, False]


@pytest.mark.parametrize("lacking", [0, -1])
def test_a_tenant_must_have_uploaded_all_blobs_of_its_objective(open_engine, logistic, lacking):
    """The bundle, its programs and its data count as uploaded, also if another tenant
    has them.
    """
    engine = open_engine()
    engine.owners.add_objective("a", logistic.export.digest, shared=True)
    for content in logistic.export.blobs.values():
        digest = codec.digest(content)
        with engine.store.upload(digest, len(content)) as upload:
            upload.append(0, content)
            upload.commit()
    digests = sorted(logistic.export.blobs, key=lambda digest: digest != logistic.export.digest)
    for digest in digests:
        if digest != digests[lacking]:
            engine.owners.add_blob("b", digest)
    with pytest.raises(ServiceError) as error:
        engine.registration.register(logistic.export.digest, "mine", tenant="b")
    assert (error.value.reason, error.value.metadata) == ("BLOBS_MISSING", {"digests": digests[lacking]})
    assert engine.owners.listing("b") == []
    engine.owners.add_blob("b", digests[lacking])
    engine.registration.register(logistic.export.digest, "mine", tenant="b")
    assert [name for name, _, _ in engine.owners.listing("b")] == ["b/mine"]


def test_a_registration_without_room_is_refused_before_its_programs_are_read(open_engine, logistic, monkeypatch):
    engine = open_engine()
    for content in logistic.export.blobs.values():
        digest = codec.digest(content)
        with engine.store.upload(digest, len(content)) as upload:
            upload.append(0, content)
            upload.commit()
        engine.owners.add_blob("a", digest)
    monkeypatch.setattr(engine.owners, "_limit_of", {"a": engine.owners.stored_bytes("a") + 4096}.get)
    monkeypatch.setattr(engine.objectives._vetting, "admit", lambda *arguments: pytest.fail("it was read"))
    with pytest.raises(ServiceError, match="exceed its limit") as error:
        engine.registration.register(logistic.export.digest, "mine", tenant="a")
    assert error.value.reason == "TENANT_STORAGE"
    assert not engine.store.registered(logistic.export.digest)


def test_records_that_cannot_be_looked_for_are_an_error(owners, store, monkeypatch):
    """Otherwise its objectives would have no owner, and would be open to all
    tenants.
    """
    register(owners, store, "a", D, "mlp")
    (directory,) = (store.root / "owners").glob("*/objectives")
    iterdir = type(directory).iterdir

    def denied(path):
        if path == directory:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(type(directory), "iterdir", denied)
    with pytest.raises(PermissionError):
        Owners(store)


def test_a_crash_while_a_tenants_directory_was_made_does_no_harm(owners, store):
    register(owners, store, "a", D, "mlp")
    (store.root / "owners" / ("ef" * 32)).mkdir()
    assert Owners(store).may_use("a", D)


def test_shared_is_said_by_true_alone(owners, store):
    register(owners, store, "a", D)
    (path,) = (store.root / "owners").glob(f"*/objectives/{D}")
    path.write_text(json.dumps({"tenant": "a", "shared": "yes"}))
    assert [Owners(store).may_use(tenant, D) for tenant in ("a", "b")] == [True, False]


def test_each_tenant_is_told_of_its_own_registration(owners, store, monkeypatch):
    now = iter(range(10**9, 2 * 10**9, 1000))
    monkeypatch.setattr("time.time_ns", lambda: next(now))
    register(owners, store, "a", D, "mlp")
    register(owners, store, "b", D, "mlp")
    register(owners, store, "b", D, "again", shared=True)
    for known in (owners, Owners(store)):
        a, b, c = (known.find(tenant, D)[2] for tenant in "abc")
        assert a < b == c  # c sees nothing of a's objectives.
        assert {when for _, _, when in known.listing("a")} == {a}
        assert {when for _, _, when in known.listing("b")} == {b}
        assert [known.told(tenant, D) for tenant in ("a", "b", "c")] == [("a", a), ("b", b), ("b", b)]
        assert known.told("", D) == ("", None)
    register(owners, store, "b", D, "mlp")
    assert owners.find("b", D)[2] == b
    assert owners.told("c", D) == ("", None)
    owners.remove_objective("b", D)
    register(owners, store, "b", D, "mlp")
    assert owners.find("b", D)[2] > b


def test_a_record_of_an_older_server_is_read_and_made_anew_with_the_next_registration(owners, store):
    register(owners, store, "a", D, "mlp", shared=True)
    (path,) = (store.root / "owners").glob(f"*/objectives/{D}")
    path.write_text(json.dumps({"tenant": "a", "shared": True}))
    os.utime(path, ns=(5 * 10**9, 5 * 10**9))
    old = Owners(store)
    assert [old.may_use(tenant, D) for tenant in "ab"] == [True, True]
    assert old.find("a", "mlp")[2] == old.find("b", "a/mlp")[2] == 5 * 10**9
    assert old.told("a", D) == ("", 5 * 10**9)  # Its check was kept for all.
    register(old, store, "a", D, "mlp", shared=True)
    assert old.told("a", D) == Owners(store).told("a", D) == ("a", 5 * 10**9)


def test_a_tenants_check_goes_with_its_objective(owners, store):
    for tenant in "ab":
        register(owners, store, tenant, D)
        store.add_check(D, objective_pb2.RegistrationCheck(verdict="VERDICT_PASSED"), tenant)
    owners.remove_objective("a", D)
    assert store.check(D, "a") is None
    assert store.check(D, "b").verdict == objective_pb2.VERDICT_PASSED
