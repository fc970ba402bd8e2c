"""What the server decides before anything is asked of it."""

import os
import types

import pytest

from hvpd_server._memory_budget import budget

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
        ),  # As the kernel says that there is none.
    ],
)
def test_on_a_cpu_the_budget_is_a_quarter_of_what_the_machine_or_the_container_has(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert budget(None, device(None), tmp_path) == expected


def test_a_device_with_memory_of_its_own_gives_three_quarters_of_it(tmp_path):
    (tmp_path / "memory.max").write_text("1000")
    assert budget(None, device(80 << 30), tmp_path) == 60 << 30


def test_what_is_asked_for_counts_and_more_than_there_is_is_told(caplog):
    assert budget(5 << 30, device(80 << 30)) == 5 << 30
    assert caplog.messages == []
    assert budget(90 << 30, device(80 << 30)) == 90 << 30
    assert "XLA_CLIENT_MEM_FRACTION" in caplog.text


def test_an_accelerator_that_does_not_tell_its_memory_is_no_cpu(tmp_path):
    with pytest.raises(ValueError, match="--memory-budget"):
        budget(None, device(None, platform="cuda"), tmp_path)
