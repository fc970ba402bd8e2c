"""Points that stay (pin), points that are made on the server (moved), and programs that
are being compiled (compiles).
"""

import concurrent.futures
import threading

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import hvpd
from hvpd._transport.stream import Stream
from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, curvature_pb2_grpc
from tests.support.objectives import quartic
from tests.support.waiting import until

N = 20_000
"""Elements of an x of 160 kB, which is too large for the client to send before it knows
that the server lacks it.
"""


@pytest.fixture
def sent(monkeypatch):
    """Yield the sizes of the messages that clients of this process send to make
    points.
    """
    payloads, send = [], Stream.send

    def noted(frame):
        if isinstance(frame.message, curvature_pb2.CreatePointRequest):
            payloads.append(len(frame.chunk) + len(frame.message.inline_x))
        return frame

    def recording(self, messages):
        send(self, map(noted, messages))

    monkeypatch.setattr(Stream, "send", recording)
    return payloads


@pytest.fixture(scope="module")
def objective(client):
    return client.register(quartic, np.zeros(N), name="points/quartic")


def check(point):
    """Assert that the point's Hessian is that at its x."""
    assert np.allclose(point.hessian() @ np.ones(N), point.x**2, rtol=1e-12, atol=0)


def random(seed, n=N, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=n).astype(dtype)


# Steps


def test_steps_along_a_direction_send_it_once_and_never_x(objective, sent):
    x, p = random(0), random(1)
    base = objective.at(x)
    assert sum(sent) == x.nbytes
    sent.clear()
    for step, alpha in enumerate([1.0, 0.5, 0.25, -3.0, 0.0, 1e-9, np.float32(0.1), 2]):
        point = base.moved(alpha, p)
        assert sum(sent) == p.nbytes, step
        assert np.array_equal(point.x, x + float(alpha) * p)
        assert point.value == pytest.approx(np.sum(point.x**4) / 12, rel=1e-12)
        assert np.allclose(point.gradient, point.x**3 / 3, rtol=1e-12, atol=1e-12)
        check(point)
    assert point.objective is objective


def test_a_step_is_the_point_that_at_makes(client, objective, sent):
    x, p = random(2), random(3)
    point = objective.at(x).moved(0.3, p)
    sent.clear()
    assert objective.at(x + 0.3 * p) is point  # The client has it,
    again = client.objective("points/quartic").at(x + 0.3 * p)  # and the server has it.
    assert (again.value, sum(sent)) == (point.value, 0)
    assert np.array_equal(again.gradient, point.gradient)


def test_a_step_from_a_step(objective, sent):
    p, q = random(4), random(5)
    base = objective.at(random(6)).moved(1.0, p)
    sent.clear()
    point = base.moved(0.5, q)
    assert sum(sent) == q.nbytes
    sent.clear()
    last = point.moved(-0.5, p)  # p is there already.
    assert sum(sent) == 0
    assert np.array_equal(last.x, (random(6) + p + 0.5 * q) - 0.5 * p)
    check(last)


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, np.float64(1e-3), -7, 1e30])
def test_in_float32_it_is_rounded_as_the_server_rounds_it(client, sent, alpha):
    x, p = random(0, dtype=np.float32), random(1, dtype=np.float32)
    base = client.register(lambda x: jnp.sum(x**2) / 2, x).at(x)
    sent.clear()
    point = base.moved(alpha, p)
    assert sum(sent) <= p.nbytes
    assert point.x.dtype == np.float32
    assert np.array_equal(point.x, x + np.float32(alpha) * p)
    assert np.array_equal(point.gradient, point.x)


def test_a_small_x_goes_along_and_saves_the_question(client, sent):
    base = client.register(quartic, np.zeros(5)).at(np.arange(5.0))
    sent.clear()
    assert np.array_equal(base.moved(2.0, np.ones(5)).x, np.arange(5.0) + 2)
    assert sent == [40]


