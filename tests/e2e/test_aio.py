"""`hvpd.aio` on a real server: results, many products at once, cancellation."""

import asyncio
import gc
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
import hvpd.aio
from tests.support.threads import no_threads
from tests.support.waiting import until

N = 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=N)
V = RNG.normal(size=(200, N))


def quartic(x):
    return jnp.sum(x**4) / 12


def slow(x, A):
    """Return a quadratic function whose products take half a second."""
    return jnp.sum(jnp.linalg.matrix_power(A, 300) @ x) ** 2


@pytest.fixture(scope="module")
def registered(client):
    client.register(quartic, X, name="aio/quartic")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hvpd-aio")]


@pytest.fixture
def beside():
    """Run functions in threads, which have ended when the test ends."""
    started = []

    def start(function):
        started.append(threading.Thread(target=function))
        started[-1].start()

    yield start
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    until(lambda: not threads())


def test_results_are_those_of_the_blocking_client(server, registered):
    async def main():
        async with hvpd.aio.connect(server.address) as client:
            objective = await client.objective("aio/quartic")
            assert (objective.n, objective.name, objective.dtype) == (N, "aio/quartic", np.float64)
            assert np.isclose(await objective.value(X), np.sum(X**4) / 12)
            value, gradient = await objective.value_and_grad(X)
            np.testing.assert_allclose(gradient, X**3 / 3)
            point = await objective.at(X)
            assert point.value == value
            np.testing.assert_allclose(point.gradient, X**3 / 3)
            H = point.hessian(shift=1.0)
            assert H.shape == (N, N)
            np.testing.assert_allclose(await (H @ V[0]), (X**2 + 1) * V[0])
            np.testing.assert_allclose(await (H @ V[:3].T), ((X**2 + 1) * V[:3]).T)
            np.testing.assert_allclose(await (V[:3] @ H), (X**2 + 1) * V[:3])
            np.testing.assert_allclose(await H.matvec(V[0]), (X**2 + 1) * V[0])
            np.testing.assert_allclose(await H.quadratic_form(V[0]), V[0] ** 2 @ (X**2 + 1))
            np.testing.assert_allclose((await H.diagonal()).values, X**2 + 1)
            np.testing.assert_allclose(objective.unravel(objective.ravel(X)), X)
            moved = await point.moved(-0.5, point.gradient)
            np.testing.assert_allclose(moved.x, X - X**3 / 6)
            assert client.statistics().products > 0
            assert [listing.name for listing in await client.objectives() if listing.name == "aio/quartic"]

    asyncio.run(main())


def test_a_registration_uploads_its_program_and_data(server):
    async def main():
        async with hvpd.aio.connect(server.address) as client:
            objective = await client.register(lambda x, A: jnp.sum((A @ x) ** 4), X, V, name="aio/uploaded")
            return await objective.value(X)

    assert np.isclose(asyncio.run(main()), np.sum((V @ X) ** 4))


def test_arithmetic_makes_operators_at_once(server, registered):
    async def main():
        async with hvpd.aio.connect(server.address) as client:
            point = await (await client.objective("aio/quartic")).at(X)
            H = point.hessian()
            for operator, diagonal in (
                (H.shifted(2.0), X**2 + 2),
                (2 * H, 2 * X**2),
                (H * 2 + H, 3 * X**2),
                (H / 2 - H, -(X**2) / 2),
                (-H, -(X**2)),
                (H.T, X**2),
                (H.point.hessian(), X**2),
            ):
                assert isinstance(operator, hvpd.aio.AsyncOperator)
                np.testing.assert_allclose(await (operator @ V[0]), diagonal * V[0], atol=1e-14)

    asyncio.run(main())


def test_many_products_are_under_way_at_once(server, registered):
    async def main():
        async with hvpd.aio.connect(server.address, in_flight=16) as client:
            H = (await (await client.objective("aio/quartic")).at(X)).hessian()
            products = await asyncio.gather(*(H @ v for v in V))
            np.testing.assert_allclose(products, X**2 * V)
            assert len(threads()) == 16

    asyncio.run(main())


def test_a_connection_that_is_not_awaited_yet_says_so():
    with pytest.raises(AttributeError, match=r"has no 'objective': await it, as in `client = await"):
        hvpd.aio.connect().objective("aio/quartic")


