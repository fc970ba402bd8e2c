"""The devices of a group, in the leader's process: which orders each action sends."""

import gc
import threading

import jax
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd.v1 import tensor_pb2
from hvpd_server.derivation import compiling
from hvpd_server.derivation.compiling import Target
from hvpd_server.device.group_device import GroupDevice
from hvpd_server.errors import ServiceError


class FakeLeader:
    """Notes the orders."""

    size = 2
    pending = 0

    def __init__(self):
        self.orders, self.dropped, self.counts, self.failure = [], [], {}, ""

    def order(self, order, chunk=b"", *, awaited=False):
        self.orders.append((order, bytes(chunk)))
        return len(self.orders)

    def done(self, number):
        return self.failure

    def drop(self, number):
        self.dropped.append(number)

    def launch_failed(self, error):
        raise SystemExit(str(error))


class Rows:
    """Two rows of a tensor."""

    tensor = tensor_pb2.Tensor(dtype="float64", shape=[2, 3], digest="d" * 64)

    def __getitem__(self, rows):
        return np.arange(6.0).reshape(2, 3)[rows]


@pytest.fixture
def leader():
    return FakeLeader()


@pytest.fixture
def device(leader, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    found = GroupDevice(leader)
    found._turn = threading.Lock()  # As with several devices.
    return found


@pytest.fixture(scope="module")
def blob():
    jax.config.update("jax_enable_x64", True)
    target, double = Target(jax.local_devices()[:1]), np.dtype(np.float64)
    specs = [target.spec((3,), double, data=False), target.spec((2, 3), double, data=True)]
    return compiling.dump(target.compile(lambda x, X: (X @ x, X.sum()), specs))


def test_a_launch_names_arrays_by_their_orders_and_brings_other_values(device, leader, blob):
    program = device.load(blob)
    x, X = device.put(np.ones(3)), device.place_rows(Rows(), slice(0, 2))
    product, total = device.run(program, [x, X])
    assert product.tolist() == [3.0, 12.0]
    assert total == 15.0
    launch, chunk = leader.orders[-1]
    assert (launch.launch.program, [each.array for each in launch.launch.arguments], chunk) == (1, [2, 3], b"")
    device.run(program, [np.full(3, 2.0), X])
    launch, chunk = leader.orders[-1]
    by_value, by_order = launch.launch.arguments
    assert (by_value.value.dtype, list(by_value.value.shape), by_order.array) == ("float64", [3], 3)
    assert chunk == bytes(codec.payload(np.full(3, 2.0)))


def test_what_is_not_used_any_more_is_dropped(device, leader, blob):
    program, x, X = device.load(blob), device.put(np.ones(3)), device.place_rows(Rows(), slice(0, 2))
    found = device.run(program, [x, X])
    assert leader.dropped == []
    del x
    gc.collect()
    assert leader.dropped == [2]
    del program, X, found
    gc.collect()
    assert sorted(leader.dropped) == [1, 2, 3]


def test_rows_that_a_rank_cannot_place_are_an_error(device, leader):
    leader.failure = "rank 1: no such file"
    with pytest.raises(
        ServiceError, match="rows 0 to 2 of tensor dddddddddddd cannot be placed on rank 1: no such file"
    ) as error:
        device.place_rows(Rows(), slice(0, 2))
    assert error.value.reason == "RANK_FAILED"
    assert leader.dropped == [1]


def test_a_program_that_a_rank_cannot_load_is_an_error(device, leader, blob):
    leader.failure = "rank 1: no memory"
    with pytest.raises(ServiceError, match="a compiled program cannot be loaded on rank 1: no memory"):
        device.load(blob)
    assert leader.dropped == [1]


def test_what_the_leader_itself_cannot_do_is_dropped_on_all_ranks(device, leader):
    class Lost(Rows):
        def __getitem__(self, rows):
            raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        device.place_rows(Lost(), slice(0, 2))
    with pytest.raises(Exception, match=r"pickle|truncated|invalid|unpickl"):
        device.load(b"no program")
    assert leader.dropped == [1, 2]


def test_a_launch_that_fails_ends_the_group(device, blob):
    program = device.load(blob)
    with pytest.raises(SystemExit, match=r"shape|float64"):
        device.run(program, [np.ones(4), device.place_rows(Rows(), slice(0, 2))])


def test_the_group_is_in_the_metrics(device, leader):
    leader.counts, leader.pending = {"put": 3}, 2
    assert device.readings() == {"ranks": 2, "orders": {"put": 3}, "pending_orders": 2}
