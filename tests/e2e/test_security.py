"""Real servers that encrypt and ask who calls, and those whom they must not let in. Certificates are made here, by trustme."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import pkgutil
import re
import socket
import ssl
import threading
import time

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
import trustme
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

import hvpd
import hvpd.v1
from hvpd import _cli
from hvpd.v1 import (
    blob_pb2,
    blob_pb2_grpc,
    curvature_pb2,
    curvature_pb2_grpc,
    objective_pb2,
    objective_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    tensor_pb2,
)
from hvpd_server import _auth
from hvpd_server._gate import OPEN

N = 5


def until(condition):
    """Asks until it is so."""
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends


class Place:
    """The files of a server, and of those who call it."""

    def __init__(self, root):
        self.root = root
        self.ca = trustme.CA()
        self.tokens = root / "tokens.json"
        self.made = []
        self.trust = self.write("ca.pem", self.ca.cert_pem.bytes())
        self.certify()

    def write(self, name, content):
        path = self.root / name
        scratch = self.root / f"{name}.new"
        scratch.write_bytes(content)
        scratch.rename(path)
        return path

    def certify(self, ca=None):
        """Gives the server another certificate, for 127.0.0.1 and nobody else; returns it."""
        leaf = (ca or self.ca).issue_cert("127.0.0.1")
        self.write("server.pem", b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        self.write("server.key", leaf.private_key_pem.bytes())
        return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())

    def personal(self, name, ca=None):
        """A certificate to show: settings of connect."""
        leaf = (ca or self.ca).issue_cert(f"{name}.example")
        return {
            "cert": self.write(f"{name}.pem", leaf.cert_chain_pems[0].bytes()),
            "key": self.write(f"{name}.key", leaf.private_key_pem.bytes()),
        }

    def token(self, tenant, *rights, **settings):
        """A new token, and what it is listed by."""
        token, grant = _auth.create(self.tokens, tenant, rights, **settings)
        self.made.append(token)
        return token, grant.id

    @property
    def flags(self):
        return "--tls-cert", str(self.root / "server.pem"), "--tls-key", str(self.root / "server.key")

    def shown(self, serving):
        """The certificate that a new connection is shown."""
        context = ssl.create_default_context(cadata=self.ca.cert_pem.bytes().decode())
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", serving.port), 30) as plain:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                return secure.getpeercert(binary_form=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("secured"))


@pytest.fixture(scope="module")
def publisher(place):
    return place.token("vision", "use", "publish")[0]


@pytest.fixture(scope="module")
def secured(serve_module, place, publisher):
    """TLS and tokens; at the end nothing that it said may have a token in it."""
    server = serve_module(*place.flags, "--tokens", str(place.tokens), "--log-level", "DEBUG")
    yield server
    assert server.process.poll() is None
    said = "\n".join(server.lines)
    assert not [token for token in place.made if token in said]


@pytest.fixture(scope="module")
def mutual(serve_module, tmp_path_factory):
    """TLS, and certificates of clients."""
    place = Place(tmp_path_factory.mktemp("mutual"))
    server = serve_module(*place.flags, "--tls-client-ca", str(place.trust))
    return place, server


@pytest.fixture(scope="module")
def quartic(place, secured, publisher):
    """x -> sum(x^4) / 12, whose Hessian is diag(x^2)."""
    with connect(place, secured, publisher) as client:
        client.register(lambda x: jnp.sum(x**4) / 12, np.ones(N), name="quartic", shared=True)
    return "vision/quartic"


def connect(place, server, token=None, **settings):
    return hvpd.connect(server.address, token=token, **{"ca": place.trust, "connect_timeout": 60} | settings)


def channel(place, server):
    credentials = grpc.ssl_channel_credentials(place.trust.read_bytes())
    return grpc.secure_channel(server.address, credentials)


def metadata(token):
    return (("authorization", f"Bearer {token}"),)


def product(client, name, x=3.0):
    """A product at a point that is made anew, and whether it is right."""
    H = client.objective(name).at(np.full(N, x)).hessian()
    np.testing.assert_allclose(H @ np.arange(N), x**2 * np.arange(N), rtol=1e-12)


# Who may do what


def test_with_its_rights_a_tenant_registers_and_solves(place, secured, publisher, quartic):
    with connect(place, secured, publisher) as client:
        product(client, quartic)
        assert client.objective("quartic").name == quartic
        assert quartic in [listing.name for listing in client.objectives()]
        assert client.objective(quartic).registration_check().verdict in ("pending", "passed")
        assert publisher not in repr(client)
        assert publisher not in repr(vars(client))


def test_the_environment_has_what_connect_needs(place, secured, publisher, quartic, monkeypatch, capsys):
    monkeypatch.setenv("HVPD_ADDRESS", secured.address)
    monkeypatch.setenv("HVPD_TOKEN", publisher)
    monkeypatch.setenv("HVPD_CA", str(place.trust))
    with hvpd.connect() as client:
        product(client, quartic)
    assert _cli.main(["objectives"]) == 0
    assert quartic in capsys.readouterr().out
    monkeypatch.delenv("HVPD_CA")
    monkeypatch.delenv("HVPD_TOKEN")
    assert _cli.main(["objectives", "--ca", str(place.trust), "--token", publisher]) == 0
    capsys.readouterr()
    assert _cli.main(["objectives", "--ca", str(place.trust)]) == 1
    assert "this server asks who calls" in capsys.readouterr().err


def test_who_may_use_may_not_publish_and_the_other_way_round(place, secured, quartic):
    use, publish = place.token("speech", "use")[0], place.token("speech", "publish")[0]
    with connect(place, secured, use) as client:
        product(client, quartic)
        with pytest.raises(hvpd.AccessError, match=r"right 'publish'.*tenant speech") as error:
            client.register(lambda x: jnp.sum(x**2), np.ones(2))
        assert error.value.reason == "RIGHT_MISSING"
    with connect(place, secured, publish) as client:
        client.register(lambda x: jnp.sum(x**2), np.ones(2))
        with pytest.raises(PermissionError, match=r"right 'use'.*tenant speech"):
            client.objective(quartic)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "this server asks who calls"),
        ("wrong", "not one of this server's"),
        ("A" * 4096, "not one of this server's"),
        ("cut", "not one of this server's"),
    ],
)
def test_nobody_else_gets_anything_but_what_the_server_is(place, secured, publisher, quartic, token, says):
    token = publisher[:-1] if token == "cut" else token
    with connect(place, secured, token) as client:
        assert client.server.version == hvpd.__version__
        with pytest.raises(hvpd.AccessError, match=says) as error:
            client.objective(quartic)
        assert client.statistics().retries == 0
        assert token is None or token not in str(error.value)


@pytest.mark.parametrize("token", ["é", "a\nb", "", "A" * 5000, "A" * (1 << 20)])
def test_what_is_no_token_is_not_sent(token):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"a token (is made of|has from)") as error:
        hvpd.connect("127.0.0.1:1", token=token or " ")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("size", [7_000, 1 << 20])
def test_a_token_of_any_size_is_refused_and_hurts_nobody(place, secured, publisher, quartic, size):
    with channel(place, secured) as opened:
        stub = curvature_pb2_grpc.CurvatureServiceStub(opened)
        with pytest.raises(grpc.RpcError) as error:
            stub.ComputeProduct(curvature_pb2.ComputeProductRequest(), metadata=metadata("A" * size), timeout=30)
        assert error.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with connect(place, secured, publisher) as client:
        product(client, quartic)


def calls():
    """Every method of every service of the protocol: its path, and whether its request streams."""
    for module in pkgutil.iter_modules(hvpd.v1.__path__, "hvpd.v1."):
        if module.name.endswith("_pb2"):
            for service in importlib.import_module(module.name).DESCRIPTOR.services_by_name.values():
                yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


@pytest.mark.parametrize("method", sorted(set(calls()) - OPEN))
@pytest.mark.parametrize(
    "said", [(), metadata("wrong"), (*metadata("wrong"), *metadata("wrong")), (("authorization", ""),)]
)
def test_no_method_is_reached_without_a_token_and_none_waits_for_a_message(place, secured, method, said):
    silent = threading.Event()
    with channel(place, secured) as opened:
        call = opened.stream_stream(method)(iter(silent.wait, True), metadata=said, timeout=30)
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        silent.set()
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_is_for_everybody_and_reflection_for_those_with_a_token(place, secured, publisher):
    with channel(place, secured) as opened:
        health = health_pb2_grpc.HealthStub(opened)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            next(health.Watch(health_pb2.HealthCheckRequest(), timeout=30))
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        watch = health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata(publisher), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        assert server_pb2_grpc.ServerServiceStub(opened).GetServer(server_pb2.GetServerRequest()).version
        with pytest.raises(grpc.RpcError) as error:
            ProtoReflectionDescriptorDatabase(opened).get_services()
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        known = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(opened, WithToken(publisher)))
        assert "hvpd.v1.CurvatureService" in known.get_services()


class WithToken(grpc.StreamStreamClientInterceptor):
    def __init__(self, token):
        self.token = token

    def intercept_stream_stream(self, continuation, details, requests):
        return continuation(details._replace(metadata=metadata(self.token)), requests)


def test_many_wrong_tokens_keep_nobody_from_solving(place, secured, publisher, quartic):
    before = len(secured.lines)
    with channel(place, secured) as opened, connect(place, secured, publisher) as client:
        stub = curvature_pb2_grpc.CurvatureServiceStub(opened)
        request = curvature_pb2.ComputeProductRequest()
        tries = [stub.ComputeProduct.future(request, metadata=metadata(f"guess{i}"), timeout=60) for i in range(500)]
        product(client, quartic, 4.0)
        assert {each.code() for each in tries} == {grpc.StatusCode.UNAUTHENTICATED}

    def counted():
        return sum(int(found[1]) for line in secured.lines[before:] if (found := re.search(r" left_out=(\d+)$", line)))

    until(lambda: counted() > 400)
    assert sum("code=UNAUTHENTICATED" in line for line in secured.lines[before:]) < 50


# Tenants among themselves


@dataclasses.dataclass
class Tenant:
    """One who may use and publish, as its client and by hand."""

    name: str
    client: hvpd.Client
    token: str
    blobs: blob_pb2_grpc.BlobServiceStub
    objectives: objective_pb2_grpc.ObjectiveServiceStub
    curvature: curvature_pb2_grpc.CurvatureServiceStub

    def refused(self, method, request):
        """The reason for which a call is refused."""
        with pytest.raises(grpc.RpcError) as error:
            answer = method(request, metadata=metadata(self.token), timeout=60)
            list(answer) if hasattr(answer, "__iter__") else answer
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
        return info.reason

    def opens(self, **request):
        """The first answer to CreatePoint."""
        requests = iter([curvature_pb2.CreatePointRequest(**request)])
        return next(self.curvature.CreatePoint(requests, metadata=metadata(self.token), timeout=60))

    def refused_at(self, point):
        """The reasons for which all that can be asked for at a point is refused."""
        spec = curvature_pb2.ProductSpec(point_id=point, operator=curvature_pb2.OPERATOR_HESSIAN, k=1)
        request = curvature_pb2.ComputeProductRequest(spec=spec, vectors=bytes(8 * N))
        message = curvature_pb2.StreamProductsRequest(tag=1, spec=spec, chunk=bytes(8 * N))
        streamed = self.curvature.StreamProducts(iter([message]), metadata=metadata(self.token), timeout=60)
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in next(streamed).error.details)
        factors = curvature_pb2.ComputeFactorsRequest(point_id=point)
        return {
            info.reason,
            self.refused(self.curvature.ComputeProduct, request),
            self.refused(self.curvature.ComputeFactors, factors),
        }


@pytest.fixture
def tenants(place, secured):
    """Two that no other test has."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(channel(place, secured))
        found = []
        for who in "ab":
            name = f"{who}-{len(place.made)}"
            token, _ = place.token(name, "use", "publish")
            stubs = (
                blob_pb2_grpc.BlobServiceStub(opened),
                objective_pb2_grpc.ObjectiveServiceStub(opened),
                curvature_pb2_grpc.CurvatureServiceStub(opened),
            )
            client = stack.enter_context(connect(place, secured, token))
            found.append(Tenant(name, client, token, *stubs))
        yield found


