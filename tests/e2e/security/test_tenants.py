"""A tenant sees and uses only its own objectives and shared ones."""

import hashlib

import grpc
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._cli import main
from hvpd.v1 import (
    blob_pb2,
    curvature_pb2,
    objective_pb2,
    tensor_pb2,
)
from tests.support.security import SECRET, N, metadata
from tests.support.waiting import until


def weighted(x, w):
    return jnp.sum(w * x**2) / 2


def spec_of(objective, x, data=None):
    return curvature_pb2.PointSpec(
        objective_digest=objective.digest,
        x_digest=hashlib.sha256(x.tobytes()).hexdigest(),
        data=data,
        default_data=data is None,
    )


def secret_tensor(w):
    return tensor_pb2.Tensor(dtype="float64", shape=w.shape, digest=hashlib.sha256(w.tobytes()).hexdigest())


def test_other_tenants_cannot_find_an_objective(tenants, w):
    a, b = tenants
    objective = a.client.register(weighted, np.ones(N), w, name="digits/mlp")
    point = objective.at(SECRET)
    np.testing.assert_array_equal(point.hessian() @ np.ones(N), w)
    assert objective.name == f"{a.name}/digits/mlp"
    assert a.client.objective("digits/mlp").digest == objective.digest
    for name in ("digits/mlp", f"{a.name}/digits/mlp", objective.digest, objective.digest[:12]):
        with pytest.raises(hvpd.NotFoundError) as error:
            b.client.objective(name)
        assert "mlp'?" not in str(error.value)
    assert objective.digest not in [listing.digest for listing in b.client.objectives()]
    assert (
        b.refused(b.objectives.GetPlan, objective_pb2.GetPlanRequest(digest=objective.digest)) == "OBJECTIVE_NOT_FOUND"
    )
    with pytest.raises(grpc.RpcError) as refused:
        b.opens(spec=spec_of(objective, SECRET), inline_x=SECRET.tobytes())
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    point_id = a.opens(spec=spec_of(objective, SECRET), inline_x=SECRET.tobytes()).point.id
    assert point_id
    assert b.refused_at(point_id) == {"POINT_NOT_RESIDENT"}


def test_a_digest_gives_no_access_to_stored_blobs(tenants, w):
    a, b = tenants
    objective = a.client.register(weighted, np.ones(N), w)
    stored = [objective.digest, secret_tensor(w).digest]
    missing = blob_pb2.FindMissingBlobsRequest(digests=stored)
    assert list(a.blobs.FindMissingBlobs(missing, metadata=metadata(a.token)).missing_digests) == []
    assert list(b.blobs.FindMissingBlobs(missing, metadata=metadata(b.token)).missing_digests) == stored
    create = objective_pb2.CreateObjectiveRequest(digest=objective.digest)
    assert b.refused(b.objectives.CreateObjective, create) == "BLOBS_MISSING"
    own = b.client.register(weighted, np.ones(N), np.ones(N))
    for digest in (stored[1], hashlib.sha256(b"a blob that no tenant has").hexdigest()):
        tensor = tensor_pb2.Tensor(dtype="float64", shape=[N], digest=digest)
        with pytest.raises(grpc.RpcError) as refused:
            b.opens(spec=spec_of(own, SECRET, [tensor]), inline_x=SECRET.tobytes())
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    # A tenant that has the data may use it, in spite of other tenants.
    np.testing.assert_array_equal(own.at(SECRET, w).hessian() @ np.ones(N), w)
    np.testing.assert_array_equal(own.at(SECRET, np.ones(N)).hessian() @ np.ones(N), np.ones(N))


def test_two_tenants_that_register_the_same_objective_both_have_it(tenants, w):
    a, b = tenants
    theirs = [tenant.client.register(weighted, np.ones(N), w, name="same") for tenant in (a, b)]
    assert theirs[0].digest == theirs[1].digest
    assert [each.name for each in theirs] == [f"{a.name}/same", f"{b.name}/same"]
    for each in theirs:
        np.testing.assert_array_equal(each.at(SECRET).hessian() @ np.ones(N), w)
    assert f"{a.name}/same" not in [listing.name for listing in b.client.objectives()]


def test_an_objective_that_another_tenant_has_registered_is_not_compiled_again(tenants, w):
    """So the time of a registration, and the plan, show that another tenant has it."""
    a, b = tenants

    def cubic(x, w):
        return jnp.sum(w * x**3) / 6

    def compiles(tenant):
        objective = tenant.client.register(cubic, np.ones(N), w)
        request = objective_pb2.GetPlanRequest(digest=objective.digest)
        return tenant.objectives.GetPlan(request, metadata=metadata(tenant.token), timeout=60).compiles

    def ready():
        found = compiles(a)
        return all(each.state == objective_pb2.Compile.STATE_READY for each in found) and list(found)

    first = until(ready)
    assert sum(each.seconds for each in first) > 0
    theirs = list(compiles(b))
    assert [each for each in first if each not in theirs] == []


