"""Shared memory between two ends: what is taken, and what is left of it."""

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from hvpd._wire import segment
from hvpd._wire.segment import SegmentError

SIZE = 3 * mmap.PAGESIZE + 5


def segments(pid="self"):
    """Return the lines of a process's segments in /proc/PID/maps."""
    return {line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:hvpd-vectors" in line}


@pytest.fixture
def descriptor():
    """Yield a function that keeps descriptors until the test ends."""
    kept = []
    yield lambda each: kept.append(each) or each
    for each in kept:
        os.close(each)


def memory(seals=fcntl.F_SEAL_SHRINK, size=SIZE, flags=os.MFD_ALLOW_SEALING):
    found = os.memfd_create("hvpd-test", os.MFD_CLOEXEC | flags)
    os.ftruncate(found, size)
    if seals:
        fcntl.fcntl(found, fcntl.F_ADD_SEALS, seals)
    return found


def test_both_ends_see_the_same_bytes(descriptor):
    assert segment.available()
    here, passed = segment.create(SIZE)
    there = segment.attach(descriptor(passed), SIZE)
    assert here.size == there.size == SIZE
    here.write(b"from here")
    found = bytearray(9)
    there.read_into(memoryview(found))
    assert found == b"from here"
    there.memory[:4] = np.frombuffer(b"back", np.uint8)
    here.read_into(memoryview(found))
    assert found == b"back here"


def test_a_segment_keeps_its_size(descriptor):
    _, passed = segment.create(SIZE)
    descriptor(passed)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(passed, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(passed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_memory_goes_with_the_last_reference_and_is_not_for_children(descriptor):
    before = segments()
    here, passed = segment.create(SIZE)
    part = here.memory[:10]
    os.close(passed)
    del here
    assert len(segments() - before) == 1
    text = Path("/proc/self/smaps").read_text()
    flags = text[text.index("memfd:hvpd-vectors") :].partition("VmFlags:")[2].splitlines()[0].split()
    assert "dc" in flags  # Not copied to a child.
    del part
    assert not segments() - before


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda path: memory(seals=0), "not sealed against shrinking"),
        (lambda path: memory(seals=fcntl.F_SEAL_GROW), "not sealed against shrinking"),
        (lambda path: memory(flags=0, seals=0), "not sealed against shrinking"),
        (lambda path: memory(size=SIZE - 1), f"has {SIZE - 1} bytes, expected {SIZE}"),
        (lambda path: memory(size=0), "has 0 bytes"),
        (lambda path: memory(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), "not permitted"),
        (lambda path: os.open(path, os.O_RDWR | os.O_CREAT), "not plain memory"),
        (lambda path: os.open(path.parent, os.O_RDONLY), "not plain memory"),
        (lambda path: os.open("/dev/zero", os.O_RDWR), "not plain memory"),
        (lambda path: os.eventfd(0), "not plain memory"),
    ],
    ids=["unsealed", "grow", "unsealable", "small", "empty", "unwritable", "file", "folder", "device", "eventfd"],
)
def test_what_could_kill_a_reader_or_is_no_memory_is_not_taken(descriptor, tmp_path, made, says):
    with pytest.raises(OSError, match=says):
        segment.attach(descriptor(made(tmp_path / "file")), SIZE)


def test_memory_that_is_open_for_reading_only_is_not_taken(descriptor):
    passed = descriptor(memory())
    with pytest.raises(PermissionError):
        segment.attach(descriptor(os.open(f"/proc/self/fd/{passed}", os.O_RDONLY)), SIZE)


def test_huge_pages_are_not_taken(descriptor):
    """The pool of huge pages can be empty when a page is first touched."""
    try:
        passed = descriptor(memory(size=2 << 20, flags=os.MFD_ALLOW_SEALING | os.MFD_HUGETLB))
    except OSError as error:
        pytest.skip(f"this kernel has no huge pages: {error}")
    with pytest.raises(SegmentError, match="not plain memory"):
        segment.attach(passed, 2 << 20)


def test_no_memory_is_shared_if_the_kernel_may_not_have_it(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "2\n")
    assert not segment.available()
