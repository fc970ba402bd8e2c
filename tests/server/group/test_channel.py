"""Messages over a connection, plain and encrypted."""

import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import trustme

from hvpd.v1 import group_pb2
from hvpd_server.group import channel as _channel
from hvpd_server.group.channel import Channel


def files(folder, name="localhost"):
    folder.mkdir()
    issued = trustme.CA().issue_cert(name)
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for number, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(folder / "cert.pem", append=number > 0)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(params=["plain", "encrypted"])
def pair(request, tmp_path):
    """Yield the two ends of a connection."""
    leader, rank = (None, None) if request.param == "plain" else _channel.contexts(*files(tmp_path / "tls"))
    with ThreadPoolExecutor(1) as pool:
        ours, theirs = socket.socketpair()
        accepting = pool.submit(Channel, ours, leader, server=True)
        other = Channel(theirs, rank)
        one = accepting.result()
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("size", [0, 1, 100, 70_000, 3 << 20])
def test_a_message_arrives_whole(pair, size):
    one, other = pair
    message = bytes(range(256)) * (size // 256) + bytes(size % 256)
    sending = threading.Thread(target=one.send, args=(message,), daemon=True)
    sending.start()
    assert other.receive() == message
    sending.join(60)


def test_both_sides_may_send_at_once(pair):
    message = bytes(1 << 20)
    with ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(lambda end=end: [end.send(message) for _ in range(8)]) for end in pair]
        received = [threading.Thread(target=lambda end=end: [end.receive() for _ in range(8)]) for end in pair]
        for each in received:
            each.start()
        for each in sent:
            each.result(60)
        for each in received:
            each.join(60)
            assert not each.is_alive()


def test_a_message_of_more_bytes_than_expected_is_refused(pair):
    one, other = pair
    one.send(bytes(100))
    with pytest.raises(ConnectionError, match="100 bytes arrived, and at most 99"):
        other.receive(99)


def test_the_end_of_the_other_side_is_an_error(pair):
    one, other = pair
    one.close()
    with pytest.raises(OSError, match="closed"):
        other.receive()


def test_a_network_that_dies_while_nothing_is_sent_ends_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = Channel(socket.create_connection(listener.getsockname()))
    assert one._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    one.close()


def test_a_rank_accepts_the_certificate_of_its_files_only(tmp_path):
    leader, _ = _channel.contexts(*files(tmp_path / "one"))
    _, rank = _channel.contexts(*files(tmp_path / "other"))
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool, ours, theirs:
        accepting = pool.submit(Channel, ours, leader, server=True)
        with pytest.raises(ssl.SSLCertVerificationError):
            Channel(theirs, rank)
        theirs.close()
        assert isinstance(accepting.exception(60), OSError)


def test_a_proof_needs_the_secret_the_side_and_the_nonces():
    proof = _channel.proof(b"secret", "rank", b"1", b"2")
    assert _channel.is_proof(proof, _channel.proof(b"secret", "rank", b"1", b"2"))
    for other in ((b"other", "rank", b"1", b"2"), (b"secret", "leader", b"1", b"2"), (b"secret", "rank", b"2", b"1")):
        assert not _channel.is_proof(proof, _channel.proof(*other))


def test_an_order_keeps_its_chunk():
    order = group_pb2.GroupOrder(number=3, dropped=[1, 2], load={"sha256": b"d"})
    frame = _channel.read(bytearray(_channel.written(order, b"chunk")))
    assert frame.message == order
    assert bytes(frame.chunk) == b"chunk"
