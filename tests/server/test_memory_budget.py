"""The budget of resident bytes follows the device, the machine and the container."""

import os
import types

import pytest

from hvpd_server.device.memory_budget import budget, program_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device(memory_bytes, platform="cpu"):
    return types.SimpleNamespace(memory_bytes=lambda: memory_bytes, platform=platform, kind="a kind")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MACHINE // 4),
        ({"memory.max": "max\n"}, MACHINE // 4),
        ({"memory.max": "1000000\n"}, 250_000),
        ({"memory/memory.limit_in_bytes": "2000000\n"}, 500_000),
        (
            {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
            MACHINE // 4,
        ),  # The kernel writes "no limit" so.
    ],
)
def test_on_a_cpu_the_budget_is_a_quarter_of_the_machine_or_the_container(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert budget(None, device(None), tmp_path) == expected


def test_the_budget_of_an_accelerator_is_three_quarters_of_its_memory(tmp_path):
    (tmp_path / "memory.max").write_text("1000")
    assert budget(None, device(80 << 30), tmp_path) == 60 << 30


def test_a_configured_budget_counts_and_too_much_is_logged(caplog):
    assert budget(5 << 30, device(80 << 30)) == 5 << 30
    assert caplog.messages == []
    assert budget(90 << 30, device(80 << 30)) == 90 << 30
    assert "XLA_CLIENT_MEM_FRACTION" in caplog.text


def test_an_accelerator_with_unknown_memory_needs_a_budget(tmp_path):
    with pytest.raises(ValueError, match="--memory-budget"):
        budget(None, device(None, platform="cuda"), tmp_path)


def test_a_program_on_a_cpu_may_take_three_quarters_of_the_machine_or_the_container(tmp_path):
    assert program_bytes(device(None), tmp_path) == MACHINE * 3 // 4
    (tmp_path / "memory.max").write_text("1000000\n")
    assert program_bytes(device(None), tmp_path) == 750_000
    assert program_bytes(device(80 << 30, platform="cuda"), tmp_path) is None
