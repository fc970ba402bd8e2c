"""The objects that a tenant stores neither exceed its quota, nor show or hide another
tenant's: a real server with tenants.

Requests are made without hvpd's client, because the client is polite.
"""

import contextlib
import queue

import grpc
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._errors import failure_of_rpc
from hvpd._registration import export as _export
from hvpd._wire import codec
from hvpd.v1 import (
    blob_pb2,
    blob_pb2_grpc,
    objective_pb2,
    objective_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    tensor_pb2,
)
from hvpd_server import bundle as _admission
from hvpd_server.tenancy import token_file
from tests.support.waiting import until

WAIT = 60
MIB = 1 << 20
RIGHTS = ("use", "publish")


class Tenant:
    """A tenant's raw calls."""

    def __init__(self, address, token, store=None):
        self.store = store
        self.token = token
        self.address = address
        self._channel = grpc.insecure_channel(address)
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._services = {
            **dict.fromkeys(["FindMissingBlobs", "UploadBlob", "PruneBlobs"], blob_pb2_grpc.BlobServiceStub),
            **dict.fromkeys(["GetUsage"], server_pb2_grpc.ServerServiceStub),
        }

    def close(self):
        self._channel.close()

    def call(self, method, request):
        service = self._services.get(method, objective_pb2_grpc.ObjectiveServiceStub)(self._channel)
        return getattr(service, method)(request, metadata=self._metadata, timeout=WAIT)

    def begin(self, digest, size):
        """Begin an upload; return its pieces' queue and its future."""
        pieces = queue.SimpleQueue()
        stub = blob_pb2_grpc.BlobServiceStub(self._channel)
        future = stub.UploadBlob.future(iter(pieces.get, None), metadata=self._metadata, timeout=WAIT)
        pieces.put(blob_pb2.UploadBlobRequest(digest=digest, size_bytes=size))
        return pieces, future

    def upload(self, content):
        digest = codec.digest(content)
        chunks = [
            blob_pb2.UploadBlobRequest(
                digest=digest, size_bytes=len(content), offset_bytes=at, chunk=content[at : at + MIB]
            )
            for at in range(0, max(len(content), 1), MIB)
        ]
        self.call("UploadBlob", iter(chunks))
        return digest

    def stored(self):
        (usage,) = self.call("GetUsage", server_pb2.GetUsageRequest()).usages
        return usage.stored_bytes


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens") / "tokens.json"


@pytest.fixture(scope="module")
def server(serve_module, tokens):
    token_file.create(tokens, "ops", ["use", "publish", "administer"])
    return serve_module("--tokens", str(tokens))


@pytest.fixture
def tenant(server, tokens):
    """Make tenants: tenant(name, **limits)."""
    with contextlib.ExitStack() as stack:

        def made(name, rights=RIGHTS, **limits):
            token = token_file.create(tokens, name, rights)[0]
            if limits:
                token_file.limit(tokens, name, limits)
            return stack.enter_context(contextlib.closing(Tenant(server.address, token, server.store)))

        yield made


def refused(call, *arguments):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments)
    return error.value.code(), error.value.details()


def on_disk(store):
    """Return the bytes of a store's files that hold uploads, finished or under way."""
    return sum(
        path.stat().st_size for part in ("blobs", "incoming") for path in (store / part).rglob("*") if path.is_file()
    )


# The quota


