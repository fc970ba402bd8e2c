"""Client and server speak only to each other's certificates, which may be renewed."""

import contextlib
import datetime
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import trustme

import hvpd
from hvpd._cli.main import main
from hvpd._transport import channel as _channel
from tests.support.security import N, Place, connect, product
from tests.support.waiting import until


@pytest.fixture(scope="module")
def mutual(serve_module, tmp_path_factory):
    """Yield a server with TLS that asks for certificates of clients, of the CAs in
    clients.pem.
    """
    place = Place(tmp_path_factory.mktemp("mutual"))
    clients = place.write("clients.pem", place.ca.cert_pem.bytes())
    server = serve_module(*place.flags, "--tls-client-ca", str(clients))
    return place, server


def test_tls_on_one_side_only_is_a_quick_clear_error(place, secured, server):
    assert _channel._PATIENCE == 0.5
    began = time.monotonic()
    with pytest.raises(
        hvpd.UnavailableError, match=r"the server speaks TLS and this client does not.*tls=True"
    ) as error:
        hvpd.connect(secured.address, connect_timeout=60)
    assert error.value.reason == "TLS"
    with pytest.raises(hvpd.UnavailableError, match=r"this client speaks TLS and the server does not") as error:
        connect(place, server)
    assert error.value.reason == "TLS"
    assert time.monotonic() - began < 20


def test_a_server_of_another_ca_or_another_name_is_not_talked_to(place, secured, publisher, tmp_path):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    began = time.monotonic()
    for settings in ({"ca": tmp_path / "other.pem"}, {"tls": True}):
        with pytest.raises(
            hvpd.UnavailableError, match=r"the server's certificate is not accepted: .*certificate"
        ) as error:
            hvpd.connect(secured.address, token=publisher, connect_timeout=60, **settings)
        assert publisher not in str(error.value)
    with pytest.raises(hvpd.UnavailableError, match=r"certificate is not accepted: Hostname mismatch"):
        hvpd.connect(f"localhost:{secured.port}", token=publisher, ca=place.trust, connect_timeout=60)
    assert time.monotonic() - began < 30


