"""What the server decides before anything is asked of it."""

import os
import types

import pytest

from hvpd_server._app import default_budget

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device(memory_bytes):
    return types.SimpleNamespace(memory_bytes=lambda: memory_bytes)


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
    assert default_budget(device(None), tmp_path) == expected


def test_a_device_with_memory_of_its_own_gives_three_quarters_of_it(tmp_path):
    (tmp_path / "memory.max").write_text("1000")
    assert default_budget(device(80 << 30), tmp_path) == 60 << 30
