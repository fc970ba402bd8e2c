"""The server's certificates in their files, without a server."""

import contextlib
import datetime
import itertools
import logging
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import trustme

from hvpd_server import config_check
from hvpd_server.config import Config
from hvpd_server.rpc.tls import Certificates, Files

WAIT = 30


@pytest.fixture(scope="module")
def ca():
    return trustme.CA()


@pytest.fixture
def issue(ca, tmp_path):
    """Return a function that makes a certificate and its key, as bytes."""

    def issue(**validity):
        leaf = ca.issue_cert("127.0.0.1", **validity)
        return leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()

    return issue


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "server.pem", tmp_path / "server.key")


def write(file, content):
    """Replace a file, so that its version differs from the one before."""
    scratch = file.with_suffix(".new")
    scratch.write_bytes(content)
    scratch.rename(file)


def shown_by_grpc(ca, certificates):
    """Return the certificate that a server of gRPC shows."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", certificates.credentials())
    server.start()
    context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(("127.0.0.1", port), WAIT) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True)).encode()
    finally:
        server.stop(None).wait(WAIT)


def test_a_certificate_and_its_key_may_be_in_one_file(ca, issue, tmp_path):
    made = issue()
    for number, parts in enumerate(itertools.permutations(made)):
        file = tmp_path / f"{number}.pem"
        file.write_bytes(b"".join(parts))
        assert shown_by_grpc(ca, Certificates(Files(file, file))).split() == made[0].split()


@pytest.mark.parametrize("first", [0, 1], ids=["certificate", "key"])
def test_new_files_are_used_once_they_fit_whichever_is_written_first(ca, issue, files, caplog, first):
    before, after = issue(), issue()
    both = files.cert, files.key
    for file, content in zip(both, before, strict=True):
        write(file, content)
    certificates = Certificates(files)
    write(both[first], after[first])
    with caplog.at_level(logging.ERROR):
        assert certificates.changed() is None
    assert "connections are shown the certificate that was read before" in caplog.text
    assert shown_by_grpc(ca, certificates).split() == before[0].split()
    write(both[1 - first], after[1 - first])
    assert shown_by_grpc(ca, certificates).split() == after[0].split()


def days(number):
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=number)


@pytest.fixture
def put(issue, files):
    """Return a function that writes a certificate of so many days, and its key."""

    def put(number):
        made = issue(not_before=days(-9), not_after=days(number))
        for file, content in zip((files.cert, files.key), made, strict=True):
            write(file, content)
        return made[0].split()

    return put


def test_an_expired_certificate_is_refused(files, put):
    put(-1)
    with pytest.raises(ValueError, match=rf"server.pem expired on {days(-1):%Y-%m-%d} .* UTC: renew it"):
        Certificates(files)
    config = Config(tls_cert=files.cert, tls_key=files.key, store=files.cert.parent / "store", port=0)
    assert [line for line in config_check.problems(config) if "expired on" in line]
    assert list(config_check.warnings(config)) == []


def test_an_expired_certificate_does_not_take_the_place_of_a_valid_one(ca, files, put, caplog):
    before = put(40)
    certificates = Certificates(files)
    put(-1)
    assert shown_by_grpc(ca, certificates).split() == before
    assert "expired on" in caplog.text
    after = put(50)
    assert shown_by_grpc(ca, certificates).split() == after
    assert certificates.expires == pytest.approx(days(50).timestamp(), abs=60)


@pytest.mark.parametrize(("number", "warns"), [(29, True), (31, False)])
def test_a_certificate_that_ends_soon_is_warned_of(files, put, caplog, number, warns):
    put(number)
    certificates = Certificates(files)
    certificates.warn()
    assert ("WARNING" in caplog.text) is warns
    assert (f"is valid until {days(number):%Y-%m-%d}" in caplog.text) is warns
    config = Config(tls_cert=files.cert, tls_key=files.key, store=files.cert.parent / "store", port=0)
    assert list(config_check.problems(config)) == []
    assert bool(list(config_check.warnings(config))) is warns


def test_with_a_ca_of_clients_each_handshake_has_new_keys_for_sessions(ca, issue, files, tmp_path):
    """gRPC makes them whenever it gets certificates, also those that it has."""
    for file, content in zip((files.cert, files.key), issue(), strict=True):
        write(file, content)
    assert Certificates(files).changed() is None
    ca.cert_pem.write_to_path(tmp_path / "clients.pem")
    certificates = Certificates(Files(files.cert, files.key, tmp_path / "clients.pem"))
    assert certificates.changed() is certificates.changed() is not None


def shake_hands(serving, trusting, session=None):
    """Connect two sides in memory. Return the client's session, and whether it was
    resumed.
    """
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(back, there, server_hostname="127.0.0.1", session=session)
    sides = client, serving.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return client.session, client.session_reused


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_with_a_ca_of_clients_the_vector_port_resumes_no_session(ca, issue, files, tmp_path, newest):
    """A resumed session would not check the client's certificate again."""
    for file, content in zip((files.cert, files.key), issue(), strict=True):
        write(file, content)
    ca.cert_pem.write_to_path(tmp_path / "clients.pem")
    certificates = Certificates(Files(files.cert, files.key, tmp_path / "clients.pem"))
    personal = tmp_path / "client.pem"
    ca.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(personal)
    trusting = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    trusting.load_cert_chain(personal)
    trusting.maximum_version = newest
    if newest is ssl.TLSVersion.TLSv1_2:
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
            shake_hands(certificates.context(), trusting)
        return
    session, _ = shake_hands(certificates.context(), trusting)
    assert shake_hands(certificates.context(), trusting, session)[1] is False
