"""The server's texts when its machine fails, and texts that clients chose: they show no
path, no control character and no name of another site.
"""

import errno
import http.client
import json
import os
import re
import resource
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd import _text
from hvpd._wire import codec
from hvpd_server.errors import Code, ServiceError, to_service_error
from hvpd_server.status_page import http_server
from hvpd_server.store.store import Store
from tests.support.objectives import quartic
from tests.support.threads import no_threads

N = 20
X = np.linspace(0.5, 1.5, N)


def another(number):
    return lambda x: number * jnp.sum(x**3)


@pytest.fixture
def served(serve):
    """Yield a server, and a client with an operator whose first product is made."""
    server = serve()
    with hvpd.connect(server.address, retry_timeout=0.5) as client:
        H = client.register(quartic, X, name="quartic").at(X).hessian()
        np.testing.assert_allclose(H @ np.ones(N), X**2)
        yield server, client, H


def tells_no_path(server, error):
    said = str(error)
    assert str(server.store) not in said
    assert not re.search(r"(?<!\w)/\w+/", said), said


def reason_of(server, call):
    """Return the reason for which a call fails; "answered" if it does not."""
    try:
        call()
    except hvpd.HvpdError as error:
        tells_no_path(server, error)
        return error.reason
    return "answered"


# An operating system that refuses


def test_without_descriptors_a_request_is_told_so_and_the_server_goes_on(served):
    server, client, H = served
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # No number below the limit is free: the next file cannot be opened.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        for number in range(3):
            with pytest.raises(hvpd.OverloadedError) as error:
                client.register(another(number), X)
            assert error.value.reason == "DESCRIPTORS", error.value
            tells_no_path(server, error.value)
            # XLA opens a file in each thread that computes for the first time.
            assert reason_of(server, lambda: H @ np.ones(N)) in ("answered", "DESCRIPTORS")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    np.testing.assert_allclose(H @ np.ones(N), X**2)
    np.testing.assert_allclose(client.register(another(1), X).at(X).hessian() @ np.ones(N), 6 * X)


def test_a_store_that_was_deleted_is_told_and_products_go_on(served):
    server, client, H = served
    while server.store.exists():  # The server may just write there.
        shutil.rmtree(server.store, ignore_errors=True)
    for call in (
        lambda: client.register(another(2), X),
        lambda: client.register(quartic, X + 1, name="again"),
    ):
        with pytest.raises(hvpd.HvpdError) as error:
            call()
        assert error.value.reason == "STORE_UNAVAILABLE", error.value
        tells_no_path(server, error.value)
        np.testing.assert_allclose(H @ np.ones(N), X**2)
    for call in (
        client.objectives,
        client.usage,
        lambda: client.objective("quartic"),
        lambda: client.delete("quartic"),
    ):
        assert reason_of(server, call) not in ("", "INTERNAL")
    assert any("STORE_UNAVAILABLE" in line and str(server.store) in line for line in server.lines)
    assert server.process.poll() is None


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EMFILE, "DESCRIPTORS"), (errno.ENOMEM, "HOST_MEMORY"), (errno.EIO, "BLOB_CORRUPT")]
)
def test_a_blob_that_cannot_be_opened_now_is_not_damaged(request, tmp_path, monkeypatch, number, reason):
    """Otherwise a client would send the blob again."""
    store, digest = Store(tmp_path), codec.digest(b"content")
    request.addfinalizer(store.close)
    with store.upload(digest, 7) as upload:
        upload.append(0, b"content")
        upload.commit()

    def refuse(path, *args, **settings):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    for read in (store.read, store.verify):
        with pytest.raises(ServiceError) as error:
            read(digest)
        assert error.value.reason == reason
        assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_no_error_of_the_system_shows_a_path(number):
    path = "/srv/hvpd/store/blobs/ab/abcd"
    for error in (OSError(number, os.strerror(number), path), OSError(number, os.strerror(number), path, None, path)):
        said = to_service_error(error)
        assert "/srv" not in str(said)
        assert os.strerror(number) in str(said)


@pytest.mark.parametrize(
    ("number", "code", "reason", "retries"),
    [
        (errno.ENOSPC, Code.RESOURCE_EXHAUSTED, "DISK_FULL", False),
        (errno.EMFILE, Code.RESOURCE_EXHAUSTED, "DESCRIPTORS", True),
        (errno.ENFILE, Code.RESOURCE_EXHAUSTED, "DESCRIPTORS", True),
        (errno.ENOMEM, Code.RESOURCE_EXHAUSTED, "HOST_MEMORY", True),
        (errno.EAGAIN, Code.RESOURCE_EXHAUSTED, "HOST_MEMORY", True),
        (errno.EIO, Code.DATA_LOSS, "STORE_DAMAGED", False),
        (errno.ENOENT, Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", False),
        (errno.EACCES, Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", False),
        (errno.EROFS, Code.FAILED_PRECONDITION, "STORE_UNAVAILABLE", False),
    ],
)
def test_each_kind_of_error_of_the_system_has_its_reason(number, code, reason, retries):
    said = to_service_error(OSError(number, os.strerror(number), "/srv/store/x"))
    assert (said.code, said.reason, said.retry_after is not None) == (code, reason, retries)


def test_a_system_without_a_further_thread_has_its_reason():
    with no_threads(), pytest.raises(RuntimeError) as error:
        threading.Thread().start()
    said = to_service_error(error.value)
    assert (said.code, said.reason, said.retry_after) == (Code.RESOURCE_EXHAUSTED, "HOST_MEMORY", 1.0)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("cannot open /srv/store/blobs/x", "cannot open [a path of the server]"),
        ("No such file: '/home/me/.venv/lib/x.so': gone", "No such file: '[a path of the server]': gone"),
        ("in jit(f)/jit(main)/add of hvpd.v1.Service/Method", "in jit(f)/jit(main)/add of hvpd.v1.Service/Method"),
        ("1 / 2 and a/b", "1 / 2 and a/b"),
    ],
)
def test_an_unexpected_error_shows_no_path(message, said):
    assert str(to_service_error(RuntimeError(message))) == f"RuntimeError: {said}"


