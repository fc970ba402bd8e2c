"""How a leader forms a group. e2e/test_group.py forms real ones."""

import socket
from types import SimpleNamespace

import pytest

from hvpd_server.config import Config
from hvpd_server.device import forming
from hvpd_server.errors import ServiceError
from hvpd_server.store.objects import Directory
from hvpd_server.store.store import Store

WAIT = 30


def test_a_leader_with_a_gpu_does_not_start_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(forming.Leader, "gather", lambda leader, coordinator: leader._listener.close())
    monkeypatch.setattr(forming, "connect", lambda *arguments, **settings: None)
    monkeypatch.setattr(forming, "devices", lambda cache: [SimpleNamespace(platform="cuda", kind="NVIDIA H100")])
    store = Store(Directory(tmp_path / "store"))
    config = Config(store=str(tmp_path / "store"), leader="127.0.0.1:0", rank=0, size=2)
    with pytest.raises(ServiceError, match="this is NVIDIA H100: start one server with all devices") as error:
        forming.lead(config, store)
    assert error.value.reason == "NO_GROUP"


def test_a_leader_that_is_given_by_name_listens_on_all_addresses(tmp_path, monkeypatch):
    """The name of a machine may have an address of the machine itself only."""
    found = []

    def gather(leader, coordinator):
        socket.create_connection(("127.0.0.1", leader.port), WAIT).close()
        found.append(coordinator)
        leader._listener.close()

    monkeypatch.setattr(forming.Leader, "gather", gather)
    monkeypatch.setattr(forming, "connect", lambda *arguments, **settings: None)
    monkeypatch.setattr(forming, "devices", lambda cache: [SimpleNamespace(platform="cuda", kind="")])
    config = Config(leader="host0:0", rank=0, size=2)
    with pytest.raises(ServiceError, match="a group computes on CPUs"):
        forming.lead(config, Store(Directory(tmp_path / "store")))
    assert [each.rpartition(":")[0] for each in found] == ["host0"]


def test_an_error_of_listening_names_the_setting(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        leader = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"^--leader {leader}: cannot listen on port \d+ \(Address already in use"):
            forming.lead(Config(leader=leader, rank=0, size=2), Store(Directory(tmp_path / "store")))
