"""The server chooses the limits of programs at its start, and repeats its looks."""

import dataclasses
import re
import types
from pathlib import Path

import pytest

from hvpd_server import app, bundle
from hvpd_server import config as _config
from hvpd_server.engine import registration
from hvpd_server.errors import ServiceError
from hvpd_server.importer import refusals, table
from hvpd_server.rpc import call_limits
from hvpd_server.store import tenant_content

PAGES = Path(__file__).parents[2] / "docs" / "operate" / "security"
SECURITY = PAGES / "bundles.md"


def test_a_look_is_repeated_also_after_an_error_until_the_server_stops(caplog):
    looks, waits = [], []

    def look():
        looks.append(len(waits))
        if len(looks) == 2:
            raise OSError("the file is gone")

    def wait(seconds):
        waits.append(seconds)
        return len(waits) == 4

    app._repeat(types.SimpleNamespace(wait=wait), 1.0, look)
    assert looks == [0, 1, 2, 3]
    assert waits == [1.0] * 4
    assert "failed; it tries again in 1 s" in caplog.text
    assert "the file is gone" in caplog.text


LIMITS = {
    "memory_bytes": (4 << 30, "needed more than 4 GiB"),
    "cpu_seconds": (120, "more than 120 s of computing"),
    "seconds": (300, "or 300 s in all"),
    "compile_memory_bytes": (16 << 30, "or needed more than a quarter of the host's memory"),
    "compile_cpu_seconds": (36_000, "or than ten hours of computing"),
    "compile_seconds": (3600, "took longer than `--compile-timeout` (3600 s)"),
    "bundle_bytes": (512 << 20, "| 512 MiB | all programs of a bundle together |"),
    "operations": (1_000_000, "| 1,000,000 operations | one program; a function counts once for each call |"),
    "nesting": (64, "| 64 levels | operations inside operations,"),
    "calls": (64, "| 64 levels | calls of functions inside functions |"),
    "constant_bytes": (256 << 20, "| 256 MiB | the constants of one program |"),
    "array_bytes": (1 << 50, "1 PiB | one array |"),
    "rank": (64, "| 64 axes,"),
}
"""The default limits of programs, and the words of the page for them."""


def test_the_page_states_each_default_limit_of_programs():
    page = " ".join(SECURITY.read_text().split())
    assert dataclasses.asdict(refusals.Limits()) == {name: value for name, (value, _) in LIMITS.items()}
    assert [said for _, said in LIMITS.values() if said not in page] == []
    assert table.LOOP_BYTES == 1 << 40
    assert "| 1 TiB | the values that a loop or a derivative keeps |" in page
    assert (bundle.MAX_BUNDLE_BYTES, bundle.MAX_TEXT, bundle.MAX_LEAVES) == (4 << 20, 80, 65_536)
    assert "more than 4 MiB, a text of more than 80 characters" in page
    assert "a list of more than 65,536 entries (blocks: 256; axes of a shape: 64; facts of a sparse array: 8)" in page
    ranks = ["Tensor.shape", "ArraySpec.shape", "TreeSpec.Sparse.shape"]
    assert dict(bundle._MAX_ENTRIES) == dict.fromkeys(ranks, 64) | {"Bundle.blocks": 256, "TreeSpec.Sparse.facts": 8}


@pytest.mark.parametrize(("host", "reads", "compiles"), [(8 << 30, 2 << 30, 2 << 30), (64 << 30, 4 << 30, 16 << 30)])
def test_programs_share_the_memory_of_the_machine(monkeypatch, host, reads, compiles):
    monkeypatch.setattr(app.memory_budget, "host_bytes", lambda: host)
    limits = app._program_limits(_config.load(_config.parse(["--compile-timeout", "5"]), {}))
    expected = {"memory_bytes": reads, "compile_memory_bytes": compiles, "compile_seconds": 5}
    assert limits == dataclasses.replace(refusals.Limits(), **expected)
    default = app._program_limits(_config.load(_config.parse([]), {}))
    assert default.compile_seconds == refusals.Limits().compile_seconds


def test_the_page_has_a_row_for_each_reason():
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", SECURITY.read_text(), re.MULTILINE)) == refusals.REASONS


def test_the_pages_state_the_limits_that_need_no_setting():
    owned = " ".join((PAGES / "ownership.md").read_text().split())
    assert "at most 20,000 names and objectives, and 250,000 blobs" in owned
    assert (tenant_content.MAX_RECORDS, tenant_content.MAX_BLOBS) == (20_000, 250_000)
    assert "does not read an answer for a minute" in owned
    assert call_limits.STALLED_SECONDS == 60
    assert "compiles 30 s later" in " ".join(SECURITY.read_text().split())
    assert registration._GRACE == 30


def test_a_tenant_has_a_sixteenth_of_the_memory_in_transit_and_as_much_shared(tmp_path, device, monkeypatch):
    monkeypatch.setattr(app, "devices", lambda cache: [device])
    monkeypatch.setattr(app.memory_budget, "host_bytes", lambda *cgroup: 16 << 30)
    made = []
    for kind in ("Arrivals", "Segments"):
        make = getattr(app, kind)
        monkeypatch.setattr(app, kind, lambda *args, make=make: made.append(make(*args)) or made[-1])
    server = app.App(_config.Config(store=tmp_path, port=0, vector_port="off", drain=0.0))
    try:
        arrivals, segments = made
        arrivals.take("a", 1 << 30)
        with pytest.raises(ServiceError, match=f"of at most {1 << 30}, and 1 more do not fit"):
            arrivals.take("a", 1)
        assert [segments.take("a", 1 << 29) for _ in range(3)] == [True, True, False]
    finally:
        server.stop()