SECRET = np.arange(N) + 0.25


@pytest.fixture
def w(place):
    """Data that no other test has."""
    return SECRET + 10 * len(place.made)


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


def test_what_a_tenant_registers_is_its_own(tenants, w):
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


def test_a_digest_is_no_key_to_what_is_stored(tenants, w):
    a, b = tenants
    objective = a.client.register(weighted, np.ones(N), w)
    stored = [objective.digest, secret_tensor(w).digest]
    missing = blob_pb2.FindMissingBlobsRequest(digests=stored)
    assert list(a.blobs.FindMissingBlobs(missing, metadata=metadata(a.token)).missing_digests) == []
    assert list(b.blobs.FindMissingBlobs(missing, metadata=metadata(b.token)).missing_digests) == stored
    create = objective_pb2.CreateObjectiveRequest(digest=objective.digest)
    assert b.refused(b.objectives.CreateObjective, create) == "BLOBS_MISSING"
    own = b.client.register(weighted, np.ones(N), np.ones(N))
    for digest in (stored[1], hashlib.sha256(b"what nobody has").hexdigest()):
        tensor = tensor_pb2.Tensor(dtype="float64", shape=[N], digest=digest)
        with pytest.raises(grpc.RpcError) as refused:
            b.opens(spec=spec_of(own, SECRET, [tensor]), inline_x=SECRET.tobytes())
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    # Who has the data has it, whoever else does.
    np.testing.assert_array_equal(own.at(SECRET, w).hessian() @ np.ones(N), w)
    np.testing.assert_array_equal(own.at(SECRET, np.ones(N)).hessian() @ np.ones(N), np.ones(N))


