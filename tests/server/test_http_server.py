"""The HTTP server answers its pages to the readers that they are for, and survives all
other input.
"""

import contextlib
import gzip
import http.client
import logging
import socket
import threading

import prometheus_client
import pytest
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics

from hvpd_server.status_page import http_server
from hvpd_server.status_page.http_server import Answer, HttpServer, metrics_page

WAIT = 30
TEXT = "text/plain; charset=utf-8"
PAGES = {
    "/": lambda request: Answer("text/html; charset=utf-8", b"<p>page</p>"),
    "/long": lambda request: Answer(TEXT, b"long " * 10_000),
    "/echo": lambda request: Answer(TEXT, request.query.encode()),
}


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:

        def opened(pages=PAGES, host="127.0.0.1"):
            web = HttpServer(host, 0, pages)
            web.start()
            stack.callback(web.close)
            return web

        yield opened


@pytest.fixture(scope="module")
def web():
    made = HttpServer("127.0.0.1", 0, PAGES)
    made.start()
    yield made
    made.close()


def ask(web, path="/", *, method="GET", host="127.0.0.1", **headers):
    connection = http.client.HTTPConnection(host, web.port, timeout=WAIT)
    with contextlib.closing(connection):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.body = response.read()
        return response


def send(web, content):
    """Send bytes and read until the other side closes."""
    with socket.create_connection(("127.0.0.1", web.port), timeout=WAIT) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        found = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                found += piece
        return found


# Answers


def test_a_page_is_answered_and_others_are_not_there(web):
    found = ask(web)
    assert (found.status, found.body, found.headers["Content-Type"]) == (
        200,
        b"<p>page</p>",
        "text/html; charset=utf-8",
    )
    assert found.headers["Content-Length"] == "11"
    for path in (
        "/nothing",
        "/metrics/",
        "/../etc/passwd",
        "/status/../",
        "/%2e%2e/",
        "/ECHO",
        "http://127.0.0.1/",
    ):
        assert ask(web, path).status == 404, path


def test_a_page_has_its_query_as_it_came(web):
    assert ask(web, "/echo?a=%3Cb%3E&c=d?e").body == b"a=%3Cb%3E&c=d?e"
    assert ask(web, "/echo").body == b""


def test_head_is_the_same_without_a_body(web):
    found = ask(web, method="HEAD")
    assert (found.status, found.body, found.headers["Content-Length"]) == (200, b"", "11")
    assert ask(web, "/nothing", method="HEAD").status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "JUNK", "get"])
def test_there_are_no_other_methods(method, web):
    found = ask(web, method=method)
    assert found.status == 405
    assert found.headers["Allow"] == "GET, HEAD"


def test_long_answers_are_compressed_if_the_client_accepts_it(web):
    found = ask(web, "/long", Accept_Encoding="br, gzip;q=0.8")
    assert found.headers["Content-Encoding"] == "gzip"
    assert int(found.headers["Content-Length"]) == len(found.body) < 5000
    assert gzip.decompress(found.body) == b"long " * 10_000
    assert ask(web, "/long", Accept_Encoding="identity").body == b"long " * 10_000
    assert ask(web, "/", Accept_Encoding="gzip").body == b"<p>page</p>"


@pytest.mark.parametrize("path", ["/", "/nothing", "/long"])
def test_every_answer_keeps_browsers_to_it(path, web):
    headers = ask(web, path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not [name for name in headers if name.startswith("Access-Control")]
    assert "Python" not in headers["Server"]


# The metrics


@pytest.fixture
def registry():
    made = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("things", "Things.", registry=made).inc(3)
    prometheus_client.Gauge("others", "Others.", registry=made).set(1)
    return made


@pytest.mark.parametrize(
    ("accept", "encode"),
    [
        ("*/*", exposition.generate_latest),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", openmetrics.generate_latest),
    ],
)
def test_metrics_are_in_the_format_that_is_asked_for(accept, encode, registry, opened):
    web = opened({"/metrics": metrics_page(registry)})
    found = ask(web, "/metrics", Accept=accept)
    assert found.status == 200
    assert found.body == encode(registry)
    assert found.headers["Content-Type"] == exposition.choose_encoder(accept)[1]
    zipped = ask(web, "/metrics", Accept=accept, Accept_Encoding="gzip")
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.body) == found.body
    head = ask(web, "/metrics", method="HEAD", Accept=accept)
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(found.body)))


def test_some_metrics_can_be_asked_for(registry, opened):
    found = ask(opened({"/metrics": metrics_page(registry)}), "/metrics?name[]=others")
    assert b"others 1.0" in found.body
    assert b"things" not in found.body


# Readers


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9464", "127.0.0.1:1", "[::1]:9464", "[::1]", "10.1.2.3:80", "localhost."]
)
def test_on_loopback_names_of_this_machine_are_answered_to(host, web):
    assert ask(web, Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example", "[evil]", "", "a:b:c"],
)
def test_a_foreign_name_that_points_here_is_refused(host, web):
    found = ask(web, Host=host)
    assert found.status == 421
    assert b"Host header" in found.body
    assert b"evil" not in found.body


