"""Addresses of one server and of several."""

import socket

import pytest

import hvpd
from hvpd._transport import address


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:7070,b:7070", ["a:7070", "b:7070"]),
        (" a:7070 , [::1]:7071 ", ["a:7070", "[::1]:7071"]),
    ],
)
def test_a_list(text, found):
    assert address.is_fleet(text)
    assert address.listed(text) == found


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a:7070,", "number 2 of 'a:7070,' is empty"),
        (",", "number 1 of ',' is empty"),
        ("a:7070,,b:7070", "number 2 of 'a:7070,,b:7070' is empty"),
        ("a:7070,b", "number 2 of 'a:7070,b' is 'b'"),
        ("a:7070;b:7070,c:7070", "number 1 of .* is 'a:7070;b:7070'"),
        ("a:7070,b:70707", "is 'b:70707'"),
        ("a:7070,b:7071,a:7070", "number 3 of .* names 'a:7070' again"),
        ("a:7070,dns:///b:7070", "dns:/// cannot be in a list"),
    ],
)
def test_a_malformed_list_is_refused_at_once(text, wrong):
    with pytest.raises(hvpd.InvalidArgumentError, match=wrong) as error:
        hvpd.connect(text)
    assert error.value.reason == "ADDRESS"


def test_a_list_has_a_limit():
    addresses = [f"h{number}:7070" for number in range(257)]
    assert len(address.listed(",".join(addresses[:256]))) == 256
    with pytest.raises(hvpd.InvalidArgumentError, match="256 servers, and this one has 257"):
        hvpd.connect(",".join(addresses))


@pytest.mark.parametrize("text", ["dns:///", "dns:///b", "dns:///b:", "dns:///b:x", "dns:////b c:1"])
def test_a_malformed_name_is_refused_at_once(text):
    with pytest.raises(hvpd.InvalidArgumentError, match="must be dns:///host:port") as error:
        hvpd.connect(text)
    assert error.value.reason == "ADDRESS"


def test_a_port_is_within_its_range():
    with pytest.raises(hvpd.InvalidArgumentError, match="with a port from 1 to 65535, got 'localhost:99999'"):
        hvpd.connect("localhost:99999")


def test_one_address_is_no_fleet():
    assert not any(map(address.is_fleet, ["a:7070", "[::1]:7070", None, 7, ""]))


def test_a_name_has_all_of_its_addresses(monkeypatch):
    def getaddrinfo(host, port, **options):
        assert (host, port) == ("hvpd", 7070)
        kinds = [(socket.AF_INET, (ip, port)) for ip in ("10.0.0.2", "10.0.0.1", "10.0.0.2")]
        kinds.append((socket.AF_INET6, ("fd00::1", port, 0, 0)))
        return [(family, socket.SOCK_STREAM, 6, "", where) for family, where in kinds]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert address.resolved("dns:///hvpd:7070") == ["10.0.0.1:7070", "10.0.0.2:7070", "[fd00::1]:7070"]


def test_a_name_without_an_address():
    with pytest.raises(OSError, match=r"."):
        address.resolved("dns:///hvpd.invalid:7070")
    with pytest.raises(OSError, match="label"):
        address.resolved(f"dns:///{'x' * 70}:7070")