def test_two_who_register_the_same_both_have_it(tenants, w):
    a, b = tenants
    theirs = [tenant.client.register(weighted, np.ones(N), w, name="same") for tenant in (a, b)]
    assert theirs[0].digest == theirs[1].digest
    assert [each.name for each in theirs] == [f"{a.name}/same", f"{b.name}/same"]
    for each in theirs:
        np.testing.assert_array_equal(each.at(SECRET).hessian() @ np.ones(N), w)
    assert f"{a.name}/same" not in [listing.name for listing in b.client.objectives()]


def test_what_is_shared_is_used_by_its_full_name_until_it_is_not(tenants, w):
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
    b.client.register(lambda x: jnp.sum(x**2), np.ones(N), name=f"{a.name}/mlp")
    assert a.client.objective("mlp").digest == a.client.objective(f"{a.name}/mlp").digest == before
    assert b.client.objective(f"{a.name}/mlp").digest != before
    a.client.register(weighted, np.ones(N), w, name="mlp")
    with pytest.raises(hvpd.NotFoundError):
        H @ np.ones(N)
    with pytest.raises(hvpd.NotFoundError):
        shared.at(SECRET + 1)


def test_the_command_shares_too(tenants, secured, place, tmp_path, capsys):
    a, b = tenants
    source = tmp_path / "model.py"
    source.write_text("import numpy as np\ndef objective():\n    return lambda x: (x**2).sum(), np.ones(3)\n")
    connection = ["--address", secured.address, "--token", a.token, "--ca", str(place.trust)]
    for flags in ([], ["--shared"]):
        assert _cli.main(["register", f"{source}:objective", "--name", "square", *flags, *connection]) == 0
        assert capsys.readouterr().out.startswith(f"{a.name}/square ")
        seen = [listing.name for listing in b.client.objectives()]
        assert (f"{a.name}/square" in seen) is bool(flags)


