"""Work that takes long says so: by progress and by the log."""

import logging
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd import _progress


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(_progress, "DELAY", 0.0)
    monkeypatch.setattr(_progress, "_INTERVAL", 0.001)
    return []


def fun(x, a):
    return jnp.sum(a * jnp.sin(x) ** 3)


def test_a_registration_shows_its_stages(serve, shown, caplog):
    server = serve()
    x, a = np.linspace(0, 1, 400), np.ones(400)
    with (
        caplog.at_level(logging.DEBUG, "hvpd"),
        hvpd.connect(server.address, progress=shown.append) as client,
    ):
        objective = client.register(fun, x, a, name="waits")
        H = objective.at(x).hessian()
        H.sparse()
        objective.check(x, probes=1)
    stages = {each.stage for each in shown}
    assert {"tracing", "uploading", "compiling on the server", "making a point", "sparse of waits"} <= stages
    assert {"checking waits"} <= stages
    uploads = [each for each in shown if each.stage == "uploading" and each.finished]
    assert uploads[0].done == uploads[0].total > a.nbytes
    assert max(each.done for each in shown if each.stage == "sparse of waits") == 400
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    for part in ("connected to", "uploaded", "registered waits"):
        assert any(part in line for line in lines), part
    assert any("CreatePoint" in record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG)


def test_waiting_for_a_server_that_is_away_is_shown_with_the_reason(serve, shown, caplog):
    server = serve()
    away = threading.Event()

    def show(progress):
        shown.append(progress)
        if progress.stage.startswith("waiting for"):
            away.set()

    x, a = np.linspace(0, 1, 5), np.ones(5)
    with caplog.at_level(logging.INFO, "hvpd"), hvpd.connect(server.address, progress=show) as client:
        H = client.register(fun, x, a).at(x).hessian()
        expected = H @ x
        server.kill()
        found = []
        solver = threading.Thread(target=lambda: found.append(H @ x))
        solver.start()
        assert away.wait(60)
        server.start()
        solver.join(60)
    np.testing.assert_array_equal(found[0], expected)
    assert any(each.stage == f"waiting for {server.address} (UNAVAILABLE)" for each in shown)
    assert any("repeating a call" in record.getMessage() for record in caplog.records)
