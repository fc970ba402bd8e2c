"""Files are replaced as a whole, or not at all."""

import os
import stat

import pytest

from hvpd_server.files import atomic_file, version


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path, durable):
    path = tmp_path / "part" / "record"
    for content in (b"old", b"new"):
        with atomic_file(tmp_path, durable=durable) as (file, commit):
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"old"
            commit(path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path.parent]


def test_a_file_that_is_not_committed_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path) as (file, _):
        file.write(b"half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_durable_file_and_its_directory_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_mode))
    for durable, kinds in ((False, []), (True, [stat.S_IFREG, stat.S_IFDIR])):
        with atomic_file(tmp_path, durable=durable) as (_, commit):
            commit(tmp_path / "record")
        assert [stat.S_IFMT(mode) for mode in flushed] == kinds


@pytest.mark.parametrize(("mode", "found"), [(0o600, 0o600), (0o666, 0o644)])
def test_a_file_has_its_mode_before_the_umask(tmp_path, mode, found):
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path, mode=mode) as (_, commit):
            commit(tmp_path / "record")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "record").stat().st_mode) == found


def test_a_version_changes_with_the_file_and_is_the_same_by_descriptor(tmp_path):
    path = tmp_path / "record"
    assert version(path) is None
    path.write_bytes(b"a")
    first = version(path)
    with path.open("rb") as file:
        assert version(file.fileno()) == first
    path.write_bytes(b"ab")
    assert version(path) not in (None, first)