def test_a_point_is_for_who_has_its_x(tenants, w):
    """Of an objective that is shared, too: neither its id nor the digest of its x gives value, gradient or products."""
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


def test_a_direction_is_for_who_has_sent_it(tenants, w):
    a, b = tenants
    objective = a.client.register(weighted, np.ones(N), w, name="mlp", shared=True)
    direction = np.ones(N) + w
    digest = hashlib.sha256(direction.tobytes()).hexdigest()

    def step(tenant, alpha, *chunks):
        """What the server answers to a step whose direction is sent in these chunks."""
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


# Tokens that end


def ends(client, name):
    """Multiplies until that is not allowed any more; returns why."""
    deadline = time.monotonic() + 30
    with pytest.raises(hvpd.AccessError) as error:
        H = client.objective(name).at(np.ones(N)).hessian()
        while time.monotonic() < deadline:
            H @ np.ones(N)
    return error.value


def test_a_solve_ends_when_its_token_is_revoked(place, secured, quartic, capsys):
    token, listed = place.token("speech", "use")
    other, _ = place.token("speech", "use")
    with connect(place, secured, token) as client, connect(place, secured, other) as stays:
        product(client, quartic)
        product(stays, quartic)
        assert _cli.main(["token", "revoke", listed, "--file", str(place.tokens)]) == 0
        error = ends(client, quartic)
        assert error.reason == "TOKEN_UNKNOWN"
        assert "was revoked" in str(error)
        product(stays, quartic)
        assert stays.statistics().retries == 0