def test_directions_are_pytrees_too_and_data_stays(client, sent):
    X = random(7, 30)
    start = {"a": random(8), "b": np.array(2.0)}
    objective = client.register(lambda p, X: jnp.sum(p["a"] ** 2) * p["b"] * jnp.sum(X), start, X)
    other = np.abs(random(9, 30))
    base = objective.at(start, other)
    sent.clear()
    step = {"a": random(10), "b": np.array(-1.0)}
    point = base.moved(0.5, step)
    assert sum(sent) == 8 * (N + 1)
    moved = {name: start[name] + 0.5 * step[name] for name in start}
    assert np.array_equal(objective.unravel(point.x)["a"], moved["a"])
    assert point.value == pytest.approx(np.sum(moved["a"] ** 2) * moved["b"] * other.sum(), rel=1e-12)
    assert not point.default_data
    assert objective.at(moved) is not point


@pytest.mark.parametrize(
    ("alpha", "direction", "says"),
    [
        (1.0, np.ones(N - 1), r"the direction must be a vector of shape \(20000,\).*got shape \(19999,\)"),
        (1.0, np.ones((N, 1)), r"the direction must be a vector"),
        (1.0, 1.0, r"the direction must be a vector"),
        (1.0, np.ones(N, complex), "the direction must have real elements, got dtype complex128"),
        (1.0, {"a": np.ones(N)}, "the direction"),
        (float("nan"), np.ones(N), "alpha must be a finite real number, got nan"),
        (float("-inf"), np.ones(N), "alpha must be a finite real number"),
        (1j, np.ones(N), "alpha must be a finite real number"),
        ("1", np.ones(N), "alpha must be a finite real number"),
        (np.ones(1), np.ones(N), "alpha must be a finite real number"),
    ],
)
def test_steps_that_are_none(objective, sent, alpha, direction, says):
    base = objective.at(random(0))
    sent.clear()
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        base.moved(alpha, direction)
    assert sent == []


def test_a_step_that_leads_nowhere_says_so_as_any_point_does(client, objective):
    """Line searches take such steps."""
    base = objective.at(random(0))
    assert base.moved(1.0, np.full(N, np.nan)).nonfinite == ("x", "value", "gradient")
    assert base.moved(1e308, np.full(N, 1e10)).nonfinite == ("x", "value", "gradient")
    single = client.register(quartic, np.zeros(N, np.float32)).at(np.ones(N, np.float32))
    assert single.moved(1e300, np.ones(N, np.float32)).nonfinite[0] == "x"  # Infinite in float32.
    assert objective.at(random(0)).nonfinite == ()


def test_a_step_from_an_evicted_base_sends_x(serve, sent):
    """There is room for two points, or for a point and a direction."""
    with hvpd.connect(serve("--memory-budget", str(4 * N * 8)).address) as client:
        objective = client.register(quartic, np.zeros(N))
        x, p = random(0), random(1)
        base = objective.at(x)
        for shift in (1.0, 2.0):
            objective.at(x + shift)
        sent.clear()
        point = base.moved(0.5, p)
        assert sum(sent) in (x.nbytes, 2 * x.nbytes)
        assert np.array_equal(point.x, x + 0.5 * p)
        check(point)
        for alpha in (0.25, 0.125):  # The direction is evicted and sent again, too.
            check(base.moved(alpha, p))


def test_a_step_is_made_without_room_for_its_direction(serve):
    with hvpd.connect(serve("--memory-budget", str(2 * N * 8)).address) as client:
        x, p = random(0), random(1)
        point = client.register(quartic, np.zeros(N)).at(x).moved(0.5, p)
        assert np.array_equal(point.x, x + 0.5 * p)
        check(point)


def test_a_restarted_server_has_neither_base_nor_direction_and_steps_go_on(serve, sent):
    server = serve()
    with hvpd.connect(server.address) as client:
        objective = client.register(quartic, np.zeros(N))
        x, p = random(0), random(1)
        base = objective.at(x)
        base.moved(1.0, p)
        server.kill()
        server.start()
        sent.clear()
        point = base.moved(0.5, p)
        assert sum(sent) == x.nbytes
        assert np.array_equal(point.x, x + 0.5 * p)
        check(point)
        sent.clear()
        assert np.array_equal(point.moved(0.5, p).x, x + 0.5 * p + 0.5 * p)  # From here on it is as before.
        assert sum(sent) == p.nbytes