# Texts that other users chose

STEERING = [
    "\u202e",
    "\u2066",
    "\u200b",
    "\u2028",
    "\x1b[31m",
    "\x00",
    "\x07",
    "\r",
    "\x7f",
    "\x9b",
    "\ud800",
    "\ufeff",
]


@pytest.mark.parametrize("text", STEERING)
def test_a_text_shows_control_characters_escaped(text):
    shown = _text.printable(f"a{text}b")
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert _text.printable(shown) == shown
    assert str(ServiceError(Code.NOT_FOUND, "X", f"a{text}b")).isprintable()
    assert str(hvpd.HvpdError(f"a{text}b")).isprintable()


def test_a_text_that_steers_nothing_stays_as_it_is():
    for text in ("größe", "κ²", "名前", "a\\b", ""):
        assert _text.printable(text) == text
    assert _text.printable("a\nb\u202e", keep="\n") == "a\nb\\u202e"


def test_names_that_clients_ask_for_reach_neither_page_nor_log_as_they_are(serve):
    server = serve()
    evil = "evil\u202egnp.exe\x1b[2J"
    with hvpd.connect(server.address) as client:
        for call in (client.objective, client.delete):
            with pytest.raises(hvpd.HvpdError) as error:
                call(evil)
            assert str(error.value).isprintable()
    said = next(line for line in reversed(server.lines) if "hvpd: metrics on " in line)
    host = said.split(" on ")[1].split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("GET", "/status.json")
    content = json.loads(connection.getresponse().read())
    connection.close()
    assert any("gnp.exe" in failure["message"] for failure in content["failures"])

    def texts(found):
        if isinstance(found, str):
            yield found
        for each in found.items() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ():
            yield from texts(each)

    assert all(text.isprintable() for text in texts(content))
    assert all(line.replace("\t", "").isprintable() for line in server.lines)


# Names of other sites


@pytest.mark.parametrize(
    "host",
    [
        *(
            "[::1]evil.com",
            "[::1]evil.com:80",
            "[::1].evil.com",
            "[::1",
            "::1]",
            "[[::1]]",
            "[]",
            "[127.0.0.1]",
            "[localhost]",
        ),
        *("127.0.0.1evil.com", "127.0.0.1 evil.com", "127.0.0.1@evil.com", "evil.com@127.0.0.1", "localhost,evil.com"),
        *(
            "localhost:80:80",
            "localhost:99999",
            "localhost:8a",
            "localhost:-1",
            "localhost:+1",
            "localhost..",
            "localhost/evil",
        ),
        *(
            "::1",
            "[::1%25eth0]",
            "[::1%eth0]",
            "127.1",
            "0x7f000001",
            "2130706433",
            "127.0.0.1..",
            "localhost\t.evil.com",
        ),
        *(
            "\u0661\u0662\u0667.0.0.1",
            "localhost:\u0668\u0660",
            "\uff4cocalhost",
            "local\u200bhost",
            ".localhost",
            "box.evil.com",
        ),
    ],
)
def test_a_host_that_only_looks_like_this_machine_is_not(host):
    assert not http_server._is_local(host, "box")


@pytest.mark.parametrize(
    "host",
    [
        *(
            "localhost",
            "LOCALHOST:9464",
            "localhost.",
            "localhost:",
            " localhost ",
            "127.0.0.1",
            "127.0.0.1:1",
            "10.1.2.3:80",
        ),
        *("[::1]", "[::1]:9464", "[2001:DB8::1]:80", "[::ffff:127.0.0.1]", "box", "Box:80", "box."),
    ],
)
def test_a_host_that_is_this_machine_is_answered_to(host):
    assert http_server._is_local(host, "box")


def test_the_server_refuses_the_name_of_another_site(serve):
    server = serve()
    said = next(line for line in reversed(server.lines) if "hvpd: metrics on " in line)
    address = said.split(" on ")[1].split("/")[2]
    for host, status in (("[::1]evil.com", 421), ("localhost", 200)):
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.request("GET", "/metrics", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()
    assert Path(server.store).is_dir()
