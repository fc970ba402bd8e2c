"""The store keeps committed blobs, whole and verified, across restarts, and nothing
else.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvpd._wire import codec
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.bundle import check_name
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.objects import Directory
from hvpd_server.store.store import Store

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def files(root):
    """Return every file under a directory with its content. Empty directories count,
    too.
    """
    return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def blob_file(store, digest):
    (found,) = (store.root / "blobs").rglob(digest)
    return found


# Blobs


@pytest.mark.parametrize("content", [b"", b"x", CONTENT])
@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
def test_an_uploaded_blob_is_read_back(store, upload, content, chunk_bytes):
    digest = hashlib.sha256(content).hexdigest()
    assert not store.has(digest)
    upload(store, content, chunk_bytes=chunk_bytes)
    assert store.has(digest)
    assert store.read(digest) == content
    assert not list((store.root / "incoming").iterdir())


def test_everything_survives_a_restart(store, upload):
    upload(store, CONTENT)
    store.add_objective(DIGEST, "digits/mlp")
    before = store.objective("digits/mlp")
    store.close()
    reopened = Store(store.root)
    try:
        assert reopened.read(DIGEST) == CONTENT
        assert reopened.objective("digits/mlp") == before
        assert [(name, digest) for name, digest, _ in reopened.objectives()] == [("digits/mlp", DIGEST)]
    finally:
        reopened.close()


def test_leftovers_of_a_crash_are_removed_at_the_start(store, upload):
    upload(store, CONTENT)
    store.close()
    clean = files(store.root)
    (store.root / "incoming" / "half").write_bytes(CONTENT[:100])
    Store(store.root).close()
    assert files(store.root) | {Path("changed"): b""} == clean | {Path("changed"): b""}


BAD_UPLOADS = {
    "late": ("UPLOAD_OUT_OF_ORDER", len(CONTENT), [(1, CONTENT)]),
    "out of order": ("UPLOAD_OUT_OF_ORDER", len(CONTENT), [(0, CONTENT[:100]), (200, CONTENT[200:])]),
    "repeated": ("UPLOAD_OUT_OF_ORDER", len(CONTENT), [(0, CONTENT[:100]), (0, CONTENT[:100])]),
    "truncated": ("UPLOAD_SIZE", len(CONTENT), [(0, CONTENT[:-1])]),
    "without chunks": ("UPLOAD_SIZE", len(CONTENT), []),
    "too long": ("UPLOAD_SIZE", len(CONTENT), [(0, CONTENT), (len(CONTENT), b"!")]),
    "wrong bytes": ("DIGEST_MISMATCH", len(CONTENT), [(0, CONTENT[:-1] + b"!")]),
    "of another size": ("DIGEST_MISMATCH", 3, [(0, CONTENT[:3])]),
}


@pytest.mark.parametrize("bad", BAD_UPLOADS)
def test_a_bad_upload_leaves_the_store_as_it_was_and_the_next_try_works(store, upload, bad):
    reason, size_bytes, chunks = BAD_UPLOADS[bad]
    before = files(store.root)
    with pytest.raises(ServiceError) as refused, store.upload(DIGEST, size_bytes) as uploading:
        for offset, chunk in chunks:
            uploading.append(offset, chunk)
        uploading.commit()
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, reason)
    assert files(store.root) == before
    upload(store, CONTENT)
    assert store.read(DIGEST) == CONTENT


def test_an_upload_that_is_broken_off_leaves_the_store_as_it_was(store):
    before = files(store.root)
    with pytest.raises(ConnectionError), store.upload(DIGEST, len(CONTENT)) as uploading:
        uploading.append(0, CONTENT[:5000])
        raise ConnectionError
    with store.upload(DIGEST, len(CONTENT)) as uploading:
        uploading.append(0, CONTENT)
    assert files(store.root) == before


@pytest.mark.parametrize(
    ("digest", "size_bytes", "code", "reason"),
    [
        ("", 1, Code.INVALID_ARGUMENT, "INVALID_DIGEST"),
        (DIGEST.upper(), 1, Code.INVALID_ARGUMENT, "INVALID_DIGEST"),
        (DIGEST + "0", 1, Code.INVALID_ARGUMENT, "INVALID_DIGEST"),
        ("../" * 21 + "a", 1, Code.INVALID_ARGUMENT, "INVALID_DIGEST"),
        (DIGEST, -1, Code.INVALID_ARGUMENT, "INVALID_SIZE"),
        (DIGEST, 1 << 62, Code.RESOURCE_EXHAUSTED, "DISK_FULL"),
    ],
)
def test_an_impossible_upload_is_refused_before_its_bytes_come(store, digest, size_bytes, code, reason):
    before = files(store.root)
    with pytest.raises(ServiceError) as refused:
        store.upload(digest, size_bytes)
    assert (refused.value.code, refused.value.reason) == (code, reason)
    assert files(store.root) == before


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT + b"!", b"", CONTENT[:99] + b"!" + CONTENT[100:]])
def test_a_blob_that_is_corrupt_on_disk_is_set_aside_and_can_be_uploaded_again(store, upload, damage):
    upload(store, CONTENT)
    blob_file(store, DIGEST).write_bytes(damage)
    with pytest.raises(ServiceError, match="set aside: register the objective again") as lost:
        store.read(DIGEST)
    assert (lost.value.code, lost.value.reason) == (Code.DATA_LOSS, "BLOB_CORRUPT")
    assert lost.value.metadata == {"digests": DIGEST}
    assert not store.has(DIGEST)
    assert [path.read_bytes() for path in (store.root / "corrupt").iterdir()] == [damage]

    with pytest.raises(ServiceError) as missing:
        store.read(DIGEST)
    assert missing.value.reason == "BLOBS_MISSING"
    upload(store, CONTENT)
    assert store.read(DIGEST) == CONTENT


def test_the_same_blob_from_two_threads_at_once(store, start):
    both = threading.Barrier(2)

    def upload_in_step():
        with store.upload(DIGEST, len(CONTENT)) as uploading:
            for offset in range(0, len(CONTENT), 1000):
                both.wait(10)
                uploading.append(offset, CONTENT[offset : offset + 1000])
            both.wait(10)
            return uploading.commit()

    futures = [start(upload_in_step) for _ in range(2)]
    assert [future.result(10) for future in futures] == [len(CONTENT)] * 2
    assert store.read(DIGEST) == CONTENT
    assert not list((store.root / "incoming").iterdir())


FULL_DISK = """
import json, pathlib, resource, sys
from hvpd._wire import codec
from hvpd_server.errors import to_status
from hvpd_server.store.store import Store