def test_a_shared_objective_is_used_by_its_full_name_until_it_is_private_again(tenants, w):
    a, b = tenants
    a.client.register(weighted, np.ones(N), w, name="mlp", shared=True)
    shared = b.client.objective(f"{a.name}/mlp")
    H = shared.at(SECRET).hessian()
    np.testing.assert_array_equal(H @ np.ones(N), w)
    np.testing.assert_array_equal(shared.at(SECRET, w + 1).hessian() @ np.ones(N), w + 1)
    assert f"{a.name}/mlp" in [listing.name for listing in b.client.objectives()]
    with pytest.raises(hvpd.NotFoundError, match=f"did you mean '{a.name}/mlp'"):
        b.client.objective("mlp")
    before = a.client.objective("mlp").digest
    with pytest.raises(hvpd.AccessError, match="belongs to tenant"):
        b.client.register(lambda x: jnp.sum(x**2), np.ones(N), name=f"{a.name}/mlp")
    a.client.register(weighted, np.ones(N), w, name="mlp")
    with pytest.raises(hvpd.NotFoundError):
        H @ np.ones(N)
    with pytest.raises(hvpd.NotFoundError):
        shared.at(SECRET + 1)
    # A name that the tenant cannot see is free under its own.
    b.client.register(lambda x: jnp.sum(x**2), np.ones(N), name=f"{a.name}/mlp")
    assert a.client.objective("mlp").digest == a.client.objective(f"{a.name}/mlp").digest == before
    assert b.client.objective(f"{a.name}/mlp").digest != before


def test_the_command_shares_too(tenants, secured, place, tmp_path, capsys):
    a, b = tenants
    source = tmp_path / "model.py"
    source.write_text("import numpy as np\ndef objective():\n    return lambda x: (x**2).sum(), np.ones(3)\n")
    connection = ["--address", secured.address, "--token", a.token, "--ca", str(place.trust)]
    for flags in ([], ["--shared"]):
        assert main.main(["register", f"{source}:objective", "--name", "square", *flags, *connection]) == 0
        assert capsys.readouterr().out.startswith(f"{a.name}/square ")
        seen = [listing.name for listing in b.client.objectives()]
        assert (f"{a.name}/square" in seen) is bool(flags)


def test_a_point_needs_its_x(tenants, w):
    """This holds for a shared objective, too: neither the point's id nor the digest of
    its x gives a value, gradient or product.
    """
    a, b = tenants
    objective = a.client.register(weighted, np.ones(N), w, name="mlp", shared=True)
    spec = spec_of(objective, SECRET)
    point = a.opens(spec=spec, inline_x=SECRET.tobytes()).point.id
    assert b.opens(spec=spec).x_wanted
    assert b.refused_at(point) == {"POINT_NOT_RESIDENT"}
    moved = SECRET + 0.5 * np.ones(N)
    move = {"base_id": point, "alpha": 0.5, "direction_digest": hashlib.sha256(np.ones(N).tobytes()).hexdigest()}
    further = spec_of(objective, moved)
    assert a.opens(spec=further, move=curvature_pb2.Move(**move)).direction_wanted
    assert b.opens(spec=further, move=curvature_pb2.Move(**move)).x_wanted
    assert b.opens(spec=spec, inline_x=SECRET.tobytes()).point.id == point
    np.testing.assert_array_equal(b.client.objective(f"{a.name}/mlp").at(SECRET).hessian() @ np.ones(N), w)


def test_a_direction_is_for_the_tenant_that_sent_it(tenants, w):
    a, b = tenants
    objective = a.client.register(weighted, np.ones(N), w, name="mlp", shared=True)
    direction = np.ones(N) + w
    digest = hashlib.sha256(direction.tobytes()).hexdigest()

    def step(tenant, alpha, *chunks):
        """Return the server's answers to a step whose direction is sent in these
        chunks.
        """
        base = tenant.opens(spec=spec_of(objective, SECRET), inline_x=SECRET.tobytes()).point.id
        move = curvature_pb2.Move(base_id=base, alpha=alpha, direction_digest=digest)
        opening = curvature_pb2.CreatePointRequest(spec=spec_of(objective, SECRET + alpha * direction), move=move)
        requests = iter([opening, *(curvature_pb2.CreatePointRequest(chunk=chunk) for chunk in chunks)])
        for answer in tenant.curvature.CreatePoint(requests, metadata=metadata(tenant.token), timeout=60):
            yield answer.WhichOneof("content")

    assert list(step(a, 0.5, direction.tobytes())) == ["direction_wanted", "point", "chunk"]
    assert list(step(a, 0.25)) == ["point", "chunk"]
    assert next(step(b, 0.25)) == "direction_wanted"
    assert list(step(b, 0.25, direction.tobytes())) == ["direction_wanted", "point", "chunk"]
    assert list(step(b, 0.125)) == ["point", "chunk"]