def test_many_search_along_lines_at_once(server):
    """Four clients in eight threads search at bases and along directions that some of
    them share.
    """
    clients = [hvpd.connect(server.address) for _ in range(4)]
    clients[0].register(quartic, np.zeros(N), name="points/many")
    objectives = [client.objective("points/many") for client in clients]
    together = threading.Barrier(8)

    def search(seed):
        x, p = random(100 + seed % 2), random(200 + seed % 3)
        base = objectives[seed % 4].at(x)
        together.wait(60)
        for step in range(10):
            alpha = 1.0 / (1 + step + seed)
            point = base.moved(alpha, p)
            assert np.array_equal(point.x, x + alpha * p)
            check(point)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(search, range(8)))
    for client in clients:
        client.close()


# Steps on the wire, as a foreign client sends them


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield curvature_pb2_grpc.CurvatureServiceStub(channel)


def opening(objective, x, move):
    return curvature_pb2.CreatePointRequest(
        spec=curvature_pb2.PointSpec(
            objective_digest=objective.digest, default_data=True, x_digest=codec.digest(codec.payload(x))
        ),
        move=move,
    )


def chunks(array):
    return [curvature_pb2.CreatePointRequest(chunk=bytes(chunk)) for chunk in codec.chunks(codec.payload(array))]


def wanted(stub, *requests):
    """Return the server's requests after these messages, in order. The point's value is
    last, if the server made it.
    """
    found = []
    for response in stub.CreatePoint(iter(requests)):
        if response.WhichOneof("content") == "point":
            found.append(response.point.value)
        elif response.WhichOneof("content") != "chunk":
            found.append(response.WhichOneof("content"))
    return found


def reason(error):
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
    return info.reason


@pytest.fixture
def move(objective):
    """Return a step that the server does not know yet: base, direction, message."""
    seed = np.random.default_rng().integers(1 << 30)
    x, p = random(seed), random(seed + 1)
    base = objective.at(x)
    return x, p, curvature_pb2.Move(base_id=base._id, alpha=0.5, direction_digest=codec.digest(codec.payload(p)))


def value(x):
    return pytest.approx(np.sum(x**4) / 12, rel=1e-12)


def test_a_step_to_another_x_than_the_spec_says_is_not_believed(objective, stub, move):
    x, p, message = move
    target = x + 0.25 * p
    found = wanted(stub, opening(objective, target, message), *chunks(p), *chunks(target))
    assert found == ["direction_wanted", "x_wanted", value(target)]


def test_a_base_of_another_objective_or_of_none_is_no_base(client, objective, stub, move):
    x, p, message = move
    target = x + 0.5 * p
    other = client.register(lambda x: jnp.sum(x), np.zeros(N)).at(x)
    for base in (other._id, "0" * 64, "", "nonsense"):
        message.base_id = base
        assert wanted(stub, opening(objective, target, message), *chunks(target))[0] in ("x_wanted", value(target))
    message.base_id = other._id
    fresh = target + 1
    assert wanted(stub, opening(objective, fresh, message), *chunks(fresh)) == ["x_wanted", value(fresh)]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda p: chunks(p + 1), "DIGEST_MISMATCH"),
        (lambda p: chunks(p)[:-1], "SIZE_MISMATCH"),
        (lambda p: chunks(np.append(p, 1.0)), "SIZE_MISMATCH"),
        (lambda p: [], "SIZE_MISMATCH"),
        (lambda p: [curvature_pb2.CreatePointRequest(chunk=bytes(2 * p.nbytes))], "SIZE_MISMATCH"),
    ],
    ids=["another", "too short", "too long", "none", "far too long"],
)
def test_a_direction_that_differs_from_its_announcement_is_refused_and_not_kept(objective, stub, move, wrong, expected):
    x, p, message = move
    target = x + 0.5 * p
    with pytest.raises(grpc.RpcError) as error:
        wanted(stub, opening(objective, target, message), *wrong(p))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(error) == expected
    found = wanted(stub, opening(objective, target, message), *chunks(p))
    assert found == ["direction_wanted", value(target)]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_step_of_a_length_that_is_not_finite_is_refused(objective, stub, move, alpha):
    x, p, message = move
    message.alpha = alpha
    with np.errstate(invalid="ignore"):
        target = p * alpha + x
    with pytest.raises(grpc.RpcError, match=f"alpha must be a finite number, got {alpha}") as error:
        wanted(stub, opening(objective, target, message), *chunks(p), *chunks(target))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# Pins


