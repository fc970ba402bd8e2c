"""Objectives are spread over several devices, and sharded data over all of them."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._registration import export as _export
from hvpd._wire import codec
from hvpd.v1 import curvature_pb2
from hvpd_server.device.device import Device
from hvpd_server.engine import engine as _engine
from hvpd_server.engine.lane import lanes_of
from hvpd_server.liveness import Liveness
from hvpd_server.store import store as _store
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.tenancy.limits import Limits
from tests.support.engine import SPEC, multiply, out_of_memory, refused

pytestmark = pytest.mark.slow  # Real programs, compiled and run.


@pytest.fixture
def several(tmp_path, device, upload, vetter, monkeypatch):
    """Yield an engine of three devices, all of them the one CPU, and a function that
    registers with it and returns the lane's number.
    """
    monkeypatch.setattr(Device, "together", lambda devices: devices[0])
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    engine = _engine.Engine(
        _store.Store(tmp_path / "store"), [device] * 3, Limits(3000, 16, max_pending=4096), Metrics(), vetter=vetter
    )

    def register(x, *data, **options):
        export = _export.export(
            lambda x, *data: jnp.sum(x**2) * sum(map(jnp.sum, data)),
            x,
            data,
            platforms=("cpu",),
            precision="highest",
            **options,
        )
        for content in export.blobs.values():
            upload(engine.store, content)
        return engine.lanes.index(engine.objectives.lane(engine.registration.register(export.digest, "")))

    yield engine, register
    engine.close()
    engine.store.close()


def test_each_device_has_half_of_its_memory_and_the_other_halves_are_for_all_together(several):
    engine, _ = several
    assert [lane.budget_bytes for lane in engine.lanes] == [1500, 1500, 1500, 4500]
    assert [lane.residency.budget_bytes for lane in engine.lanes] == [1500, 1500, 1500, 4500]


def test_one_device_has_all_of_its_memory(tmp_path, device):
    store = _store.Store(tmp_path / "store")
    (lane,) = lanes_of([device], store, Limits(3000, 16, max_pending=1), Metrics(), Liveness())
    assert lane.budget_bytes == 3000
    lane.close()
    store.close()


def test_the_last_lane_of_a_group_has_the_devices_of_all_processes(tmp_path, device):
    class Group:
        parts = device.parts * 4
        overlaps = False

    store = _store.Store(tmp_path / "store")
    alone, group = lanes_of([device], store, Limits(3000, 16, max_pending=1), Metrics(), Liveness(), Group)
    assert (alone.budget_bytes, alone.device, group.budget_bytes, group.device) == (1500, device, 6000, Group)
    for lane in (alone, group):
        lane.close()
    store.close()


def test_objectives_go_where_least_data_is(several):
    _, register = several
    sizes = [100, 60, 50, 10, 11, 61]
    assert [register(np.ones(2), np.arange(size) + size) for size in sizes] == [0, 1, 2, 2, 1, 2]


def test_objectives_with_the_same_data_share_it_on_one_device(several):
    _, register = several
    data = np.arange(100.0)
    assert [register(np.ones(size), data) for size in (1, 2, 3, 4)] == [0, 0, 0, 0]
    assert register(np.ones(1), np.arange(50.0)) == 1


def test_objectives_without_data_are_spread_too(several):
    _, register = several
    assert [register(np.ones(size)) for size in range(1, 7)] == [0, 1, 2, 0, 1, 2]


def test_registering_again_moves_nothing_and_counts_nothing(several):
    _, register = several
    assert [register(np.ones(2), np.arange(100.0)) for _ in range(3)] == [0, 0, 0]
    assert register(np.ones(2), np.arange(99.0)) == 1
    assert register(np.ones(2), np.arange(98.0)) == 2
    assert register(np.ones(2), np.arange(10.0)) == 2


def test_sharded_objectives_go_to_the_lane_of_all_devices(several):
    _, register = several
    assert register(np.ones(2), np.arange(100.0), sharded=True) == 3
    assert register(np.ones(2), np.arange(100.0)) == 0


def test_a_point_is_found_on_whichever_device_it_is(several, upload):
    engine, register = several
    for size in range(1, 4):
        assert register(np.ones(size)) == size - 1
    found = []
    for _, digest, _ in engine.store.objectives():
        x = np.ones(engine.objectives.load(digest).n)
        spec = curvature_pb2.PointSpec(
            objective_digest=digest, x_digest=codec.digest(codec.payload(x)), default_data=True
        )
        found.append(engine.create_point(engine.locate(spec), x))
    for point in found:
        product = curvature_pb2.ProductSpec(point_id=point.id, operator=SPEC.operator, k=1)
        assert engine.resident(product) is point
    assert [lane.residency.used_bytes().get("point", 0) > 0 for lane in engine.lanes] == [True] * 3 + [False]
    assert engine._used_bytes()["point"] == 2 * 8 * (1 + 2 + 3)


def test_a_full_device_leaves_the_caches_of_the_others(several, calls):
    """If one device is out of memory, the caches of the others stay."""
    engine, register = several
    points = []
    for size in range(1, 4):
        register(np.ones(size))
    for _, digest, _ in engine.store.objectives():
        x = np.ones(engine.objectives.load(digest).n)
        spec = curvature_pb2.PointSpec(
            objective_digest=digest, x_digest=codec.digest(codec.payload(x)), default_data=True
        )
        points.append(engine.create_point(engine.locate(spec), x))
    (point,) = [point for point in points if point.objective.n == 2]
    calls.instead = lambda name, width, args: out_of_memory() if args[0].size == 2 else None
    assert refused(multiply, engine, point, np.ones((1, 2))).reason == "DEVICE_MEMORY"
    for lane, each in zip(engine.lanes, sorted(points, key=lambda point: point.objective.n), strict=False):
        assert lane.residency.get(each.id) is each


SPLIT = """
import json, pathlib, sys
import numpy as np
from hvpd_server.device.device import Device, devices

found_devices = devices(pathlib.Path(sys.argv[1]))
together = Device.together(found_devices)
found = {}
for rows in (8, 9, 3):
    placed = together.put(np.arange(3.0 * rows).reshape(rows, 3), data=True)
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.device.id)
    assert np.array_equal(placed, np.arange(3.0 * rows).reshape(rows, 3))
    found[rows] = [shard.data.shape for shard in shards], together.copies((rows, 3), data=True)
x = together.put(np.arange(8.0))
compiled = together.target.compile(
    lambda x, data: (x @ data, data.sum()),
    [together.target.spec((8,), x.dtype, data=False), together.target.spec((8, 3), x.dtype, data=True)],
)
product, total = together.run(compiled, [x, together.put(np.ones((8, 3)), data=True)])
text = compiled.as_text()
print(json.dumps([len(found_devices), found, np.asarray(product).tolist(), float(total), "all-reduce" in text, "f64[2,3]" in text]))
"""


def test_data_that_is_split_really_is_and_so_is_the_work(tmp_path):
    """This runs in its own process, because the CPU's number of devices must be set
    before jax begins.
    """
    done = subprocess.run(
        [sys.executable, "-c", SPLIT, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ
        | {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
        },
    )
    count, found, product, total, reduced, quarters = json.loads(done.stdout)
    assert count == 4
    assert found == {"8": [[[2, 3]] * 4, 1], "9": [[[9, 3]] * 4, 4], "3": [[[3, 3]] * 4, 4]}
    assert (product, total) == ([28.0] * 3, 24.0)
    assert reduced
    assert quarters
