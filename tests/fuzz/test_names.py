"""Names and digests that look like paths: the server opens, makes, moves or shows
nothing outside of the store.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvpd._wire import codec
from hvpd.v1 import (
    blob_pb2,
    blob_pb2_grpc,
    curvature_pb2,
    curvature_pb2_grpc,
    objective_pb2,
    objective_pb2_grpc,
    tensor_pb2,
)
from hvpd_server.bundle import check_name
from hvpd_server.errors import ServiceError
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import Store
from hvpd_server.store.tenant_content import Owners

SECRET = b"what nobody asked for"

_PIECES = [
    "..",
    ".",
    "/",
    "\\",
    "~",
    "\0",
    "%2e%2e",
    "%2f",
    "\r\n",
    "\u202e",
    "ä",
    "\ud7ff",
    "secret",
    "lock",
    "names",
    "blobs",
    "a",
    "0",
]

PATHS = st.one_of(
    st.lists(st.sampled_from(_PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(["..", ".", "secret", "store", "a"]), max_size=30).map("/".join),
    st.text(max_size=70),
    st.text(alphabet="0123456789abcdef", min_size=62, max_size=66),
    st.text(alphabet="\uff10\uff11\u0660\u0661abcdefABCDEF", min_size=64, max_size=64),
    st.sampled_from(["a" * 300, "a/" * 150, "../" * 21 + "a", "/etc/passwd", "0" * 64 + "\n", "0" * 63 + "\0"]),
)

_watching: "list[list[str]]" = []


def _hook(event, arguments):
    if not _watching:
        return
    paths = {"os.rename": 2, "os.link": 2} | dict.fromkeys(
        ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"), 1
    )
    said = arguments[: paths.get(event, 0)]
    _watching[-1] += [os.fsdecode(path) for path in said if isinstance(path, str | bytes | os.PathLike)]


@contextlib.contextmanager
def watched(root):
    """Fail if a file outside of root is touched. Python reports each access."""
    touched = []
    _watching.append(touched)
    try:
        yield
    finally:
        _watching.pop()
    inside = os.path.realpath(root)
    assert [path for path in touched if not os.path.realpath(path).startswith(inside + os.sep)] == []


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def place():
    """Yield a store with an objective, beside a file that is secret."""
    root = Path(tempfile.mkdtemp())
    for path in ("secret", "secret.json", "a"):
        (root / path).write_bytes(SECRET)
    store = Store(root / "store")
    store.add_objective("0" * 64, "known")
    yield store, Owners(store), Quarantine(store.root, 3)
    store.close()
    shutil.rmtree(root)


def asks(store, owners, quarantine, name):
    """Return all functions that a caller's string reaches."""
    tensor = tensor_pb2.Tensor(dtype="uint8", shape=[1], digest=name)
    yield lambda: store.has(name) and pytest.fail("it has it")
    yield lambda: store.size(name) and pytest.fail("it has a size")
    yield lambda: store.read(name)
    yield lambda: store.verify(name)
    yield lambda: store.read_tensor(tensor)
    yield lambda: store.open_tensor(tensor)
    yield lambda: store.upload(name, 1)
    yield lambda: store.registered(name) and not codec.is_digest(name) and pytest.fail("it is registered")
    yield lambda: store.objective(name)
    yield lambda: owners.find("tenant", name)
    yield lambda: owners.has_blob("tenant", name)
    yield lambda: owners.has_blob(name, "0" * 64)
    yield lambda: owners.add_blob(name, "1" * 64)
    yield lambda: owners.add_objective(name, "1" * 64, shared=False)
    yield lambda: owners.may_use(name, "0" * 64)
    yield lambda: quarantine.check(name)
    yield lambda: quarantine.strike(name, "reason")
    yield lambda: check_name(name) or store.add_objective("0" * 64, name)


@settings(settings.get_profile("fuzz"))
@given(name=PATHS)
@example(name="../secret")
def test_no_string_leads_out_of_the_store(place, tried, monkeypatch_module, name):
    store = place[0]
    for ask in asks(*place, name):
        tried("names and digests against the store")
        with watched(store.root), contextlib.suppress(ServiceError, ValueError):
            ask()
    assert {path.name for path in store.root.parent.iterdir()} == {"store", "secret", "secret.json", "a"}


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield patch


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def digest(client):
    return client.register(lambda x: jnp.sum(x**4), np.ones(3), name="fuzz/names").digest


def tree(root):
    """Return all files beside the store, with their state. The programs that servers of
    the suite share may be compiled meanwhile.
    """
    found = (path for path in root.parent.iterdir() if not path.name.startswith("programs"))
    return {path.name: path.stat().st_mtime_ns for path in found}


@settings(settings.get_profile("fuzz-calls"))
@given(name=PATHS)
def test_no_request_does_either(server, channel, digest, tried, name):
    tried("names and digests in requests")
    blobs = blob_pb2_grpc.BlobServiceStub(channel)
    objectives = objective_pb2_grpc.ObjectiveServiceStub(channel)
    curvature = curvature_pb2_grpc.CurvatureServiceStub(channel)
    (server.store.parent / "secret").write_bytes(SECRET)
    before = tree(server.store)
    for call in (
        lambda: blobs.FindMissingBlobs(blob_pb2.FindMissingBlobsRequest(digests=[name])),
        lambda: blobs.UploadBlob(iter([blob_pb2.UploadBlobRequest(digest=name, size_bytes=1, chunk=b"x")])),
        lambda: objectives.GetObjective(objective_pb2.GetObjectiveRequest(name=name)),
        lambda: objectives.GetPlan(objective_pb2.GetPlanRequest(digest=name)),
        lambda: objectives.CreateObjective(objective_pb2.CreateObjectiveRequest(digest=name, name=name)),
        lambda: objectives.CreateObjective(objective_pb2.CreateObjectiveRequest(digest=digest, name=name)),
        lambda: objectives.CreateObjective(objective_pb2.CreateObjectiveRequest(digest=digest, x_digest=name)),
        lambda: list(
            curvature.CreatePoint(
                iter(
                    [
                        curvature_pb2.CreatePointRequest(
                            spec={
                                "objective_digest": digest,
                                "data": [{"dtype": "uint8", "digest": name}],
                                "x_digest": name,
                            }
                        )
                    ]
                )
            )
        ),
    ):
        try:
            assert SECRET.decode() not in str(call())
        except grpc.RpcError as error:
            assert error.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), error  # noqa: PT017
            assert SECRET.decode() not in (error.details() or "")  # noqa: PT017
    assert tree(server.store) == before