BUDGET = 10 * 2 * N * 8
"""Bytes that ten points take."""


@pytest.fixture(scope="module")
def tight(serve_module):
    return serve_module("--memory-budget", str(BUDGET))


@pytest.fixture
def resident(tight):
    """Yield a client and an objective on a server with room for ten points. All pins
    are gone.
    """
    with hvpd.connect(tight.address) as client:
        yield client, client.register(quartic, np.zeros(N), name="points/pins")


def churn(objective, seed=0):
    """Visit more points than there is room for."""
    for shift in range(12):
        objective.at(random(1000 + seed) + shift)


def made(server, call):
    """Return the number of points that the server makes during a call."""
    before = server.metric("hvpd_points_total")
    call()
    return server.metric("hvpd_points_total") - before


def test_a_pinned_point_stays_and_an_evicted_point_comes_back(tight, resident):
    _, objective = resident
    pinned, other = objective.at(random(0), pin=600), objective.at(random(1))
    churn(objective)
    assert made(tight, lambda: check(pinned)) == 0
    assert made(tight, lambda: check(other)) == 1
    pinned.pin(0)
    churn(objective, seed=1)
    assert made(tight, lambda: check(pinned)) == 1


def test_a_point_can_be_pinned_later_and_when_it_is_found_again(tight, resident):
    _, objective = resident
    point = objective.at(random(0))
    point.pin(600)
    churn(objective)
    assert made(tight, lambda: check(point)) == 0
    point.pin(0)
    again = objective.at(random(2))
    assert objective.at(random(2), pin=600) is again  # The client knows it, and asks once more to pin it.
    churn(objective)
    assert made(tight, lambda: check(again)) == 0
    again.pin(0)


def test_data_stays_with_the_point_that_is_pinned(tight, resident):
    client, objective = resident
    X = random(3, 3 * N)
    with_data = client.register(lambda x, X: jnp.sum(X**2) * jnp.sum(x**2) / 2, np.ones(5), X)
    point = with_data.at(np.ones(5), pin=600)
    churn(objective)
    expected = np.sum(X**2) * np.ones(5)
    assert made(tight, lambda: np.testing.assert_allclose(point.hessian() @ np.ones(5), expected, rtol=1e-12)) == 0
    point.pin(0)


def test_half_of_the_memory_can_be_pinned_and_the_other_half_goes_on(tight, resident):
    client, objective = resident
    points = [objective.at(random(seed), pin=600) for seed in range(5)]
    with pytest.raises(
        hvpd.OverloadedError, match=r"would be pinned, but at most half of the server's memory budget of 3200000"
    ) as no:
        objective.at(random(5), pin=600)
    assert no.value.reason == "PINNED"
    sixth = objective.at(random(5))
    with pytest.raises(hvpd.OverloadedError, match="unpin other points"):
        sixth.pin(1)
    churn(objective)
    assert made(tight, lambda: check(sixth)) == 1  # Its pin was refused, so it came back without one.
    assert made(tight, lambda: [check(point) for point in points]) == 0
    large = client.register(quartic, np.zeros(6 * N))
    with pytest.raises(hvpd.OverloadedError, match=r"beside 1600000 bytes that are pinned.*unpin points") as no:
        large.at(np.zeros(6 * N))
    assert no.value.reason == "PINNED"
    for point in points:
        point.pin(0)
    assert large.at(np.zeros(6 * N)).value == 0
    assert tight.metric("hvpd_resident_bytes") <= BUDGET


