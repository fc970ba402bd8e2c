"""The files of compiled programs count for tenants, and leave a full cache fairly."""

import os

import pytest

from hvpd_server.store.program_cache import ProgramCache

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


class Files:
    """A cache whose files are ever younger. The objective A is of tenant "a", and so
    on; C is of "a" and "b".
    """

    def __init__(self, directory, most, **limits):
        self.directory = directory
        self.time = 1e9
        self.cache = self.open(most, **limits)

    def open(self, most, **limits):
        owners = {A: ["a"], B: ["b"], C: ["a", "b"]}
        return ProgramCache(self.directory, most, lambda digest: owners.get(digest, ()), limits.get)

    def write(self, digest, key, size):
        path = self.cache.path(digest, key) if digest else self.directory / key
        path.write_bytes(bytes(size))
        self.time += 1
        os.utime(path, (self.time, self.time))
        return self.cache.written(digest, size)

    def names(self):
        return sorted(path.name for path in self.directory.iterdir())


@pytest.fixture
def files(tmp_path):
    return lambda most=1000, **limits: Files(tmp_path, most, **limits)


def test_files_count_for_the_tenants_of_their_objective(files):
    found = files()
    found.write(A, "1", 100)
    found.write(C, "1", 10)
    found.write("", "jit_add-1-cache", 1)
    for cache in (found.cache, found.open(1000)):
        assert [cache.bytes_of(tenant) for tenant in ("a", "b", "c", "")] == [110, 10, 0, 111]


def test_an_objective_borrows_programs_of_its_own_tenants_only(files):
    found, other = files(), "d" * 64
    found.write(A, "1", 100)
    for tenants in ((), ("b",)):
        found.cache.borrow(other, "1", tenants)
        assert found.names() == [f"{A}-1"]
    found.cache.borrow(other, "1", ("b", "a"))
    assert found.names() == [f"{A}-1", f"{other}-1"]
    assert found.cache.bytes_of("") == 200
    found.cache.borrow(B, "1", ())  # An objective without tenants now has the program, too.
    assert found.names() == [f"{A}-1", f"{B}-1", f"{other}-1"]
    found.cache.borrow(B, "2", ())  # No objective has this program.
    assert len(found.names()) == 3


def test_a_full_cache_loses_the_oldest_files_of_the_tenant_that_has_most(files):
    found = files(100)
    found.write(B, "old", 20)
    assert [found.write(A, str(index), 20) for index in range(5)] == [0, 0, 0, 0, 2]
    assert found.names() == [f"{A}-2", f"{A}-3", f"{A}-4", f"{B}-old"]
    for index in range(5, 50):
        found.write(A, str(index), 20)
        assert found.cache.bytes_of("") <= 100
    assert f"{B}-old" in found.names()
    assert found.cache.bytes_of("a") == found.open(100).bytes_of("a")


def test_a_file_that_was_read_lately_stays(files):
    found = files(100)
    for key in "123":
        found.write(A, key, 30)
    os.utime(found.cache.path(A, "1"), (2e9, 1e9))
    found.write(A, "4", 30)
    assert found.names() == [f"{A}-1", f"{A}-3", f"{A}-4"]


def test_a_tenant_over_its_limit_loses_its_own_files(files):
    found = files(1000, a=50)
    found.write(B, "old", 500)
    for index in range(4):
        found.write(A, str(index), 20)
    assert found.names() == [f"{A}-2", f"{A}-3", f"{B}-old"]


def test_files_of_no_tenant_do_not_push_out_those_of_tenants(files):
    found = files(100)
    found.write(A, "1", 40)
    for index in range(10):
        found.write("d" * 64, str(index), 20)
    assert f"{A}-1" in found.names()


def test_the_files_of_a_deleted_objective_go(files):
    found = files()
    found.write(A, "1", 10)
    found.write(B, "1", 10)
    (found.directory / "directory").mkdir()
    found.cache.forget(A)
    assert found.names() == [f"{B}-1", "directory"]
    assert found.cache.bytes_of("") == 10
    found.cache.forget(A)


def test_a_file_that_another_process_removed_is_no_error(files):
    found = files(50)
    found.write(A, "1", 30)
    found.cache.path(A, "1").unlink()
    assert found.write(A, "2", 30) == 0
    assert found.cache.bytes_of("") == 30