def test_without_a_host_it_is_no_browser(web):
    assert send(web, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200 ")


def test_two_hosts_are_none(web):
    assert b" 400 " in send(web, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").splitlines()[0]


def test_a_public_server_accepts_any_host_name(opened):
    assert ask(opened(host="0.0.0.0"), Host="gpu-box.example:9464").status == 200


def test_it_answers_to_the_name_that_it_listens_at(opened, monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    web = opened(host="box")
    monkeypatch.undo()
    assert web.address == f"box:{web.port}"
    assert ask(web, Host="box:9464").status == 200
    assert ask(web, Host="other").status == 421


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_it_listens_on_ipv6(opened):
    try:
        web = opened(host="[::1]")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert web.address == f"[::1]:{web.port}"
    assert ask(web, host="::1").status == 200


# Hostile input


JUNK = {
    "nothing": b"",
    "bytes": bytes(range(256)) * 300,
    "zeros": bytes(100_000),
    "a line without end": b"GET /" + b"a" * 200_000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "gRPC": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x18\x04\x00",
    "one word": b"GET\r\n\r\n",
    "no version": b"GET /nothing\r\n\r\n",
    "four words": b"GET / HTTP/1.1 HTTP/1.1\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\n\r\n",
    "no number": b"GET / HTTP/1.x\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    "headers without end": b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    + b"".join(b"X-%d: y\r\n" % n for n in range(99)) * 90,
    "a body": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 5_000_000,
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_refused_and_nothing_is_said_of_it(kind, web, capfd, caplog, monkeypatch):
    monkeypatch.setattr(http_server, "_RECEIVE", 1.0)
    caplog.set_level(logging.INFO)
    answer = send(web, JUNK[kind]) if JUNK[kind] else None
    if answer:
        status = int(answer.split(b" ", 2)[1])
        assert status in (400, 404, 405, 414, 431, 505)
        assert b"<" not in answer.partition(b"\r\n\r\n")[2]
    with socket.create_connection(("127.0.0.1", web.port), timeout=WAIT) as connection:
        connection.sendall(JUNK[kind][:100])
    assert ask(web).status == 200
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_headers_that_are_too_large_are_told_so(web):
    assert send(web, JUNK["a long header"]).startswith(b"HTTP/1.0 431 ")
    assert send(web, JUNK["headers without end"]).startswith(b"HTTP/1.0 431 ")
    assert send(web, JUNK["a line without end"]).startswith((b"HTTP/1.0 431 ", b"HTTP/1.0 414 "))


def test_a_request_may_come_byte_by_byte(web):
    with socket.create_connection(("127.0.0.1", web.port), timeout=WAIT) as connection:
        for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n":
            connection.sendall(bytes([byte]))
        assert connection.recv(100).startswith(b"HTTP/1.0 200 ")


def test_an_unfinished_request_is_cut_off_although_bytes_still_come(opened, monkeypatch):
    monkeypatch.setattr(http_server, "_RECEIVE", 0.3)
    web = opened()
    with socket.create_connection(("127.0.0.1", web.port), timeout=WAIT) as silent:
        assert silent.recv(100) == b""
    with socket.create_connection(("127.0.0.1", web.port), timeout=0.02) as slow:
        ended = False
        while not ended:  # The suite's timeout ends a hanging test.
            try:
                slow.sendall(b"X")
                ended = slow.recv(100) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
    assert ask(web).status == 200


def test_a_client_that_does_not_read_the_answer_is_cut_off(opened, monkeypatch):
    monkeypatch.setattr(http_server, "_SEND", 0.2)
    monkeypatch.setattr(http_server, "_LINGER", 0.1)
    monkeypatch.setattr(http_server, "_CONNECTIONS", 1)
    monkeypatch.setattr(http_server, "_PATIENCE", WAIT)
    web = opened(PAGES | {"/endless": lambda request: Answer(TEXT, bytes(64 << 20))})
    with socket.create_connection(("127.0.0.1", web.port), timeout=WAIT) as connection:
        connection.sendall(b"GET /endless HTTP/1.0\r\n\r\n")
        assert ask(web).status == 200  # The endless request had the only place.


def test_too_many_connections_are_closed_and_the_others_are_served(opened, monkeypatch):
    monkeypatch.setattr(http_server, "_CONNECTIONS", 2)
    monkeypatch.setattr(http_server, "_PATIENCE", 0.05)
    web = opened()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", web.port), timeout=WAIT)) for _ in range(2)]
        assert send(web, b"") == b""  # The connection is closed, although it has not asked for anything.
        before = threading.active_count()
        assert send(web, b"GET / HTTP/1.0\r\n\r\n") == b""
        assert threading.active_count() <= before
        for connection in held:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.0 200 ")
    assert ask(web).status == 200


def test_a_thread_that_cannot_be_started_costs_no_place(opened, monkeypatch):
    monkeypatch.setattr(http_server, "_CONNECTIONS", 1)
    web = opened()
    with monkeypatch.context() as patched:

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        patched.setattr(threading.Thread, "start", refuse)
        assert send(web, b"GET / HTTP/1.0\r\n\r\n") == b""
    assert ask(web).status == 200


def test_a_page_that_fails_says_so_and_not_why(opened, caplog):
    def fail(request):
        raise {"a": KeyError("secret"), "v": ValueError("secret")}[request.query]

    web = opened({"/": fail})
    found = ask(web, "/?a")
    assert (found.status, b"secret" in found.body) == (500, False)
    assert "/ cannot be shown" in caplog.text
    assert ask(web, "/?v").status == 400
    assert ask(web, "/?v").status == 400


# Addresses


def test_a_port_that_is_taken_is_an_error(web):
    with pytest.raises(OSError, match="in use"):
        HttpServer("127.0.0.1", web.port, PAGES)


def test_a_host_that_is_none_is_an_error():
    with pytest.raises(OSError, match=r"."):
        HttpServer("no-such-host.invalid", 0, PAGES)


def test_it_ends_with_connections_open():
    web = HttpServer("127.0.0.1", 0, PAGES)
    web.start()
    with socket.create_connection(("127.0.0.1", web.port), timeout=WAIT):
        web.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", web.port), timeout=WAIT)