def test_after_a_restart_a_pinned_point_comes_back_pinned(serve):
    server = serve("--memory-budget", str(BUDGET))
    with hvpd.connect(server.address) as client:
        objective = client.register(quartic, np.zeros(N))
        point = objective.at(random(0), pin=600)
        server.kill()
        server.start()
        assert made(server, lambda: check(point)) == 1
        churn(objective)
        assert made(server, lambda: check(point)) == 0


def test_a_pinned_point_that_was_lost_comes_back_though_others_are_pinned_in_its_place(serve):
    """A product needs no pin, so a failing pin must not fail it."""
    server = serve("--memory-budget", str(BUDGET))
    with hvpd.connect(server.address) as client:
        objective = client.register(quartic, np.zeros(N))
        point = objective.at(random(0), pin=600)
        server.kill()
        server.start()
        others = [objective.at(random(seed), pin=600) for seed in range(1, 6)]
        check(point)
        churn(objective)
        assert made(server, lambda: [check(other) for other in others]) == 0
        check(point)


@pytest.mark.parametrize("seconds", [-1, 7 * 24 * 3600 + 1, 1.5, "1", float("nan")])
def test_times_that_are_none(resident, seconds):
    _, objective = resident
    with pytest.raises(hvpd.InvalidArgumentError, match="pin must be an integer from 0 to 604800"):
        objective.at(random(20), pin=seconds)
    with pytest.raises(hvpd.InvalidArgumentError, match="seconds must be an integer from 0 to 604800"):
        objective.at(random(20)).pin(seconds)


# Compiles


def slow_to_compile(x, depth=30):
    """Return the result of many operations that the compiler cannot merge."""
    y = x
    for step in range(depth):
        y = jnp.sort(jnp.concatenate([y * 1.1, x * step]))[: x.size]
    return jnp.sum(y**2)


def test_running_compiles_show_their_state_and_delay_no_others(serve):
    with hvpd.connect(serve().address) as client:
        quick = client.register(quartic, np.zeros(7))
        quickly = quick.at(np.arange(7.0)).hessian()
        assert np.array_equal(quickly @ np.ones(7), np.arange(7.0) ** 2)
        objective = client.register(slow_to_compile, np.linspace(0, 1, 40))
        H = objective.at(np.linspace(0, 1, 40)).hessian()
        H @ np.ones((40, 3))  # The ready width multiplies; the server compiles another one meanwhile.
        seen, times = set(), []

        def ready():
            found = objective.compiles()
            seen.update(compile_.state for compile_ in found)
            times.extend(compile_.seconds for compile_ in found if compile_.state == "compiling")
            assert np.array_equal(quickly @ np.ones(7), np.arange(7.0) ** 2)  # Others go on.
            return {compile_.state for compile_ in found} <= {"ready"}

        until(ready)
        assert "compiling" in seen
        assert max(times) > min(times) >= 0
        done = objective.compiles()
        assert {("value_and_grad", 0), ("hvp", 1), ("hvp", 4)} <= {(each.program, each.width) for each in done}
        assert all(compile_.seconds > 0 and compile_.error == "" for compile_ in done)


def test_an_objective_whose_first_program_does_not_compile_is_not_registered(serve):
    """Chunks have another number of rows than the program can be reshaped to."""
    X = np.ones((5000, 6))
    with hvpd.connect(serve("--memory-budget", "100K").address) as client:
        with pytest.raises(hvpd.InvalidArgumentError, match=r"cannot compile value_and_grad .*stablehlo\.reshape"):
            client.register(
                lambda x, X: jnp.mean(X.reshape(1000, 30) @ jnp.ones(30)) * jnp.sum(x**2),
                np.ones(3),
                X,
                name="folded",
                row_reduction="mean",
            )
        assert client.objectives() == []