def test_connect_can_be_awaited_and_closed(server, registered):
    async def main():
        client = await hvpd.aio.connect(server.address)
        assert client.address == server.address
        objective = await client.objective("aio/quartic")
        assert "objective" in dir(client)
        assert repr(objective).startswith("<asyncio: <Objective aio/quartic")
        await client.close()
        await client.close()
        with pytest.raises(hvpd.HvpdError, match="is closed: connect again, and use") as caught:
            await objective.value(X)
        assert caught.value.reason == "CLIENT_CLOSED"
        with pytest.raises(AttributeError, match="no_such"):
            getattr(objective, "no_such")  # noqa: B009

    asyncio.run(main())


def test_an_embedded_server_ends_with_its_client():
    async def main():
        async with hvpd.aio.local() as client:
            objective = await client.register(quartic, X)
            np.testing.assert_allclose(await objective.gradient(X), X**3 / 3)

    asyncio.run(main())


def test_errors_are_hvpds_own(server):
    async def main():
        with pytest.raises(hvpd.UnavailableError):
            await hvpd.aio.connect("127.0.0.1:1", connect_timeout=0.1)
        with pytest.raises(hvpd.InvalidArgumentError, match="in_flight must be an integer of at least 1, got 0"):
            hvpd.aio.connect(server.address, in_flight=0)
        async with hvpd.aio.connect(server.address) as client:
            with pytest.raises(hvpd.NotFoundError):
                await client.objective("no/such")

    asyncio.run(main())


def test_a_call_that_is_never_awaited_is_named(server, registered):
    async def main():
        async with hvpd.aio.connect(server.address) as client:
            objective = await client.objective("aio/quartic")
            H = (await objective.at(X)).hessian()
            for call, name in [
                (lambda: objective.value(X), "AsyncObjective.value"),
                (lambda: H.eigsh(1), "AsyncOperator.eigsh"),
                (lambda: H @ X, "AsyncOperator.__matmul__"),
            ]:
                with pytest.warns(RuntimeWarning, match=f"coroutine '{name}' was never awaited"):
                    call()

    asyncio.run(main())


# Cancellation


SLOW = 600
"""Elements of the x of `slow`."""


@pytest.fixture(params=[(), ("--vector-port", "off")], ids=["vector port", "gRPC"])
def busy(request, serve):
    """A server of its own, and a blocking client with an operator whose products are
    slow.
    """
    server = serve(*request.param)
    with hvpd.connect(server.address) as client:
        objective = client.register(slow, np.zeros(SLOW), np.eye(SLOW), name="aio/slow")
        H = objective.at(np.ones(SLOW)).hessian()
        H @ np.ones(SLOW)  # It is compiled now.
        yield server, client, H


def waiting(client):
    return client.load().pending_vectors


async def until_async(find):
    """Look in a thread until a result is true."""
    return await asyncio.to_thread(until, find)


def test_cancelled_products_are_dropped_by_the_server(busy, beside):
    server, blocking, H = busy

    async def main():
        async with hvpd.aio.connect(server.address, in_flight=8) as client:
            point = await (await client.objective("aio/slow")).at(np.ones(SLOW))
            await (point.hessian() @ np.ones(SLOW))
            other = await (await client.objective("aio/slow")).at(np.full(SLOW, 2.0))
            before = blocking.load().vectors
            beside(lambda: H @ np.ones((SLOW, 2)))
            await until_async(lambda: blocking.load().in_flight_vectors == 2)
            tasks = [asyncio.create_task(other.hessian() @ np.ones(SLOW)) for _ in range(5)]
            await until_async(lambda: waiting(blocking) == 5)
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in done)
            await until_async(lambda: waiting(blocking) == 0)
            await until_async(lambda: blocking.load().in_flight_vectors == 0)
            assert blocking.load().vectors == before + 2  # Those of the other client.
            assert not client._calls._under_way
            np.testing.assert_allclose(await (other.hessian() @ np.ones(SLOW)), 2 * SLOW)

    asyncio.run(main())


def test_a_closed_loop_leaves_nothing_behind(busy, beside, caplog):
    server, blocking, H = busy
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(hvpd.aio.connect(server.address)._connected())
    point = loop.run_until_complete(loop.run_until_complete(client.objective("aio/slow")).at(np.full(SLOW, 2.0)))
    beside(lambda: H @ np.ones((SLOW, 2)))
    until(lambda: blocking.load().in_flight_vectors == 2)
    task = loop.create_task(point.hessian() @ np.ones(SLOW))
    loop.run_until_complete(until_async(lambda: waiting(blocking) == 1))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    task._log_destroy_pending = False  # asyncio's own complaint.
    del task
    gc.collect()
    until(lambda: waiting(blocking) == 0 and not client._calls._under_way)
    assert not caplog.records

    async def other_loop():  # The client serves another loop.
        np.testing.assert_allclose(await (point.hessian() @ np.ones(SLOW)), 2 * SLOW)
        await client.close()

    asyncio.run(other_loop())


