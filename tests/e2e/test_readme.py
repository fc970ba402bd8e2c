"""The README's Python runs as it stands, in the order in which it is read."""

import re
from pathlib import Path

import pytest

import hvpd
from hvpd_server import _config

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_its_python_blocks_run(server, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    connect = hvpd.connect
    monkeypatch.setattr(hvpd, "connect", lambda address: connect(server.address))
    for block in blocks:
        namespace: dict[str, object] = {}
        exec(block, namespace)
        assert isinstance(namespace["client"], hvpd.Client)
        namespace["client"].close()


@pytest.mark.parametrize("field", _config.Config.__dataclass_fields__)
def test_its_table_has_every_setting(field):
    assert f"| `--{field.replace('_', '-')}` | `HVPD_{field.upper()}` |" in README


def test_its_table_has_every_error():
    for name in hvpd.__all__:
        if name.endswith("Error") and name != "HvpdError":
            assert f"| `{name}` |" in README