def test_a_solve_ends_when_its_token_expires(place, secured, quartic):
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
    token, _ = place.token("speech", "use", expires=soon)
    with connect(place, secured, token) as client:
        error = ends(client, quartic)
    assert datetime.datetime.now(datetime.UTC) >= soon
    assert error.reason == "TOKEN_EXPIRED"
    assert "tenant speech was good until" in str(error)


def test_a_stream_that_is_idle_ends_with_its_token(place, secured):
    token, listed = place.token("speech", "use")
    silent = threading.Event()
    with channel(place, secured) as opened:
        stub = curvature_pb2_grpc.CurvatureServiceStub(opened)
        request = curvature_pb2.StreamProductsRequest(tag=1, spec=curvature_pb2.ProductSpec())
        requests = iter([request])

        def messages():
            yield from requests
            silent.wait()

        call = stub.StreamProducts(messages(), metadata=metadata(token), timeout=60)
        assert next(call).error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]  # It is open, and answers.
        began = time.monotonic()
        _auth.revoke(place.tokens, listed)
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert time.monotonic() - began < 10
        assert error.value.code() is grpc.StatusCode.CANCELLED
        silent.set()


def test_a_broken_file_of_tokens_changes_nothing(place, secured, publisher, quartic):
    whole = place.tokens.read_bytes()
    place.write("tokens.json", whole[:-20])
    until(lambda: any("stay in force" in line for line in secured.lines))
    with connect(place, secured, publisher) as client:
        product(client, quartic)
    place.write("tokens.json", whole)


# TLS


def test_what_client_and_server_speak_differently_is_said_at_once(place, secured, server):
    began = time.monotonic()
    with pytest.raises(
        hvpd.UnavailableError, match=r"the server speaks TLS and this client does not.*tls=True"
    ) as error:
        hvpd.connect(secured.address, connect_timeout=60)
    assert error.value.reason == "TLS"
    with pytest.raises(hvpd.UnavailableError, match=r"this client speaks TLS and the server does not") as error:
        connect(place, server)
    assert error.value.reason == "TLS"
    assert time.monotonic() - began < 20