def test_runs_on_the_server_are_awaited_and_cancelled(busy):
    server, blocking, _ = busy

    async def main():
        async with hvpd.aio.connect(server.address) as client:
            H = (await (await client.objective("aio/slow")).at(np.ones(SLOW))).hessian()
            async with await H.lanczos(2, seed=1) as run:
                ritz = await run.ritz(1)
                np.testing.assert_allclose(ritz.values, [2.0 * SLOW])
            before = blocking.load().in_flight_vectors
            assert before == 0
            task = asyncio.create_task(H.lanczos(500, np.arange(float(SLOW)) + 1, reorthogonalize="none"))
            await until_async(lambda: blocking.load().in_flight_vectors > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_async(lambda: not client._calls._under_way)
            await until_async(lambda: blocking.load().in_flight_vectors == 0)

    asyncio.run(main())


def test_a_timeout_of_asyncio_cancels(busy):
    server, _, _ = busy

    async def main():
        async with hvpd.aio.connect(server.address) as client:
            H = (await (await client.objective("aio/slow")).at(np.ones(SLOW))).hessian()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(H @ np.ones((SLOW, 64)), 0.05)
            await until_async(lambda: not client._calls._under_way)

    asyncio.run(main())


def test_a_call_that_waits_for_a_server_is_cancelled(serve):
    server = serve()

    async def main():
        async with hvpd.aio.connect(server.address) as client:
            objective = await client.register(quartic, X)
            await objective.at(X)
            server.kill()
            for call in (objective.at(X + 1), client.objectives(), client.register(quartic, X)):
                task = asyncio.create_task(call)
                await until_async(lambda: client._calls._under_way)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until_async(lambda: not client._calls._under_way)

    asyncio.run(main())


def test_calls_that_wait_for_a_thread_never_begin(busy):
    server, blocking, _ = busy

    async def main():
        async with hvpd.aio.connect(server.address, in_flight=1) as client:
            H = (await (await client.objective("aio/slow")).at(np.ones(SLOW))).hessian()
            first = asyncio.create_task(H @ np.ones((SLOW, 8)))
            await until_async(lambda: blocking.load().in_flight_vectors == 8)
            before = blocking.load().vectors
            second = asyncio.create_task(H @ np.ones(SLOW))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert (await first).shape == (SLOW, 8)
            assert blocking.load().vectors == before + 8

    asyncio.run(main())


def test_closing_cancels_running_calls(busy):
    server, blocking, _ = busy

    async def main():
        client = await hvpd.aio.connect(server.address)
        H = (await (await client.objective("aio/slow")).at(np.ones(SLOW))).hessian()
        task = asyncio.create_task(H @ np.ones((SLOW, 8)))
        await until_async(lambda: blocking.load().in_flight_vectors == 8)
        await client.close()
        with pytest.raises(hvpd.HvpdError) as caught:
            await task
        assert caught.value.reason in ("CANCELLED", "CLIENT_CLOSED")

    asyncio.run(main())


def test_a_cancelled_connect_closes_its_client(server, monkeypatch):
    made, release = threading.Event(), threading.Event()
    clients = []
    connect = hvpd.connect

    def slowly(*arguments, **settings):
        made.set()
        assert release.wait(30)
        clients.append(connect(server.address))
        return clients[-1]

    monkeypatch.setattr("hvpd._connect.connect", slowly)

    async def main():
        task = asyncio.ensure_future(hvpd.aio.connect(server.address)._connected())
        await asyncio.to_thread(made.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        await until_async(lambda: clients and clients[0]._transport.closed)

    asyncio.run(main())


def test_a_call_without_a_thread_fails_and_never_begins():
    ran = []

    async def main():
        calls = hvpd.aio._Calls(1)
        with no_threads(), pytest.raises(RuntimeError, match="start new thread"):
            await calls.run(lambda: ran.append("first"))
        await calls.run(lambda: ran.append("second"))
        calls.close()

    asyncio.run(main())
    assert ran == ["second"]
