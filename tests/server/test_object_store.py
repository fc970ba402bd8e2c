"""A store in S3: a real server by HTTP, which throttles, fails and tears requests."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

import boto3
import pytest

from hvpd._cli import main
from hvpd._wire import codec
from hvpd.v1 import objective_pb2
from hvpd_server import config_check
from hvpd_server.config import Config
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store import exclusion, lease, object_store
from hvpd_server.store.copy import copy
from hvpd_server.store.object_store import ObjectStore
from hvpd_server.store.objects import Directory
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import Store, blob_key
from hvpd_server.store.tenant_content import Owners
from tests.support.object_server import BUCKET, ObjectServer
from tests.support.waiting import until

D, E = "ab" * 32, "cd" * 32
CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def server():
    running = ObjectServer()
    yield running
    running.close()


@pytest.fixture
def bucket(server, monkeypatch):
    """Yield the server with an empty bucket, in this process's environment."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_RETRIES", 3)
    found = boto3.resource("s3", endpoint_url=server.environment["AWS_ENDPOINT_URL"]).Bucket(BUCKET)
    found.create()
    yield server
    found.objects.delete()
    found.delete()


@pytest.fixture
def replicas(bucket, tmp_path):
    opened = [Store(ObjectStore(bucket.url, tmp_path / name, 1 << 30)) for name in ("one", "two")]
    yield opened
    for each in opened:
        each.close()


def raw(server):
    return boto3.client("s3", endpoint_url=server.environment["AWS_ENDPOINT_URL"])


def keys(server):
    found = raw(server).list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {entry["Key"].removeprefix("prefix/") for entry in found}


def test_a_blob_is_read_at_another_machine_and_once_only(replicas, upload, bucket):
    one, two = replicas
    assert not two.has(DIGEST)
    upload(one, CONTENT)
    assert two.has(DIGEST)
    assert two.size(DIGEST) == len(CONTENT)
    assert two.read(DIGEST) == CONTENT
    before = len(bucket.requests)
    assert two.read(DIGEST) == one.read(DIGEST) == CONTENT
    assert len(bucket.requests) == before
    assert list(two.blobs()) == [DIGEST]
    assert list(two.blobs(3600)) == []
    one.remove_blob(DIGEST)
    assert not two.has(DIGEST)


def test_names_owners_and_deletions_hold_at_the_other(replicas):
    one, two = replicas
    owners, others = Owners(one), Owners(two)
    with one.changing():
        owners.add_objective("a", D, shared=False, name="a/mlp")
        one.add_objective(D, "a/mlp", owned=True)
    assert others.find("a", "mlp")[:2] == ("a/mlp", D)
    assert others.listing("b") == []
    with two.changing():
        two.add_objective(E, "a/mlp")
    assert owners.find("a", "a/mlp")[1] == E
    one.remove_name("a/mlp")
    one.remove_objective(D)
    owners.remove_objective("a", D)
    assert [digest for _, digest, _ in others.listing("")] == [E]


def test_a_quarantine_holds_at_the_other_after_it_has_looked(replicas):
    one, two = (Quarantine(store.objects, 1) for store in replicas)
    replicas[1].watch(two.load)
    one.strike(D, "it did this")
    replicas[1].sync()
    with pytest.raises(ServiceError, match="it did this"):
        two.check(D)


def test_uploads_at_the_other_count(replicas, upload):
    owners = [Owners(store, lambda tenant: 150_000) for store in replicas]
    with owners[0].adding_blob("a", DIGEST, len(CONTENT)):
        upload(replicas[0], CONTENT)
    with pytest.raises(ServiceError) as full, owners[1].adding_blob("a", E, 60_000):
        pass
    assert full.value.reason == "TENANT_STORAGE"


def test_only_one_of_many_creates_a_file(bucket, tmp_path, start):
    servers = [ObjectStore(bucket.url, tmp_path / str(number), 1 << 30) for number in range(6)]
    together = threading.Barrier(6)

    def create(number):
        together.wait(10)
        return servers[number].replace("names/a", str(number).encode(), None)

    won = [future.result(30) for future in [start(create, number) for number in range(6)]]
    (winner,) = [number for number, tag in enumerate(won) if tag is not None]
    assert servers[0].read("names/a") == (str(winner).encode(), won[winner])
    assert servers[1].replace("names/a", b"later", won[winner]) is not None
    assert servers[2].replace("names/a", b"too late", won[winner]) is None