def test_a_server_of_another_ca_or_another_name_is_not_talked_to(place, secured, publisher, tmp_path):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    began = time.monotonic()
    for settings in ({"ca": tmp_path / "other.pem"}, {"tls": True}):
        with pytest.raises(
            hvpd.UnavailableError, match=r"the server's certificate is not accepted: .*certificate"
        ) as error:
            hvpd.connect(secured.address, token=publisher, connect_timeout=60, **settings)
        assert publisher not in str(error.value)
    with pytest.raises(hvpd.UnavailableError, match=r"certificate is not accepted: Hostname mismatch"):
        hvpd.connect(f"localhost:{secured.port}", token=publisher, ca=place.trust, connect_timeout=60)
    assert time.monotonic() - began < 30


def test_a_server_that_asks_for_certificates_takes_those_of_its_ca_only(mutual):
    place, server = mutual
    with connect(place, server, **place.personal("somebody")) as client:
        assert client.register(lambda x: jnp.sum(x**2), np.ones(2), name="square").at(np.ones(2)).value == 2
    began = time.monotonic()
    with pytest.raises(hvpd.UnavailableError, match=r"asks for this client's certificate.*cert=FILE") as error:
        connect(place, server)
    assert error.value.reason == "TLS"
    with pytest.raises(hvpd.UnavailableError, match=r"does not accept this client's certificate"):
        connect(place, server, **place.personal("stranger", trustme.CA()))
    with pytest.raises(hvpd.UnavailableError, match=r"the server speaks TLS"):
        hvpd.connect(server.address, connect_timeout=60)
    assert time.monotonic() - began < 30


def test_certificates_change_under_a_running_solve_which_loses_nothing(place, secured, publisher, quartic):
    stop, wrong = threading.Event(), []

    def solve(client):
        H = client.objective(quartic).at(np.full(N, 2.0)).hessian()
        while not stop.is_set():
            if not np.array_equal(H @ np.arange(N), 4.0 * np.arange(N)):
                wrong.append(1)

    with connect(place, secured, publisher) as client:
        thread = threading.Thread(target=solve, args=(client,))
        thread.start()
        try:
            for _ in range(3):
                renewed = place.certify()
                assert place.shown(secured) == renewed
                with connect(place, secured, publisher) as newcomer:
                    product(newcomer, quartic)
        finally:
            stop.set()
            thread.join(30)
        assert not thread.is_alive()
        assert not wrong
        assert client.statistics().products > 0
        assert client.statistics().retries == 0


@pytest.mark.parametrize(
    ("name", "content"), [("server.pem", b"no certificate"), ("server.pem", None), ("server.key", b"")]
)
def test_a_broken_certificate_leaves_the_old_one(place, secured, name, content):
    known = place.certify()
    assert place.shown(secured) == known
    if content is None:  # That of another key.
        content = place.ca.issue_cert("127.0.0.1").cert_chain_pems[0].bytes()
    lines = len(secured.lines)
    place.write(name, content)
    for _ in range(3):
        assert place.shown(secured) == known
    until(lambda: any("no PEM certificate and its unencrypted key" in line for line in secured.lines[lines:]))
    renewed = place.certify()
    assert place.shown(secured) == renewed
    assert sum("no PEM certificate and its" in line for line in secured.lines[lines:]) <= 2


def test_a_new_ca_is_what_clients_must_trust_then(place, secured, publisher, tmp_path):
    other = trustme.CA()
    other.cert_pem.write_to_path(tmp_path / "other.pem")
    try:
        place.certify(other)
        with pytest.raises(hvpd.UnavailableError, match="certificate is not accepted"):
            connect(place, secured, publisher)
        with connect(place, secured, publisher, ca=tmp_path / "other.pem") as client:
            assert client.objectives()
    finally:
        place.certify()