store = Store(pathlib.Path(sys.argv[1]))
content = b"x" * int(sys.argv[2])
files = lambda: sorted(str(path) for path in store.root.rglob("*"))

def upload():
    with store.upload(codec.digest(content), len(content)) as uploading:
        for offset in range(0, len(content), 1 << 16):
            uploading.append(offset, content[offset : offset + (1 << 16)])
        uploading.commit()

before = files()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    upload()
except OSError as error:
    status = to_status(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
unchanged = files() == before
upload()
print(json.dumps({"code": status.code, "message": status.message, "unchanged": unchanged}))
"""


@pytest.mark.parametrize("size_bytes", [2000, 1 << 20], ids=["fails when flushed", "fails when written"])
def test_a_full_disk_stores_nothing_and_the_next_try_works(tmp_path, size_bytes):
    """The operating system refuses to let a file grow (EFBIG). This runs in its own
    process, because the limit is the process's.
    """
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "store", str(size_bytes)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    seen = json.loads(child.stdout)
    assert seen["code"] == Code.RESOURCE_EXHAUSTED.value[0]
    assert os.strerror(27) in seen["message"]
    assert seen["unchanged"]
    store = Store(tmp_path / "store")
    try:
        assert store.read(hashlib.sha256(b"x" * size_bytes).hexdigest()) == b"x" * size_bytes
    finally:
        store.close()


@pytest.mark.parametrize("digest", ["{outside}", "../{name}", "../" * 21 + "a", "..", "", ".", "ab", "/"])
def test_reading_a_malformed_digest_touches_no_file(tmp_path, store, digest):
    """Digests come from clients. A digest that is a path must not lead out of the
    store, nor move files there.
    """
    outside = tmp_path / "outside"
    outside.write_text("not the store's")
    before = files(tmp_path)
    with pytest.raises(ServiceError):
        store.read(digest.format(outside=outside, name=outside.name))
    assert files(tmp_path) == before


def test_a_tensor_is_read_in_its_shape(store, upload):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = tensor_pb2.Tensor(dtype="float32", shape=(2, 3), digest=upload(store, array.tobytes()))
    np.testing.assert_array_equal(store.read_tensor(tensor), array)


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (2, 4)), ("float64", (2, 3)), ("nonsense", (2, 3))])
def test_a_tensor_of_another_size_is_refused(store, upload, dtype, shape):
    digest = upload(store, np.zeros((2, 3), np.float32).tobytes())
    with pytest.raises(ServiceError) as refused:
        store.read_tensor(tensor_pb2.Tensor(dtype=dtype, shape=shape, digest=digest))
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "INVALID_TENSOR")


# Objectives and names


def test_an_objective_is_found_by_name_and_by_digest(store):
    store.add_objective(DIGEST, "b")
    store.add_objective(DIGEST, "a")
    store.add_objective(OTHER, "")
    assert store.objective("b")[:2] == ("b", DIGEST)
    assert store.objective(DIGEST)[:2] == ("a", DIGEST)
    assert store.objective(OTHER)[:2] == ("", OTHER)
    assert [(name, digest) for name, digest, _ in store.objectives()] == [("a", DIGEST), ("b", DIGEST), ("", OTHER)]


def test_the_time_of_registration_is_the_first(store):
    store.add_objective(DIGEST, "a")
    first = store.objective("a")
    store.add_objective(DIGEST, "a")
    assert store.objective("a") == first


def test_a_name_moves_to_a_newer_digest(store):
    store.add_objective(DIGEST, "digits")
    store.add_objective(OTHER, "digits")
    assert store.objective("digits")[1] == OTHER
    assert store.objective(DIGEST)[:2] == ("", DIGEST)
    store.add_objective(DIGEST, "digits")
    assert store.objective("digits")[1] == DIGEST


def test_near_names_are_suggested(store):
    for name in ("digits/mlp", "digits/cnn", "weather"):
        store.add_objective(DIGEST, name)
    with pytest.raises(ServiceError, match="did you mean 'digits/mlp'") as unknown:
        store.objective("digit/mlp")
    assert (unknown.value.code, unknown.value.reason) == (Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND")
    assert unknown.value.metadata["near"].split(",")[0] == "digits/mlp"


def test_an_error_shows_a_long_name_with_its_length(store):
    with pytest.raises(ServiceError) as error:
        store.objective("x" * 301)
    assert f"no objective of name '{'x' * 300}'... (301 characters)" in str(error.value)


@pytest.mark.parametrize("name", ["", "x" * 500, "../names", OTHER, "\0"])
def test_an_unknown_name_is_not_found(store, name):
    store.add_objective(DIGEST, "digits")
    with pytest.raises(ServiceError, match=r"no stored name is similar|was deleted, register it again") as unknown:
        store.objective(name)
    assert unknown.value.code is Code.NOT_FOUND


def test_the_stored_bundle_is_parsed(store, upload):
    bundle = objective_pb2.Bundle(format=2, n=3, dtype="float64")
    assert store.bundle(upload(store, bundle.SerializeToString())) == bundle


# Derivations


DERIVATION = objective_pb2.Derivation(
    mode="reverse_over_reverse",
    programs=["value_and_grad", "hvp"],
    residuals=[
        objective_pb2.Residual(result=0, spec=tensor_pb2.ArraySpec(dtype="float64", shape=[3, 1 << 40])),
        objective_pb2.Residual(argument=0, spec=tensor_pb2.ArraySpec(dtype="float32")),
    ],
    dense_layers=[
        objective_pb2.DenseLayer(kernel=1, bias=0, transposed=True),
        objective_pb2.DenseLayer(kernel=0),
    ],
    recognised={"custom_jvp @relu": 3},
    presumed={"maximum": 1},
)


def test_a_derivation_is_kept_for_the_version_that_made_it(tmp_path, store):
    store.add_derivation(DIGEST, "one", DERIVATION)
    assert store.derivation(DIGEST, "one") == DERIVATION
    assert store.derivation(DIGEST, "two") is None
    assert store.derivation(OTHER, "one") is None
    store.add_derivation(DIGEST, "two", objective_pb2.Derivation(mode="auto"))
    assert store.derivation(DIGEST, "one") is None
    assert store.derivation(DIGEST, "two") == objective_pb2.Derivation(mode="auto")
    store.close()
    again = Store(tmp_path / "store")
    assert again.derivation(DIGEST, "two") == objective_pb2.Derivation(mode="auto")
    again.close()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\0" * 100, b"[" * 100_000, b'{"version": "one"}'),
        *(b'{"version": "one", "derivation": %s}' % found for found in (b"[]", b"null", b'"hvp"', b"7")),
        *(b'{"version": "one", "derivation": {%s}}' % found for found in (b'"mode": 3', b'"colour": "red"')),
        b'{"version": "one", "derivation": {"residuals": [{"spec": {"shape": ["x"]}}]}}',
    ],
    ids=lambda content: content[:60].decode(),
)
def test_a_derivation_that_is_damaged_is_none(store, content):
    (store.root / "derived" / DIGEST).write_bytes(content)
    assert store.derivation(DIGEST, "one") is None
    store.add_derivation(DIGEST, "one", DERIVATION)
    assert store.derivation(DIGEST, "one") == DERIVATION


def test_a_derivation_is_removed_with_its_objective(store):
    store.add_objective(DIGEST, "a")
    store.add_derivation(DIGEST, "one", DERIVATION)
    store.add_derivation(OTHER, "one", DERIVATION)
    store.remove_objective(DIGEST)
    assert store.derivation(DIGEST, "one") is None
    assert store.derivation(OTHER, "one") == DERIVATION


ESCAPES = [
    "..",
    ".",
    "../lock",
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "a//b",
    "%2e%2e%2fb",
    "a\\..\\b",
    "~",
    "a\nb",
    " a",
    "a:b",
    "ä",
    "\u202eb",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_looks_like_a_way_out_is_refused(name):
    with pytest.raises(ServiceError) as refused:
        check_name(name)
    assert refused.value.reason == "INVALID_NAME"


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_directory_of_names_even_unchecked(tmp_path, store, name):
    store.add_objective(DIGEST, "")
    before = files(tmp_path)
    try:
        store.add_objective(DIGEST, name)
    except OSError:  # "." and ".." are directories.
        assert files(tmp_path) == before
    else:
        (new,) = files(tmp_path).keys() - before.keys()
        assert new.parent == Path("store/names")
        assert store.objective(name)[:2] == (name, DIGEST)


_part = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(name=st.lists(_part, min_size=1, max_size=100).map("/".join).filter(lambda name: len(name) <= 200))
@example(name="/".join(["a"] * 100))
@example(name="a" * 200)
def test_every_name_that_is_allowed_can_be_stored(tmp_path_factory, name):
    check_name(name)
    store = Store(tmp_path_factory.mktemp("store"))
    try:
        store.add_objective(DIGEST, name)
        assert store.objective(name)[:2] == (name, DIGEST)
        assert [(name, digest) for name, digest, _ in store.objectives()] == [(name, DIGEST)]
    finally:
        store.close()


# Tensors that are read by rows


ROWS = np.random.default_rng(0).normal(size=(100, 3))


def rows_tensor(store, upload, array=ROWS):
    return tensor_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, digest=upload(store, array.tobytes()))


@pytest.mark.parametrize("dtype", ["float64", "float32", "int8", "bool", "bfloat16"])
@pytest.mark.parametrize("shape", [(100,), (100, 3), (100, 2, 5), (100, 0)])
def test_a_tensor_is_read_by_rows_in_its_dtype(store, upload, dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(codec.dtype(dtype))
    rows = store.open_tensor(rows_tensor(store, upload, array))
    for start, stop in [(0, 100), (0, 1), (99, 100), (30, 70)]:
        found = rows[slice(start, stop)]
        assert (found.dtype, found.shape) == (array.dtype, (stop - start, *shape[1:]))
        np.testing.assert_array_equal(found, array[start:stop])


def test_a_scalar_has_one_row(store, upload):
    rows = store.open_tensor(rows_tensor(store, upload, np.float64(2.5)))
    assert rows[slice(0, 1)].tolist() == [2.5]
    assert rows.tensor.shape == []


def test_a_tensor_that_another_process_has_verified_is_not_read_for_it(store, upload):
    tensor = rows_tensor(store, upload)
    blob_file(store, tensor.digest).write_bytes(np.zeros_like(ROWS).tobytes())
    assert not store.open_tensor(tensor, verified=True)[slice(0, 100)].any()
    with pytest.raises(ServiceError):
        store.open_tensor(tensor)


def test_a_tensor_read_by_rows_is_verified_once(store, upload, monkeypatch):
    tensor, verified, verify = rows_tensor(store, upload), [], Store.verify
    monkeypatch.setattr(
        Store, "verify", lambda self, digest, **rest: verified.append(digest) or verify(self, digest, **rest)
    )
    for _ in range(3):
        store.open_tensor(tensor)
    store.open_tensor(tensor_pb2.Tensor(dtype="float64", shape=(300,), digest=tensor.digest))
    assert verified == [tensor.digest]


def test_nothing_larger_than_a_piece_is_in_memory_while_it_is_verified(store, upload):
    content = np.zeros(1 << 24, np.uint8)
    tensor = rows_tensor(store, upload, content)
    tracemalloc.start()
    try:
        store.open_tensor(tensor)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
        blob_file(store, tensor.digest).write_bytes(b"x" + content.tobytes()[1:])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(ServiceError):
            store.open_tensor(tensor)
        assert tracemalloc.get_traced_memory()[1] - before < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("when", ["before it is opened", "between two times"])
def test_a_tensor_that_is_corrupt_is_set_aside_and_told_and_can_be_uploaded_again(store, upload, when):
    tensor = rows_tensor(store, upload)
    if when == "between two times":
        store.open_tensor(tensor)
    damaged = b"!" + ROWS.tobytes()[1:]
    blob_file(store, tensor.digest).write_bytes(damaged)
    os.utime(
        blob_file(store, tensor.digest), ns=(1, 1)
    )  # Two writes within a tick of the kernel's clock have one time.
    with pytest.raises(ServiceError, match="set aside: register the objective again") as lost:
        store.open_tensor(tensor)
    assert (lost.value.code, lost.value.reason) == (Code.DATA_LOSS, "BLOB_CORRUPT")
    assert lost.value.metadata == {"digests": tensor.digest}
    assert [path.read_bytes() for path in (store.root / "corrupt").iterdir()] == [damaged]
    with pytest.raises(ServiceError) as missing:
        store.open_tensor(tensor)
    assert missing.value.reason == "BLOBS_MISSING"
    rows_tensor(store, upload)
    np.testing.assert_array_equal(store.open_tensor(tensor)[slice(0, 100)], ROWS)


def test_a_mere_look_leaves_a_corrupt_tensor_in_place(store, upload):
    tensor = rows_tensor(store, upload)
    blob_file(store, tensor.digest).write_bytes(b"!" + ROWS.tobytes()[1:])
    for _ in range(2):
        with pytest.raises(ServiceError, match="corrupt on the server's disk"):
            store.open_tensor(tensor, set_aside=False)
    assert store.has(tensor.digest)


def test_a_file_that_is_cut_short_while_it_is_in_use_is_an_error_and_set_aside(store, upload):
    """A mapping into memory would end the process (SIGBUS)."""
    tensor = rows_tensor(store, upload)
    rows = store.open_tensor(tensor)
    os.truncate(blob_file(store, tensor.digest), 1000)
    np.testing.assert_array_equal(rows[slice(0, 10)], ROWS[:10])
    with pytest.raises(ServiceError, match="set aside: register the objective again") as lost:
        rows[slice(90, 100)]
    assert lost.value.reason == "BLOB_CORRUPT"
    assert not store.has(tensor.digest)
    with pytest.raises(ServiceError, match="not there any more; register the objective again") as missing:
        rows[slice(0, 10)]
    assert (missing.value.reason, missing.value.metadata) == ("BLOB_CORRUPT", {"digests": tensor.digest})
    rows_tensor(store, upload)
    np.testing.assert_array_equal(rows[slice(90, 100)], ROWS[90:])


def test_a_disk_that_cannot_be_read_is_told_with_its_own_words(store, upload, monkeypatch):
    tensor = rows_tensor(store, upload)
    rows = store.open_tensor(tensor)

    def fail(*args, **rest):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(np, "fromfile", fail)
    with pytest.raises(ServiceError, match=f"cannot be read from the server's disk: {os.strerror(5)}") as lost:
        rows[slice(0, 1)]
    assert (lost.value.code, lost.value.reason) == (Code.DATA_LOSS, "BLOB_CORRUPT")
    assert store.has(tensor.digest)  # Its readable bytes are right.


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float64", (99, 3)), ("float64", (101, 3)), ("float32", (100, 3)), ("nonsense", (100, 3))]
)
def test_a_tensor_of_another_size_than_its_file_is_refused(store, upload, dtype, shape):
    digest = rows_tensor(store, upload).digest
    with pytest.raises(ServiceError) as refused:
        store.open_tensor(tensor_pb2.Tensor(dtype=dtype, shape=shape, digest=digest))
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "INVALID_TENSOR")
    assert store.has(digest)


@pytest.mark.parametrize("digest", ["/dev/zero", "{outside}", "../{name}", "..", "", DIGEST])
def test_a_tensor_with_a_malformed_digest_is_not_opened(tmp_path, store, digest):
    """The store must not even hash it, because some files have no end."""
    outside = tmp_path / "outside"
    outside.write_text("not the store's")
    before = files(tmp_path)
    digest = digest.format(outside=outside, name=outside.name)
    with pytest.raises(ServiceError) as refused:
        store.open_tensor(tensor_pb2.Tensor(dtype="uint8", shape=(15,), digest=digest))
    assert refused.value.reason == "BLOBS_MISSING"
    assert files(tmp_path) == before


# The index of objectives and names


def test_a_look_up_reads_no_file(store, monkeypatch):
    """Names are read once, at the start, so their number does not matter."""
    for index in range(20):
        store.add_objective(f"{index:064x}", f"team/{index}")
    read = []
    monkeypatch.setattr(Directory, "get", lambda objects, key: read.append(key))
    monkeypatch.setattr(Path, "iterdir", lambda path: pytest.fail(f"{path} was listed"))
    assert store.objective("team/7")[1] == f"{7:064x}"
    assert store.objective(f"{7:064x}")[0] == "team/7"
    assert len(store.objectives()) == 20
    store.add_objective(DIGEST, "team/7")
    store.remove_name("team/3")
    with pytest.raises(ServiceError, match="no objective of name 'nothing'"):
        store.objective("nothing")
    assert read == []


def test_a_restart_reads_the_same_index_after_changes_from_many_threads(store, start, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    digests = [f"{index:064x}" for index in range(4)]
    stop = threading.Event()

    def change(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            digest, name = digests[rng.integers(4)], f"name/{rng.integers(6)}"
            match rng.integers(4):
                case 0:
                    store.remove_name(name)
                case 1:
                    store.remove_objective(digest)
                case _:
                    store.add_objective(digest, name)

    def look():
        seen = 0
        while not stop.is_set():
            for name, digest, _ in store.objectives():
                assert digest in digests
                seen += 1
                with contextlib.suppress(ServiceError):  # It was removed meanwhile.
                    assert store.objective(name or digest)[1] in digests
        return seen

    looking = start(look)
    changing = [start(change, seed) for seed in range(4)]
    for future in changing:
        future.result(60)
    stop.set()
    assert looking.result(10) > 0
    indexed = store.objectives(), {digest: set(store.names_of(digest)) for digest in digests}
    store.close()
    reopened = Store(store.root)
    try:
        assert (reopened.objectives(), {digest: set(reopened.names_of(digest)) for digest in digests}) == indexed
    finally:
        reopened.close()


def test_a_name_that_the_disk_does_not_take_is_not_in_the_index_either(store, monkeypatch):
    store.add_objective(DIGEST, "kept")

    def full(path, content):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store, "keep", full)
    for digest, name in ((DIGEST, "new"), (OTHER, "kept")):
        with pytest.raises(OSError, match=os.strerror(28)):
            store.add_objective(digest, name)
    assert [(name, digest) for name, digest, _ in store.objectives()] == [("kept", DIGEST)]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where no directory can be made")
def test_a_store_that_cannot_be_made_is_named():
    with pytest.raises(ServiceError, match=r"--store /proc/hvpd cannot be used: .*No such file") as error:
        Store(Path("/proc/hvpd"))
    assert error.value.reason == "STORE_UNAVAILABLE"
