"""Which failures make a client leave a server of several, with servers that are not
real and a clock of the test.
"""

import dataclasses
import re
import threading
from types import SimpleNamespace

import grpc
import pytest

import hvpd
from hvpd._errors import Failure
from hvpd._transport.fleet import Fleet
from hvpd._transport.transport import SERVING
from hvpd.v1 import server_pb2
from tests.support.threads import no_threads
from tests.support.waiting import until

CODE = grpc.StatusCode


class Link:
    """A connection to a server that serves, or not."""

    def __init__(self, address, device_count=1, name=""):
        self.address = address
        self.server = server_pb2.GetServerResponse(max_block_width=64, device_count=device_count, id=name)
        self.settings = {}
        self.serves = True
        self.channel = SimpleNamespace(
            check_health=lambda request, **options: SERVING if self.serves else b"",
            metadata=(),
            server=SimpleNamespace(GetServer=None),
        )

    def ask_once(self, method, request):
        return self.server if self.serves else None

    def restarted(self, server):
        self.server = server

    def close(self):
        self.serves = None


@dataclasses.dataclass
class Clock:
    now: float = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def links():
    return {f"{name}:7070": Link(f"{name}:7070", name=name) for name in "abc"}


@pytest.fixture
def fleet(links, clock):
    found = Fleet("a:7070,b:7070,c:7070", lambda: list(links), links.__getitem__, clock=clock)
    found.open()
    yield found
    found.close()


def order(fleet, digest="f"):
    return [each.address for each in fleet._order(digest)]


def first(fleet, digest="f"):
    """Return the address of the choice, and whether it is free."""
    member, free = fleet.choose(digest)
    return member.address, free


def failure(code, reason="", message="", retry_after=None):
    return Failure(code, message, reason, {}, retry_after)


@pytest.mark.parametrize(
    ("found", "leaves"),
    [
        (failure(CODE.UNAVAILABLE, "WARMING_UP", retry_after=0.2), True),
        (failure(CODE.UNAVAILABLE, "SHUTTING_DOWN"), True),
        (failure(CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after=0.1), True),
        (failure(CODE.RESOURCE_EXHAUSTED, "DEVICE_MEMORY"), True),
        (failure(CODE.RESOURCE_EXHAUSTED, "MEMORY_BUDGET"), True),
        (failure(CODE.RESOURCE_EXHAUSTED, message="Concurrent RPC limit exceeded!"), True),
        (failure(CODE.NOT_FOUND, "OBJECTIVE_NOT_FOUND"), True),
        # Limits of a tenant: moving must not evade them.
        (failure(CODE.RESOURCE_EXHAUSTED, "TENANT_RATE", retry_after=0.1), False),
        (failure(CODE.RESOURCE_EXHAUSTED, "TENANT_MEMORY"), False),
        (failure(CODE.RESOURCE_EXHAUSTED, "TENANT_DEVICE_TIME", retry_after=0.1), False),
        # The same everywhere.
        (failure(CODE.INVALID_ARGUMENT, "SIZE_MISMATCH"), False),
        (failure(CODE.UNAUTHENTICATED, "TOKEN_EXPIRED"), False),
        (failure(CODE.FAILED_PRECONDITION, "QUARANTINED"), False),
        (failure(CODE.DEADLINE_EXCEEDED), False),
        (failure(CODE.NOT_FOUND, "POINT_NOT_RESIDENT"), False),
        # The server serves, so only a connection broke.
        (failure(CODE.UNAVAILABLE, message="Socket closed"), False),
        (failure(CODE.CANCELLED), False),
    ],
    ids=lambda found: f"{found.code.name}-{found.reason}-{found.message}" if isinstance(found, Failure) else None,
)
def test_a_failure_that_another_server_may_not_have_leaves(fleet, found, leaves):
    member, free = fleet.choose("f")
    assert free
    assert fleet.leave(member, "f", found) is leaves
    address = order(fleet)[1 if leaves else 0]
    assert first(fleet) == (address, True)