def test_changes_from_two_servers_at_once_are_all_kept(replicas, start):
    def change(number):
        for index in range(5):
            replicas[number].add_objective(f"{index:032x}{number:032x}", f"t{number}/n{index}")

    for future in [start(change, number) for number in range(2)]:
        future.result(120)
    for each in replicas:
        each.sync()
        assert len(each.objectives()) == 10


@pytest.mark.parametrize("fault", ["throttled", "broken", "torn"])
def test_a_fault_that_passes_is_not_noticed(replicas, upload, bucket, fault):
    one, two = replicas
    with bucket.failing(fault, times=2) as failed:
        upload(one, CONTENT)
    assert len(failed) == 2
    with bucket.failing(fault, times=1, method="GET") as failed:
        assert two.read(DIGEST) == CONTENT
    assert len(failed) == 1
    with bucket.failing(fault, times=2, method="PUT", path="names") as failed:
        one.add_objective(DIGEST, "n")
    assert len(failed) == 2
    two.sync()
    assert two.objective("n")[1] == DIGEST


@pytest.mark.parametrize(
    ("fault", "code", "reason", "said"),
    [
        ("throttled", Code.UNAVAILABLE, "STORE_AWAY", "asks for fewer requests"),
        ("broken", Code.UNAVAILABLE, "STORE_AWAY", "does not answer"),
        ("torn", Code.UNAVAILABLE, "STORE_AWAY", "does not answer"),
        ("expired", Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", "credentials are missing, wrong or expired"),
        ("denied", Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", "may not read or write it"),
    ],
)
def test_a_fault_that_stays_is_an_error_and_leaves_nothing(replicas, upload, bucket, fault, code, reason, said):
    one, two = replicas
    before = keys(bucket)
    with bucket.failing(fault, method="PUT", path="blobs"):
        with pytest.raises(ServiceError, match=said) as failed:
            upload(one, CONTENT)
        assert (failed.value.code, failed.value.reason) == (code, reason)
        assert str(bucket.environment["AWS_ENDPOINT_URL"]) not in str(failed.value)
    assert keys(bucket) == before
    assert not one.has(DIGEST)
    assert not list((one.root / "blobs").rglob(DIGEST))
    with bucket.failing(fault, method="PUT", path="names"), pytest.raises(ServiceError, match=said):
        one.add_objective(D, "n")
    two.sync()
    with pytest.raises(ServiceError, match="no objective of name"):
        two.objective("n")
    with bucket.failing(fault):
        for ask in (lambda: two.read(D), two.sync, lambda: two.has(D), lambda: list(two.blobs())):
            with pytest.raises(ServiceError, match=said):
                ask()
    upload(one, CONTENT)
    one.add_objective(D, "n")
    two.sync()
    assert two.objective("n")[1] == D


def test_a_listing_that_fails_forgets_nothing(replicas, bucket):
    one, two = replicas
    one.add_objective(D, "n")
    two.sync()
    one.add_objective(E, "m")
    with bucket.failing("broken", method="GET"), pytest.raises(ServiceError):
        two.sync()
    assert two.objective("n")[1] == D
    two.sync()
    assert two.objective("m")[1] == E


def test_the_bytes_of_a_blob_are_verified(replicas, upload, bucket):
    one, two = replicas
    upload(one, CONTENT)
    raw(bucket).put_object(Bucket=BUCKET, Key=f"prefix/{blob_key(DIGEST)}", Body=CONTENT[:-1])
    with pytest.raises(ServiceError, match="set aside") as corrupt:
        two.read(DIGEST)
    assert corrupt.value.reason == "BLOB_CORRUPT"
    assert not two.has(DIGEST)
    assert [key for key in keys(bucket) if key.startswith(f"corrupt/{DIGEST}")]
    assert one.read(DIGEST) == CONTENT  # From its copy.
    upload(one, CONTENT)
    (copy,) = (one.root / "blobs").rglob(DIGEST)
    copy.write_bytes(b"damaged")
    assert one.read(DIGEST) == two.read(DIGEST) == CONTENT


def test_copies_that_were_not_used_for_longest_go_first(bucket, upload, tmp_path):
    store = Store(ObjectStore(bucket.url, tmp_path / "small", 250_000))
    contents = [bytes([number]) * 100_000 for number in range(4)]
    for number, content in enumerate(contents[:2]):
        os.utime(store.objects.fetch(blob_key(upload(store, content))), (number + 1, number + 1))
    store.read(codec.digest(contents[0]))
    upload(store, contents[2])
    kept = {path.name for path in (store.root / "blobs").rglob("*") if path.is_file()}
    assert kept == {codec.digest(contents[0]), codec.digest(contents[2])}
    assert store.read(codec.digest(contents[1])) == contents[1]
    store.close()


def test_a_lock_of_a_server_that_is_gone_is_taken_over(replicas, monkeypatch, start):
    one, two = replicas
    monkeypatch.setattr(lease, "SECONDS", 0.3)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.0)
    holding = one.changing()
    holding.__enter__()
    try:
        start(two.add_objective, D, "n").result(30)
        with pytest.raises(ServiceError) as lost:
            one.keep("names/x", {})
        assert lost.value.reason == "STORE_BUSY"
    finally:
        holding.__exit__(None, None, None)
    one.sync()
    assert one.objective("n")[1] == D


def test_a_write_ends_before_another_server_takes_the_lease(replicas, bucket, monkeypatch, tmp_path, start):
    """The writer's store does not answer, and its lease is not renewed meanwhile."""
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    monkeypatch.setattr(object_store, "_WRITES", object_store._Patience(0.5, 0.2, 0.1))
    one, two = ObjectStore(bucket.url, tmp_path / "slow", 1 << 30), replicas[1]
    ended = threading.Event()

    def write():
        with one.locked():
            try:
                one.put("names/late", b"{}")
            except ServiceError as error:
                return error.reason
            finally:
                ended.set()

    with bucket.failing("silent", method="PUT", path="late") as waiting:
        writing = start(write)
        until(lambda: waiting)
        with two.changing():
            assert ended.is_set()
    assert writing.result(30) == "STORE_AWAY"


def test_the_limits_of_writes_fit_into_the_lease():
    assert object_store._WRITES.most <= lease.WRITE_SECONDS
    # A write may ask for credentials first.
    assert lease._RENEW_SECONDS <= lease._BEGIN_SECONDS < lease.SECONDS - 2 * lease.WRITE_SECONDS


def test_a_renewal_that_takes_too_long_ends_the_change(replicas, monkeypatch):
    one, two = replicas
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.0)
    with pytest.raises(ServiceError) as slow, one.changing():
        monkeypatch.setattr(lease, "_BEGIN_SECONDS", 0.0)
        one.keep("names/x", {})
    assert slow.value.reason == "STORE_AWAY"
    assert one.objects.get("names/x") is None
    monkeypatch.undo()
    two.add_objective(D, "n")  # The lease is free.


