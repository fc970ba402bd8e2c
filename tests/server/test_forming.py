"""How a leader forms a group. e2e/test_group.py forms real ones."""

from types import SimpleNamespace

import pytest

from hvpd_server.config import Config
from hvpd_server.device import forming
from hvpd_server.errors import ServiceError
from hvpd_server.store.objects import Directory
from hvpd_server.store.store import Store


def test_a_leader_with_a_gpu_does_not_start_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(forming.Leader, "gather", lambda leader, coordinator: leader._listener.close())
    monkeypatch.setattr(forming, "connect", lambda *arguments, **settings: None)
    monkeypatch.setattr(forming, "devices", lambda cache: [SimpleNamespace(platform="cuda", kind="NVIDIA H100")])
    store = Store(Directory(tmp_path / "store"))
    config = Config(store=str(tmp_path / "store"), leader="127.0.0.1:0", rank=0, size=2)
    with pytest.raises(ServiceError, match="this is NVIDIA H100: start one server with all devices") as error:
        forming.lead(config, store)
    assert error.value.reason == "NO_GROUP"