def test_a_server_that_does_not_serve_is_left_by_all(fleet, links, clock):
    home, second, _ = order(fleet)
    member, _ = fleet.choose("f")
    links[home].serves = False
    assert fleet.leave(member, "f", failure(CODE.UNAVAILABLE, message="Connection refused"))
    assert first(fleet) == (second, True)
    assert all(first(fleet, str(number))[0] != home for number in range(50))


def test_an_objective_that_is_not_found_moves_no_other_call(fleet):
    """A name that no server has is no reason to ask all."""
    member, _ = fleet.choose("")
    assert not fleet.leave(member, "", failure(CODE.NOT_FOUND, "OBJECTIVE_NOT_FOUND"))


def test_a_full_server_is_full_for_one_objective(fleet, clock):
    home, second, _ = order(fleet)
    other = next(str(number) for number in range(50) if order(fleet, str(number))[0] == home)
    member, _ = fleet.choose("f")
    assert fleet.leave(member, "f", failure(CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL"))
    assert first(fleet) == (second, True)
    assert first(fleet, other) == (home, True)
    clock.now += 6.6
    assert first(fleet) == (home, True)


def test_if_all_are_full_the_first_is_asked_and_the_call_waits(fleet):
    for address in order(fleet):
        member = next(each for each in fleet.members() if each.address == address)
        fleet.leave(member, "f", failure(CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL"))
    assert first(fleet) == (order(fleet)[0], False)


def test_if_all_are_away_each_is_asked_in_turn(fleet, links, clock):
    for link in links.values():
        link.serves = False
    asked = []
    for _ in range(3):
        member, _ = fleet.choose("f")
        asked.append(member.address)
        assert fleet.leave(member, "f", failure(CODE.UNAVAILABLE))
        clock.now += 0.01
    assert asked == order(fleet)
    assert first(fleet)[1] is False


def test_a_server_that_serves_again_is_found(fleet, links, clock):
    home = order(fleet)[0]
    member, _ = fleet.choose("f")
    links[home].serves = False
    fleet.leave(member, "f", failure(CODE.UNAVAILABLE))
    links[home].serves = True
    until(lambda: first(fleet) == (home, True))


def test_a_server_with_more_devices_gets_more(links, clock):
    links["a:7070"] = Link("a:7070", device_count=8, name="a")
    fleet = Fleet("", lambda: list(links), links.__getitem__, clock=clock)
    fleet.open()
    share = sum(first(fleet, str(number))[0] == "a:7070" for number in range(1000)) / 1000
    fleet.close()
    assert share == pytest.approx(0.8, abs=0.05)


def test_the_address_does_not_count_if_ids_differ(links, clock, fleet):
    """Clients reach the same servers by other addresses."""
    others = {f"10.0.0.{number}:7070": Link(f"10.0.0.{number}:7070", name=name) for number, name in enumerate("abc")}
    other = Fleet("", lambda: list(others), others.__getitem__, clock=clock)
    other.open()
    for number in range(50):
        mine, theirs = (each._order(str(number)) for each in (fleet, other))
        assert [each.link.server.id for each in mine] == [each.link.server.id for each in theirs]
    other.close()


@pytest.mark.parametrize("ids", ["", "same"])
def test_without_different_ids_addresses_count(clock, ids):
    links = {f"{name}:7070": Link(f"{name}:7070", name=ids) for name in "abc"}
    fleet = Fleet("", lambda: list(links), links.__getitem__, clock=clock)
    fleet.open()
    assert {first(fleet, str(number))[0] for number in range(50)} == set(links)
    fleet.close()


def test_the_narrowest_server_limits_a_product(links, clock):
    links["b:7070"].server.max_block_width = 8
    fleet = Fleet("", lambda: list(links), links.__getitem__, clock=clock)
    fleet.open()
    assert fleet.widest == 8
    fleet.close()


def test_what_one_server_cannot_do_is_not_asked_of_any(links, clock):
    """They are upgraded one after the other."""
    for link, version, runs in zip(links.values(), ("1.10.2", "1.9.5", "1.17.0"), (True, False, True), strict=True):
        link.server.stablehlo_version, link.server.krylov_runs = version, runs
    fleet = Fleet("", lambda: list(links), links.__getitem__, clock=clock)
    fleet.open()
    found = server_pb2.GetServerResponse(version="0.2.0", krylov_runs=True)
    fleet.limit(found)
    fleet.close()
    assert (found.version, found.stablehlo_version, found.krylov_runs, found.max_block_width) == (
        "0.2.0",
        "1.9.5",
        False,
        64,
    )


@pytest.mark.parametrize(
    ("errors", "kind", "reason"),
    [
        (
            [hvpd.UnavailableError("gone"), hvpd.AccessError("no", reason="TOKEN_UNKNOWN")],
            hvpd.AccessError,
            "TOKEN_UNKNOWN",
        ),
        ([hvpd.UnavailableError("x", reason="TLS"), OSError("odd")], hvpd.HvpdError, "UNKNOWN"),
        (
            [hvpd.InvalidArgumentError("bad", reason="TOKEN_UNPROTECTED")],
            hvpd.InvalidArgumentError,
            "TOKEN_UNPROTECTED",
        ),
    ],
    ids=["refused", "odd", "wrong"],
)
def test_without_any_server_the_error_that_says_most_is_raised(errors, kind, reason):
    names = {f"h{number}:7070": error for number, error in enumerate(errors)}

    def make(address):
        raise names[address]

    with pytest.raises(hvpd.HvpdError, match=re.escape(str(errors[-1]))) as error:
        Fleet("", lambda: list(names), make).open()
    assert type(error.value) is kind
    assert error.value.reason == reason


def test_a_server_that_left_the_name_is_used_until_it_ends(links, clock):
    addresses = list(links)
    fleet = Fleet("dns:///hvpd:7070", lambda: addresses, links.__getitem__, resolves=True, clock=clock)
    fleet.open()
    digest = next(str(number) for number in range(50) if first(fleet, str(number))[0] == "a:7070")
    member, _ = fleet.choose(digest)
    addresses.remove("a:7070")
    fleet.look_up()
    assert first(fleet, digest)[0] != "a:7070"
    clock.now += 1000
    fleet.look_up()
    assert not member.away  # Points stay there.
    links["a:7070"].serves = False
    fleet.look_up()
    assert member.away
    assert links["a:7070"].serves is False  # Calls may be under way.
    clock.now += 100
    fleet.look_up()
    assert links["a:7070"].serves is None
    assert len(fleet._links) == 2
    fleet.close()


def test_one_thread_looks_for_a_server_however_often_it_goes_away(fleet, links):
    home = order(fleet)[0]
    member, _ = fleet.choose("f")
    links[home].serves = False
    before = threading.active_count()
    for _ in range(20):
        assert fleet.leave(member, "f", failure(CODE.UNAVAILABLE))
        fleet.answered(member)
    fleet.leave(member, "f", failure(CODE.UNAVAILABLE))
    assert threading.active_count() <= before + 1
    links[home].serves = True
    until(lambda: first(fleet) == (home, True))
    until(lambda: not member.watched)


def test_a_fleet_without_a_thread_looks_up_and_watches_later(links, clock):
    fleet = Fleet("dns:///hvpd:7070", lambda: list(links), links.__getitem__, resolves=True, clock=clock)
    fleet.open()
    member, _ = fleet.choose("f")
    links[member.address].serves = False
    clock.now += 1000
    with no_threads():
        fleet.choose("f")
        assert fleet.leave(member, "f", failure(CODE.UNAVAILABLE))
    assert not fleet._resolving
    assert not member.watched
    asked = fleet._resolved
    clock.now += 1000
    fleet.choose("f")
    assert fleet._resolved > asked
    until(lambda: not fleet._resolving)
    fleet.close()