def test_a_lock_that_is_renewed_is_not_taken(replicas, monkeypatch, start):
    one, two = replicas
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.0)
    monkeypatch.setattr(lease, "SECONDS", 1.0)
    monkeypatch.setattr(exclusion, "SECONDS", 0.5)
    with one.changing():
        other = start(two.add_objective, D, "n")
        while not other.done():
            one.keep("derived/x", {})
    with pytest.raises(ServiceError) as busy:
        other.result(10)
    assert busy.value.reason == "STORE_BUSY"


def test_threads_that_read_one_blob_share_a_download(replicas, upload, bucket, start, monkeypatch):
    upload(replicas[0], CONTENT)
    bucket.requests.clear()
    missed = []

    def utime(path, utime=os.utime):
        try:
            utime(path)
        except FileNotFoundError:
            missed.append(path)
            raise

    monkeypatch.setattr(os, "utime", utime)
    with bucket.failing("silent", method="GET", path=DIGEST) as waiting:
        first = start(replicas[1].read, DIGEST)
        until(lambda: waiting)
        others = [start(replicas[1].read, DIGEST) for _ in range(4)]
        until(lambda: len(missed) == 5)  # None of them has found a copy.
    assert [each.result(30) for each in [first, *others]] == [CONTENT] * 5
    assert len([each for each in bucket.requests if each.startswith("GET") and DIGEST in each]) == 1


