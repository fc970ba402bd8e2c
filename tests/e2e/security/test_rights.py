"""A caller reaches only the methods that its token gives a right to."""

import contextlib
import importlib
import pkgutil
import re
import threading

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import hvpd
import hvpd.v1
from hvpd._cli import main
from hvpd.v1 import (
    curvature_pb2,
    curvature_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from hvpd_server.rpc.gate import OPEN
from hvpd_server.tenancy import token_file
from tests.support.security import channel, connect, metadata, product
from tests.support.waiting import until


def test_with_its_rights_a_tenant_registers_and_solves(place, secured, publisher, quartic):
    with connect(place, secured, publisher) as client:
        product(client, quartic)
        assert client.objective("quartic").name == quartic
        assert quartic in [listing.name for listing in client.objectives()]
        assert client.objective(quartic).registration_check().verdict in ("pending", "passed")
        assert publisher not in repr(client)
        assert publisher not in repr(vars(client))


def test_connect_reads_address_token_and_ca_from_the_environment(
    place, secured, publisher, quartic, monkeypatch, capsys
):
    monkeypatch.setenv("HVPD_ADDRESS", secured.address)
    monkeypatch.setenv("HVPD_TOKEN", publisher)
    monkeypatch.setenv("HVPD_CA", str(place.trust))
    with hvpd.connect() as client:
        product(client, quartic)
    assert main.main(["objectives"]) == 0
    assert quartic in capsys.readouterr().out
    monkeypatch.delenv("HVPD_CA")
    monkeypatch.delenv("HVPD_TOKEN")
    assert main.main(["objectives", "--ca", str(place.trust), "--token", publisher]) == 0
    capsys.readouterr()
    assert main.main(["objectives", "--ca", str(place.trust)]) == 1
    assert "this server requires a token" in capsys.readouterr().err


def test_the_rights_to_use_and_to_publish_are_separate(place, secured, quartic):
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


def test_callers_without_a_token_learn_only_the_servers_description(place, secured, quartic):
    with connect(place, secured, None) as client:
        assert client.server.version == hvpd.__version__
        with pytest.raises(hvpd.AccessError, match="this server requires a token"):
            client.objective(quartic)
        assert client.statistics().retries == 0


@pytest.mark.parametrize("token", ["wrong", "A" * 4096, "cut"])
def test_an_unknown_token_is_refused_when_a_client_connects(place, secured, publisher, token):
    token = publisher[:-1] if token == "cut" else token
    with pytest.raises(hvpd.AccessError, match="not one of this server's") as error:
        connect(place, secured, token)
    assert error.value.reason == "TOKEN_UNKNOWN"
    assert error.value.request_id
    assert token not in str(error.value)


@pytest.mark.parametrize("token", ["é", "a\nb", "", "A" * 5000, "A" * (1 << 20)])
def test_a_malformed_token_is_not_sent(token):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"a token must (consist of|have from)") as error:
        hvpd.connect("127.0.0.1:1", token=token or " ")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("size", [7_000, 1 << 20])
def test_a_token_of_any_size_is_refused_without_harm(place, secured, publisher, quartic, size):
    with channel(place, secured) as opened:
        stub = curvature_pb2_grpc.CurvatureServiceStub(opened)
        with pytest.raises(grpc.RpcError) as error:
            stub.ComputeProduct(curvature_pb2.ComputeProductRequest(), metadata=metadata("A" * size), timeout=30)
        assert error.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with connect(place, secured, publisher) as client:
        product(client, quartic)


def calls():
    """Return every method of every service of the protocol: its path, and whether its
    request streams.
    """
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


def test_health_needs_no_token_and_reflection_needs_one(place, secured, publisher):
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


def test_many_wrong_tokens_do_not_stop_solves(place, secured, publisher, quartic):
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


@pytest.fixture
def small(serve, tmp_path):
    """Yield a server of four calls, a channel to it, and tokens of tenants a and b."""
    tokens = tmp_path / "tokens.json"
    made = {tenant: token_file.create(tokens, tenant, ["use"])[0] for tenant in "ab"}
    server = serve("--tokens", str(tokens), "--max-calls", "4")
    with grpc.insecure_channel(server.address) as opened:
        yield server, opened, made


@contextlib.contextmanager
def silent_calls(opened, method, count, token=None):
    """Begin calls whose message does not arrive."""
    silent = threading.Event()
    said = metadata(token) if token else ()
    try:
        ask = opened.stream_unary(method)
        yield [ask.future(iter(silent.wait, True), metadata=said, timeout=60) for _ in range(count)]
    finally:
        silent.set()


def test_strangers_whose_message_does_not_arrive_keep_out_neither_probes_nor_tenants(small):
    """Sixteen such calls wait. A further one ends the oldest."""
    _, opened, made = small
    health = health_pb2_grpc.HealthStub(opened)

    def watch(tenant):
        return health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata(made[tenant]), timeout=60)

    with silent_calls(opened, "/hvpd.v1.ServerService/GetServer", 60) as asked:
        until(lambda: sum(not each.done() for each in asked) == 16)
        assert {each.code() for each in asked if each.done()} <= {
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        }
        watches = [watch(tenant) for tenant in "abab"]
        assert {next(each).status for each in watches} == {health_pb2.HealthCheckResponse.SERVING}
        with pytest.raises(grpc.RpcError, match="Too many calls are open: all tenants have 4"):
            next(watch("a"))
        for _ in range(5):
            probe = health.Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert probe.status == health_pb2.HealthCheckResponse.SERVING


def test_a_tenants_calls_count_before_their_message_arrives(small):
    """Otherwise one tenant could take all calls, by messages that do not arrive."""
    _, opened, made = small
    with silent_calls(opened, "/hvpd.v1.CurvatureService/ComputeProduct", 10, made["a"]) as asked:
        until(lambda: sum(not each.done() for each in asked) == 2)
        assert {each.code() for each in asked if each.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        usage = server_pb2_grpc.ServerServiceStub(opened).GetUsage
        assert usage(server_pb2.GetUsageRequest(), metadata=metadata(made["b"]), timeout=60) is not None