def test_doctor_and_a_metric_say_when_the_certificate_ends(place, secured, publisher, capsys):
    ends = ssl.cert_time_to_seconds(_decoded(place, secured)["notAfter"])
    assert main(["doctor", "--address", secured.address, "--ca", str(place.trust), "--token", publisher]) == 0
    date = datetime.datetime.fromtimestamp(ends, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    assert f"ok    TLS          certificate for 127.0.0.1, until {date}\n" in capsys.readouterr().out
    assert secured.metric("hvpd_certificate_expiry_timestamp_seconds") == ends


def _decoded(place, server):
    context = ssl.create_default_context(cadata=place.ca.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", server.port), 30) as plain:
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            return secure.getpeercert()


@pytest.mark.parametrize("verbosity", [None, "ERROR"])
def test_handshakes_of_strangers_write_no_line(serve, place, verbosity):
    chosen = {} if verbosity is None else {"GRPC_VERBOSITY": verbosity}
    server = serve(*place.flags, supervised=True, forked=False, environment=chosen)
    before = len(server.lines)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    for name in ("no-such-name.example", "other.example"):
        with socket.create_connection(("127.0.0.1", server.port), 30) as plain:
            with context.wrap_socket(plain, server_hostname=name) as secure:
                assert secure.recv(1)
    with socket.create_connection(("127.0.0.1", server.port), 30) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert not plain.recv(1 << 16)[4096:]
    assert server.terminate() == 0
    lines = [line for line in server.lines[before:] if not line.startswith("hvpd: stop")]
    assert ("No match found for server name" in "\n".join(lines)) is (verbosity is not None)
    assert (lines == []) is (verbosity is None)


def test_a_server_that_asks_for_certificates_takes_those_of_its_ca_only(mutual):
    place, server = mutual
    with connect(place, server, **place.personal("member")) as client:
        assert client.register(lambda x: jnp.sum(x**2), np.ones(2), name="square").at(np.ones(2)).value == 2
    began = time.monotonic()
    with pytest.raises(hvpd.UnavailableError, match=r"asks for this client's certificate.*cert=FILE") as error:
        connect(place, server)
    assert error.value.reason == "TLS"
    with pytest.raises(hvpd.UnavailableError, match=r"does not accept this client's certificate"):
        connect(place, server, **place.personal("stranger", trustme.CA()))
    with pytest.raises(hvpd.UnavailableError, match=r"the server speaks TLS"):
        hvpd.connect(server.address, connect_timeout=60)
    assert time.monotonic() - began < 30


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_certificate_of_the_page_is_good_for_its_names(tmp_path):
    page = (Path(__file__).parents[3] / "docs/operate/access.md").read_text()
    (commands,) = re.findall(r"^```sh\n(openssl.*?)^```", page, re.MULTILINE | re.DOTALL)
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    for name in ("gpu-box", "localhost"):
        shake_hands(serving, trusting, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(serving, trusting, "other-box")


def shake_hands(serving, trusting, name):
    """Connect two sides in memory."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = serving.wrap_bio(there, back, server_side=True), trusting.wrap_bio(back, there, server_hostname=name)
    for _ in range(4):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert sides[1].cipher()


def greeting(place, server, personal):
    """Return a function that connects with a client's certificate, and perhaps an
    earlier TLS session. It returns the server's first bytes and the new session. There
    are no bytes if the server refuses the certificate.
    """
    context = ssl.create_default_context(cadata=place.ca.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(personal["cert"], personal["key"])

    def greeted(session=None):
        try:
            with (
                socket.create_connection(("127.0.0.1", server.port), 30) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as secure,
            ):
                return secure.recv(9), secure.session
        except (ssl.SSLError, ConnectionError):
            return b"", None

    return greeted


def test_an_expired_certificate_opens_no_connection_and_open_ones_stay(mutual):
    """An earlier TLS session of the certificate opens none, either."""
    place, server = mutual
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    personal = place.personal("brief", not_after=soon)
    greeted = greeting(place, server, personal)
    said, session = greeted()
    assert said
    with connect(place, server, **personal) as client:
        client.register(lambda x: jnp.sum(x**4) / 12, np.ones(N), name="quartic")
        product(client, "quartic")
        until(lambda: client.objectives() and not greeted()[0])
        assert datetime.datetime.now(datetime.UTC) >= soon - datetime.timedelta(seconds=1)  # X.509 has whole seconds.
        assert greeted(session)[0] == b""
        with pytest.raises(hvpd.UnavailableError, match=r"does not accept this client's certificate"):
            connect(place, server, **personal)
        product(client, "quartic", 4.0)
        assert client.statistics().retries == 0


def test_a_certificate_of_a_removed_ca_opens_no_connection_and_open_ones_stay(mutual):
    place, server = mutual
    removed = trustme.CA()
    clients, before = place.root / "clients.pem", place.ca.cert_pem.bytes()
    place.write("clients.pem", before + removed.cert_pem.bytes())
    personal = place.personal("former", removed)
    with connect(place, server, **personal) as client:
        client.register(lambda x: jnp.sum(x**4) / 12, np.ones(N), name="quartic")
        greeted = greeting(place, server, personal)
        said, session = greeted()
        assert said
        place.write(clients.name, before)
        for old in (None, session):
            assert greeted(old)[0] == b""
        with pytest.raises(hvpd.UnavailableError, match=r"does not accept this client's certificate"):
            connect(place, server, **personal)
        product(client, "quartic")
        assert client.statistics().retries == 0


def test_a_certificate_and_its_key_may_be_in_one_file(mutual):
    place, server = mutual
    cert, key = place.personal("whole").values()
    for number, parts in enumerate([(cert, key), (key, cert)]):
        file = place.write(f"whole{number}.pem", b"".join(part.read_bytes() for part in parts))
        with connect(place, server, cert=file, key=file) as client:
            assert client.usage()


SOLVE = """
import sys, time
import numpy as np
import hvpd

with hvpd.connect(sys.argv[1], tls=True, connect_timeout=60) as client:
    client._transport._vectors.unix = False
    H = client.objective(sys.argv[2]).at(np.full(5, 3.0)).hessian()
    np.testing.assert_allclose(H @ np.ones(5), 9 * np.ones(5))
    while client._transport._vectors._opening:
        time.sleep(0.01)
    print(client._transport._vectors.ready)
"""


@pytest.mark.parametrize("trusts", [True, False])
def test_without_ca_grpc_and_the_vector_port_trust_their_own(place, secured, publisher, quartic, tmp_path, trusts):
    """The vector port trusts the system's CAs, which OpenSSL's variable replaces here.
    Without them, products go over gRPC.
    """
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HVPD_")},
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(place.trust),
        "SSL_CERT_FILE": str(place.trust if trusts else tmp_path / "other.pem"),
        "SSL_CERT_DIR": str(tmp_path / "none"),
        "HVPD_TOKEN": publisher,
    }
    done = subprocess.run(
        [sys.executable, "-c", SOLVE, secured.address, quartic],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"{trusts}\n", "")


def test_certificates_change_under_a_running_solve_which_loses_nothing(place, secured, publisher, quartic):
    stop, wrong = threading.Event(), []

    def solve(client):
        H = client.objective(quartic).at(np.full(N, 2.0)).hessian()
        while not stop.is_set():
            if not np.array_equal(H @ np.arange(N), 4.0 * np.arange(N)):
                wrong.append(1)

    with connect(place, secured, publisher) as client:
        thread = threading.Thread(target=solve, args=(client,))
        thread.start()
        try:
            for _ in range(3):
                renewed = place.certify()
                assert place.shown(secured) == renewed
                with connect(place, secured, publisher) as newcomer:
                    product(newcomer, quartic)
        finally:
            stop.set()
            thread.join(30)
        assert not thread.is_alive()
        assert not wrong
        assert client.statistics().products > 0
        assert client.statistics().retries == 0


@pytest.mark.parametrize(
    ("name", "content"), [("server.pem", b"no certificate"), ("server.pem", None), ("server.key", b"")]
)
def test_a_broken_certificate_leaves_the_old_one(place, secured, name, content):
    known = place.certify()
    assert place.shown(secured) == known
    if content is None:  # None stands for the certificate of another key.
        content = place.ca.issue_cert("127.0.0.1").cert_chain_pems[0].bytes()
    lines = len(secured.lines)
    place.write(name, content)
    for _ in range(3):
        assert place.shown(secured) == known
    until(lambda: any("no PEM certificate and its unencrypted key" in line for line in secured.lines[lines:]))
    renewed = place.certify()
    assert place.shown(secured) == renewed
    assert sum("no PEM certificate and its" in line for line in secured.lines[lines:]) <= 2


def test_clients_must_trust_a_new_ca(place, secured, publisher, tmp_path):
    other = trustme.CA()
    other.cert_pem.write_to_path(tmp_path / "other.pem")
    try:
        place.certify(other)
        with pytest.raises(hvpd.UnavailableError, match="certificate is not accepted"):
            connect(place, secured, publisher)
        with connect(place, secured, publisher, ca=tmp_path / "other.pem") as client:
            assert client.objectives()
    finally:
        place.certify()