@pytest.mark.parametrize(
    ("url", "fault", "said"),
    [
        ("s3://missing/prefix", None, "its bucket does not exist"),
        ("s3://bucket/prefix", "denied", "may not read or write it"),
        ("s3://bucket/prefix", "expired", "credentials"),
    ],
)
def test_a_store_that_cannot_be_used_is_an_error_at_the_start(bucket, tmp_path, url, fault, said):
    with bucket.failing(fault, method="PUT", times=10**9 if fault else 0), pytest.raises(ServiceError, match=said):
        Store(ObjectStore(url, tmp_path / "local", 1 << 30))
    assert keys(bucket) == set()


def test_check_config_tries_the_store_and_leaves_nothing(bucket, tmp_path):
    settings = {"store_cache": tmp_path, "port": 0, "vector_port": "off"}
    assert list(config_check.problems(Config(store=bucket.url, **settings))) == []
    assert keys(bucket) == set()
    (missing,) = config_check.problems(Config(store="s3://missing/prefix", **settings))
    assert "its bucket does not exist" in missing
    with bucket.failing("denied", method="PUT"):
        (denied,) = config_check.problems(Config(store=bucket.url, **settings))
    assert "may not read or write it" in denied
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_copied_whole_and_again(bucket, replicas, upload, tmp_path):
    source = Store(tmp_path / "source")
    owners = Owners(source)
    with owners.adding_blob("a", DIGEST, len(CONTENT)):
        upload(source, CONTENT)
    with source.changing():
        owners.add_objective("a", DIGEST, shared=False, name="a/mlp")
        source.add_objective(DIGEST, "a/mlp", owned=True)
    Quarantine(source.objects, 1).strike(E, "it did this")
    with bucket.failing("denied", method="PUT", path="blobs"), pytest.raises(ServiceError, match="may not"):
        copy(source.objects, ObjectStore(bucket.url, tmp_path / "copying", 1 << 30))
    replicas[0].sync()
    assert replicas[0].objectives() == []
    first = copy(source.objects, ObjectStore(bucket.url, tmp_path / "copying", 1 << 30))
    assert (first.blobs, first.blob_bytes, first.present) == (1, len(CONTENT), 0)
    for where in (source.objects, Directory(tmp_path / "back")):
        again = copy(replicas[1].objects, where)
        assert (again.blobs, again.present) == ((0, 1) if where is source.objects else (1, 0))
    for store in (replicas[0], Store(tmp_path / "back")):
        store.sync()
        known = Owners(store)
        assert known.find("a", "mlp")[:2] == ("a/mlp", DIGEST)
        assert known.listing("b") == []
        assert known.has_blob("a", DIGEST)
        assert store.read(DIGEST) == CONTENT
        with pytest.raises(ServiceError, match="it did this"):
            Quarantine(store.objects, 1).check(E)
    with pytest.raises(ServiceError, match="no store of hvpd"):
        copy(Directory(tmp_path / "nothing"), source.objects)
    next((source.root / "blobs").rglob(DIGEST)).write_bytes(b"damaged")
    with pytest.raises(ServiceError, match="is damaged, and was not copied"):
        copy(source.objects, Directory(tmp_path / "new"))