# What is refused before anything is sent


@pytest.mark.parametrize("address", ["gpu-box.invalid:7070", "10.0.0.1:7070", "[2001:db8::1]:7070"])
def test_a_token_does_not_leave_the_machine_as_plain_text(address):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"as plain text.*ca=FILE.*insecure=True") as error:
        hvpd.connect(address, token="hvpd_secret", connect_timeout=0.1)
    assert "hvpd_secret" not in str(error.value)


def test_unless_it_is_said_to():
    with pytest.raises(hvpd.UnavailableError, match="no hvpd server answers"):
        hvpd.connect("gpu-box.invalid:7070", token="hvpd_secret", connect_timeout=0.1, insecure=True)


def test_settings_of_tls_that_do_not_fit(tmp_path, place, monkeypatch):
    personal, other = place.personal("one"), place.personal("two")
    missing, empty = tmp_path / "none.pem", tmp_path / "empty.pem"
    empty.write_bytes(b"")
    for settings, says in [
        ({"tls": False, "ca": place.trust}, "tls=False says that there is to be none"),
        ({"tls": "yes"}, "tls is True, False or None"),
        ({"cert": personal["cert"]}, "cert and key .* go together"),
        ({"key": personal["key"]}, "cert and key .* go together"),
        ({"cert": personal["cert"], "key": other["key"]}, "no PEM certificate and its unencrypted key .*mismatch"),
        ({"ca": missing}, "ca='.*none.pem' has no PEM certificates .*No such file"),
        ({"ca": empty}, "ca='.*empty.pem' has no PEM certificates"),
        ({"ca": ""}, "ca is the path of a PEM file, got ''"),
        ({"ca": 5}, "ca is the path of a PEM file, got 5"),
    ]:
        with pytest.raises(hvpd.InvalidArgumentError, match=says):
            hvpd.connect("127.0.0.1:1", **settings)
    monkeypatch.setenv("HVPD_CA", str(missing))
    with pytest.raises(hvpd.InvalidArgumentError, match=r"ca='.*none.pem'"):
        hvpd.connect("127.0.0.1:1")
    with pytest.raises(hvpd.UnavailableError, match="no hvpd server answers"):
        hvpd.connect("127.0.0.1:1", tls=False, connect_timeout=0.1)


def test_an_embedded_server_is_its_owners_whatever_the_environment_has(monkeypatch, tmp_path):
    for variable in ("HVPD_TOKENS", "HVPD_TLS_CERT", "HVPD_TLS_KEY", "HVPD_TLS_CLIENT_CA", "HVPD_CA", "HVPD_TOKEN"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    with hvpd.local() as client:
        assert client.objectives() == []
    with pytest.raises(hvpd.InvalidArgumentError, match="no setting tokens"):
        hvpd.local(tokens=tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tokens", "{root}/none.json"), r"cannot start: cannot read the tokens of .*none.json"),
        (("--tls-cert", "{root}/server.pem", "--tls-key", "{root}/none.key"), "cannot start: cannot read .*none.key"),
        (("--tls-cert", "{root}/server.key", "--tls-key", "{root}/server.key"), "cannot start: .*no PEM certificate"),
        (
            (
                "--tls-cert",
                "{root}/server.pem",
                "--tls-key",
                "{root}/server.key",
                "--tls-client-ca",
                "{root}/server.key",
            ),
            "cannot start: .*has no PEM certificates",
        ),
    ],
)
def test_a_server_does_not_start_with_what_it_cannot_use(place, tmp_path, flags, says, capfd):
    from hvpd_server import _app, _config

    settings = [flag.format(root=place.root) for flag in flags]
    config = _config.load(_config.parse([*settings, "--port", "0", "--store", str(tmp_path / "store")]), {})
    with pytest.raises((ValueError, OSError)) as error:
        _app.App(config)
    assert re.search(says, f"cannot start: {error.value}")