def test_parallel_uploads_of_one_digest_each_take_of_the_quota(server, tenant):
    """Once, 24 of 8 MiB each were on the disk under a quota of 1 MiB."""
    attacker = tenant("parallel", stored_bytes=4 * MIB)
    content = bytes(MIB) + b"parallel"
    half = codec.digest(content)
    before, begun = on_disk(server.store), []
    try:
        for _ in range(12):
            pieces, future = attacker.begin(half, len(content))
            pieces.put(blob_pb2.UploadBlobRequest(chunk=content[:MIB]))
            begun.append((pieces, future))
        until(lambda: sum(future.done() for _, future in begun) == 9)  # Three of a bit more than 1 MiB fit into 4 MiB.
        refusals = [future for _, future in begun if future.done()]
        assert {future.code() for future in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "exceed its limit of 4194304 bytes" in refusals[0].details()
        assert on_disk(server.store) - before <= 4 * MIB
        assert 3 * MIB < attacker.stored() <= 4 * MIB
    finally:
        for pieces, future in begun:
            pieces.put(None)
            future.cancel()
    until(lambda: not attacker.stored())  # The calls end on the server a moment later.
    attacker.upload(content)
    assert attacker.stored() == len(content)


def test_a_blob_that_the_tenant_has_is_not_stored_again(server, tenant):
    attacker = tenant("again", stored_bytes=3 * MIB)
    digest = attacker.upload(bytes(2 * MIB))
    before = on_disk(server.store)
    for _ in range(3):
        assert (
            attacker.upload(bytes(2 * MIB)) == digest
        )  # An honest repetition is answered, and there would be no room.
    pieces, lied = attacker.begin(digest, 2 * MIB + 1)  # Announced as larger, it is no repetition.
    assert lied.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    pieces.put(None)
    assert (on_disk(server.store), attacker.stored()) == (before, 2 * MIB)


def test_a_full_quota_affects_no_other_tenant_and_a_shared_blob_counts_for_each(tenant):
    neighbour, attacker = tenant("neighbour"), tenant("full", stored_bytes=MIB)
    digest = neighbour.upload(bytes(2 * MIB) + b"n")
    code, _ = refused(attacker.upload, bytes(2 * MIB) + b"n")
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    asked = blob_pb2.FindMissingBlobsRequest(digests=[digest])
    assert list(attacker.call("FindMissingBlobs", asked).missing_digests) == [digest]
    assert not neighbour.call("FindMissingBlobs", asked).missing_digests


def test_names_without_end_fill_the_tenants_own_quota_only(tokens, tenant, exported):
    neighbour, attacker = tenant("calm"), tenant("names")
    digest, x, data = registered(neighbour, 9, name="mine")
    create(attacker, exported, exported.bundle.SerializeToString(deterministic=True))
    own = codec.digest(exported.bundle.SerializeToString(deterministic=True))
    before = attacker.stored()
    token_file.limit(tokens, "names", {"stored_bytes": before + 30 * 4096 + 100})
    until(lambda: limit_of(attacker) is not None)

    def name(text):
        attacker.call("CreateObjective", objective_pb2.CreateObjectiveRequest(digest=own, name=text))

    names = []
    with pytest.raises(grpc.RpcError) as error:
        for index in range(1000):
            name(f"n{index}")
            names.append(f"n{index}")
    assert failure_of_rpc(error.value).reason == "TENANT_STORAGE"
    assert len(names) == 30
    assert attacker.stored() == before + 30 * 4096
    works(neighbour, digest, x, data)
    assert get(neighbour, "mine").digest == digest
    attacker.call("DeleteObjective", objective_pb2.DeleteObjectiveRequest(name="n7"))
    name("another")
    name("another")  # It can repeat an upload.
    for each in (*names[:7], *names[8:], "another"):
        attacker.call("DeleteObjective", objective_pb2.DeleteObjectiveRequest(name=each))
    assert attacker.stored() < before


def limit_of(tenant):
    (usage,) = tenant.call("GetUsage", server_pb2.GetUsageRequest()).usages
    return usage.stored_bytes_limit if usage.HasField("stored_bytes_limit") else None


# Objects that are stored once for several tenants


def quartic(x, data):
    return jnp.sum(data * x**4) / 12


def registered(tenant, seed, **settings):
    """Register with hvpd's client; return the digest, x and data."""
    x, data = np.random.default_rng(seed).uniform(1, 2, (2, 5))
    with hvpd.connect(tenant.address, token=tenant.token) as client:
        objective = client.register(quartic, x, data, **settings)
        until(lambda: objective.registration_check().verdict != "pending")
        return objective.digest, x, data


def works(tenant, digest, x, data):
    with hvpd.connect(tenant.address, token=tenant.token) as client:
        product = client.objective(digest).at(x).hessian() @ np.ones(5)
    np.testing.assert_allclose(product, data * x**2)


def get(tenant, name):
    return tenant.call("GetObjective", objective_pb2.GetObjectiveRequest(name=name)).objective


def test_a_tenant_sees_only_its_own_registration_of_a_shared_digest(tenant):
    first, second, third = (tenant(name) for name in ("first", "second", "third"))
    digest, x, data = registered(first, 1, name="mine")
    before = get(first, digest)
    assert before.check.verdict == objective_pb2.VERDICT_PASSED
    alone, *_ = registered(second, 2)  # The second tenant's view of an objective that no other tenant has.
    assert registered(second, 1)[0] == digest
    # The third sends no x, and so has no check.
    for content in blobs(first, digest):
        third.upload(content)
    reply = third.call("CreateObjective", objective_pb2.CreateObjectiveRequest(digest=digest)).objective
    assert reply.check.verdict == objective_pb2.VERDICT_UNSPECIFIED
    assert "no x came" in reply.check.reason
    (listed,) = third.call("ListObjectives", objective_pb2.ListObjectivesRequest()).objectives
    assert (listed.check, listed.create_time, listed.name) == (reply.check, reply.create_time, "")
    times = [get(each, digest).create_time.ToNanoseconds() for each in (first, second, third)]
    assert times == sorted(set(times))
    assert times[1] > get(second, alone).create_time.ToNanoseconds()
    assert str(get(first, digest)) == str(before)
    # Each tenant deletes its own objective, and gets the answer that it would get
    # without the other.
    answers = [
        second.call("DeleteObjective", objective_pb2.DeleteObjectiveRequest(name=each)).deleted
        for each in (alone, digest)
    ]
    assert answers == [True, True]
    assert refused(get, second, digest)[0] is grpc.StatusCode.NOT_FOUND
    works(first, digest, x, data)
    assert third.call("DeleteObjective", objective_pb2.DeleteObjectiveRequest(name=digest)).deleted
    assert registered(second, 1)[0] == digest
    assert get(second, digest).create_time.ToNanoseconds() > times[2]
    works(first, digest, x, data)
    assert first.call("DeleteObjective", objective_pb2.DeleteObjectiveRequest(name="mine")).deleted
    works(second, digest, x, data)


def blobs(tenant, digest):
    """Return the contents of an objective's blobs, which any tenant may have made by
    itself.
    """
    bundle = (tenant.store / "blobs" / digest[:2] / digest).read_bytes()
    parts = _admission.references(objective_pb2.Bundle.FromString(bundle))
    return [bundle, *((tenant.store / "blobs" / part[:2] / part).read_bytes() for part in parts)]


def test_a_restart_keeps_the_owners_of_registrations(serve, tokens):
    server = serve("--tokens", str(tokens))
    made = [Tenant(server.address, token_file.create(tokens, name, RIGHTS)[0]) for name in ("early", "late")]
    try:
        digests = {registered(each, 3)[0] for each in made}
        (digest,) = digests
        before = [str(get(each, digest)) for each in made]
        assert before[0] != before[1]
        server.kill()
        server.start()
        with contextlib.closing(Tenant(server.address, made[0].token)) as early:
            until(lambda: answers(early))
            assert str(get(early, digest)) == before[0]
        with contextlib.closing(Tenant(server.address, made[1].token)) as late:
            assert str(get(late, digest)) == before[1]
    finally:
        for each in made:
            each.close()


def answers(tenant):
    try:
        tenant.stored()
    except grpc.RpcError:
        return False
    return True


# Bundles with very large fields


@pytest.fixture(scope="module")
def exported():
    return _export.export(quartic, np.ones(5), (np.ones(5),), platforms=("cpu",), precision="highest")


def filled(exported, size_bytes, seed=0):
    """Return a valid bundle of about this size: its nodes without leaves have names
    that are never read.
    """
    bundle = objective_pb2.Bundle.FromString(exported.bundle.SerializeToString())
    node = tensor_pb2.TreeSpec(kind=tensor_pb2.TreeSpec.KIND_LIST, type_name="x" * 1000)
    count = (size_bytes - bundle.ByteSize()) // (node.ByteSize() + 3)
    bundle.data_tree.children.extend([node] * count)
    bundle.data_tree.children[-1].type_name = f"{seed}"
    return bundle.SerializeToString(deterministic=True)


def create(tenant, exported, serialized, **settings):
    for content in (*exported.blobs.values(), serialized):
        tenant.upload(bytes(content))
    request = objective_pb2.CreateObjectiveRequest(digest=codec.digest(serialized), **settings)
    return tenant.call("CreateObjective", request)


def traces(server, digest):
    """Return an objective's traces in the store beside its blobs."""
    return [path for path in server.store.rglob(digest) if path.parent.name in ("objectives", "derived", "checks")]


def _version(bundle):
    bundle.jax_version = "x" * (3 << 20)


def _platforms(bundle):
    bundle.platforms.extend(["cpu"] * 70_000)


def _blocks(bundle):
    bundle.blocks.extend([objective_pb2.Block(leaves=[0])] * 300_000)


def _programs(bundle):
    for number in range(70_000):
        bundle.programs[f"{number}"].size_bytes = 1


@pytest.mark.parametrize("fill", [_version, _platforms, _blocks, _programs])
def test_a_field_without_bounds_is_refused_and_nothing_is_stored(server, tenant, exported, fill):
    """Once, a jax_version of 6 MiB in a shared objective made `objectives()` fail for
    all other tenants.
    """
    attacker, neighbour = tenant("filler"), tenant("listing")
    bundle = objective_pb2.Bundle.FromString(exported.bundle.SerializeToString())
    fill(bundle)
    serialized = bundle.SerializeToString()
    code, details = refused(lambda: create(attacker, exported, serialized, name="bad", shared=True))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "are allowed" in details
    assert traces(server, codec.digest(serialized)) == []
    assert refused(get, attacker, "bad")[0] is grpc.StatusCode.NOT_FOUND
    with hvpd.connect(neighbour.address, token=neighbour.token) as client:
        assert "filler/bad" not in [listing.name for listing in client.objectives()]


def test_an_objective_that_no_reply_has_room_for_is_not_registered(server, tenant, exported):
    """Once, the registration returned an error, and took effect."""
    attacker = tenant("bulky")
    serialized = filled(exported, (4 << 20) - 30_000)
    assert (4 << 20) - 60_000 < len(serialized) <= 4 << 20
    code, details = refused(lambda: create(attacker, exported, serialized, name="bulky"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "together at most" in details
    assert traces(server, codec.digest(serialized)) == []
    assert refused(get, attacker, "bulky")[0] is grpc.StatusCode.NOT_FOUND
    too_large = serialized + serialized[-1000:] * 100
    assert "4194304 are allowed" in refused(lambda: create(attacker, exported, too_large))[1]


def test_large_shared_objectives_are_listed_for_all_tenants(tenant, exported):
    attacker, neighbour = tenant("large"), tenant("reader")
    for seed in range(4):
        create(attacker, exported, filled(exported, (4 << 20) - 200_000, seed), name=f"{seed}", shared=True)
    with hvpd.connect(neighbour.address, token=neighbour.token) as client:
        names = [listing.name for listing in client.objectives()]
        assert {f"large/{seed}" for seed in range(4)} <= set(names)
        assert client.objective("large/3").n == 5
    for seed in range(4):
        attacker.call("DeleteObjective", objective_pb2.DeleteObjectiveRequest(name=f"{seed}"))