def test_a_store_is_verified_where_it_is(bucket, replicas, upload, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    verify = ["store", "verify", "--store", bucket.url]
    one = replicas[0]
    digest = upload(one, objective_pb2.Bundle().SerializeToString())
    one.add_objective(digest, "n")
    upload(one, CONTENT)
    assert main.main(verify) == 0
    assert capsys.readouterr().out.startswith("1 objectives, 1 names, 2 blobs ")
    raw(bucket).put_object(Bucket=BUCKET, Key=f"prefix/{blob_key(DIGEST)}", Body=CONTENT[:-1])
    raw(bucket).delete_object(Bucket=BUCKET, Key=f"prefix/{blob_key(digest)}")
    before = keys(bucket)
    assert main.main(verify) == 1
    said = capsys.readouterr().out
    assert f"{blob_key(DIGEST)} is damaged" in said
    assert f"objective {digest} 'n': its blob {digest} is missing" in said
    assert keys(bucket) == before
    with bucket.failing("denied"):
        assert main.main(verify) == 1
    assert "may not read or write it" in capsys.readouterr().err
    assert main.main([*verify[:-1], "s3://bucket/other"]) == 1
    assert "s3://bucket/other is no store of hvpd" in capsys.readouterr().err


def test_azure_and_google_take_the_urls_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    found = ObjectStore("az://container/some/prefix", tmp_path, 1 << 30)._store
    assert (found.config["container_name"], found.prefix) == ("container", "some/prefix")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(ServiceError, match="Account must be specified"):
        ObjectStore("az://container/some/prefix", tmp_path, 1 << 30)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    found = ObjectStore("gs://bucket/some/prefix", tmp_path, 1 << 30)._store
    assert (found.config["bucket"], found.prefix) == ("bucket", "some/prefix")


class Generations:
    """An application of WSGI that is Google's, as far as single files go."""

    def __init__(self):
        self.files = {}
        self.latest = 0

    def __call__(self, environ, respond):
        path, found = environ["PATH_INFO"], self.files.get(environ["PATH_INFO"])
        status, content, headers = "200 OK", b"", []
        if environ["REQUEST_METHOD"] == "PUT":
            content = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            wanted = environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH")
            if wanted not in (None, str(found[0] if found else 0)):
                status, found = "412 Precondition Failed", None
            else:
                self.latest += 1
                found = self.files[path] = (self.latest, content)
        elif found is None:
            status = "404 Not Found"
        if found:
            headers = [("x-goog-generation", str(found[0])), ("ETag", '"e"')]
            headers += [("Last-Modified", "Mon, 30 Nov 2026 12:00:00 GMT")]
            content = found[1]
        respond(status, [*headers, ("Content-Length", str(len(content)))])
        return [content]


def test_conditional_writes_to_google_are_on_generations(server, tmp_path, monkeypatch):
    account = tmp_path / "account.json"
    url = server.environment["AWS_ENDPOINT_URL"]
    keys = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    account.write_text(json.dumps({"gcs_base_url": url, "disable_oauth": True, **keys}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setattr(server, "_app", Generations())
    store = ObjectStore(f"gs://{BUCKET}/prefix", tmp_path, 1 << 30)
    first = store.replace("names/a", b"1", None)
    assert store.replace("names/a", b"2", None) is None
    second = store.replace("names/a", b"3", first)
    assert second not in (None, first)
    assert store.replace("names/a", b"4", first) is None
    assert store.read("names/a") == (b"3", second)


KILLED = """
import os, pathlib, signal, sys
from hvpd_server.store.copy import copy
from hvpd_server.store.object_store import ObjectStore
from hvpd_server.store.objects import Directory
from hvpd_server.store.store import Store

store = Store(ObjectStore(sys.argv[1], pathlib.Path(sys.argv[2]), 1 << 30))
print("open", flush=True)
sys.stdin.readline()
content = bytes(32 << 20)
from hvpd._wire import codec
with store.upload(codec.digest(content), len(content)) as uploading:
    uploading.append(0, content)
    uploading.commit()
store.add_objective("ab" * 32, "n")
"""


@pytest.mark.parametrize("at", ["blobs", "objectives", "names", "changed"])
def test_a_server_that_is_killed_in_a_write_leaves_the_old_or_the_new(bucket, tmp_path, at, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, bucket.url, tmp_path / "local"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "open\n"
        opened = keys(bucket)
        with bucket.failing("torn", method="PUT", path=at) as failed:
            child.stdin.write("\n")
            child.stdin.flush()
            while not failed:
                assert child.poll() is None
            os.kill(child.pid, signal.SIGKILL)
            child.wait(30)
    finally:
        child.kill()
        child.communicate()
    digest = codec.digest(bytes(32 << 20))
    assert (blob_key(digest) in keys(bucket)) is (at != "blobs")
    if at in ("blobs", "objectives"):
        assert {key for key in keys(bucket) - opened if not key.startswith("blobs")} == set()
    store = Store(ObjectStore(bucket.url, tmp_path / "other", 1 << 30))
    found = [(name, digest) for name, digest, _ in store.objectives()]
    assert found == {"names": [("", D)], "changed": [("n", D)]}.get(at, [])
    store.add_objective(E, "n")
    assert store.objective("n")[1] == E
    store.close()
