"""A tenant's use is counted on a clock that the test moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvpd_server.errors import Code, ServiceError
from hvpd_server.tenancy import limits as _limits
from hvpd_server.tenancy.limits import TenantLimits
from hvpd_server.tenancy.meters import Meters
from tests.support.clock import Clock


def meter(clock, **limits):
    return Meters(lambda tenant: TenantLimits(**limits), clock=clock).of("a")


def refusal(meter, columns=1):
    with pytest.raises(ServiceError) as error:
        meter.begin(columns)
    assert error.value.code == Code.RESOURCE_EXHAUSTED
    assert error.value.metadata == {"tenant": "a"}
    return error.value


def use(meter, columns, seconds=0.0):
    meter.begin(columns)
    meter.end(columns, seconds, columns)


def test_without_limits_there_is_nothing_to_count(clock):
    assert Meters(clock=clock).of("a") is None
    assert Meters(lambda tenant: TenantLimits(stored_bytes=1), clock=clock).of("a") is not None


def test_a_seconds_worth_of_vectors_may_come_at_once_and_then_as_many_as_time_gives(clock):
    a = meter(clock, vectors_per_second=8)
    for _ in range(8):
        use(a, 1)
    error = refusal(a)
    assert error.reason == "TENANT_RATE"
    assert "tenant a may have 8 vectors a second" in str(error)
    clock.now += 0.125
    use(a, 1)
    refusal(a)
    clock.now += 100  # A tenant saves up at most a second's worth.
    for _ in range(8):
        use(a, 1)
    refusal(a)


def test_a_wide_product_goes_and_is_waited_for_afterwards(clock):
    a = meter(clock, vectors_per_second=10)
    use(a, 64)
    wait = refusal(a).retry_after
    assert wait == pytest.approx(5.4)
    clock.now += wait - 1e-6
    refusal(a)
    clock.now += 2e-6
    use(a, 1)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 3)), min_size=1, max_size=60))
def test_the_rate_holds_in_the_long_run(asked):
    """The exceptions are the second's worth at the beginning, and the last product."""
    clock = Clock()
    a, begun, served = meter(clock, vectors_per_second=20), clock.now, 0
    for columns, pause in asked:
        clock.now += pause
        try:
            use(a, columns)
        except ServiceError as error:
            clock.now += error.retry_after + 1e-9
            use(a, columns)  # A caller that waits as told is served.
        served += columns
        assert served <= 20 * (clock.now - begun) + 20 + columns + 1e-3


def test_vectors_in_flight_are_those_that_are_not_answered(clock):
    a = meter(clock, vectors_in_flight=4)
    a.begin(3)
    assert refusal(a, 2).reason == "TENANT_IN_FLIGHT"
    a.begin(1)
    assert a.in_flight == 4
    refusal(a)
    a.end(3, 0.0, 3)
    a.begin(3)
    a.end(1, 0.0, 1)
    a.end(3, 0.0, 3)
    a.begin(64)  # Wider than the limit, and alone.
    refusal(a)


def test_a_refused_product_is_not_in_flight_and_not_charged(clock):
    a = meter(clock, vectors_in_flight=1, vectors_per_second=2)
    a.begin(1)
    refusal(a)
    a.end(1, 0.0, 1)
    use(a, 1)
    assert refusal(a).reason == "TENANT_RATE"
    assert a.in_flight == 0


def test_a_share_of_the_device_is_on_the_average_over_ten_seconds(clock):
    a = meter(clock, device_share=0.25)
    use(a, 1, seconds=2.4)
    use(a, 1, seconds=1.1)  # Ten seconds give 2.5, of which 0.1 were left.
    error = refusal(a)
    assert (error.reason, error.retry_after) == ("TENANT_DEVICE_TIME", pytest.approx(4.0))
    clock.now += 4.1
    use(a, 1)


def test_limits_that_change_are_obeyed_at_once(clock):
    now = {"a": TenantLimits(vectors_per_second=1)}
    meters = Meters(lambda tenant: now.get(tenant, TenantLimits()), clock=clock)
    use(meters.of("a"), 1)
    refusal(meters.of("a"))
    now["a"] = TenantLimits(vectors_per_second=1000)
    clock.now += 0.01
    use(meters.of("a"), 1)
    del now["a"]
    assert meters.of("a") is None


def test_tenants_do_not_spend_each_others(clock):
    meters = Meters(lambda tenant: TenantLimits(vectors_per_second=1), clock=clock)
    use(meters.of("a"), 1)
    use(meters.of("b"), 1)
    refusal(meters.of("a"))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ([], "must be an object"),
        ({"vectors": 1}, "unknown limit 'vectors'; the limits are vectors_per_second, "),
        ({"vectors_per_second": 0}, "vectors_per_second must be a number above 0, got 0"),
        ({"vectors_per_second": "10"}, "got '10'"),
        ({"vectors_per_second": float("nan")}, "got nan"),
        ({"vectors_per_second": float("inf")}, "got inf"),
        ({"vectors_in_flight": 1.5}, "a whole number from 1, got 1.5"),
        ({"vectors_in_flight": True}, "got True"),
        ({"resident_bytes": -1}, "got -1"),
        ({"stored_bytes": "1G"}, "got '1G'"),
    ],
)
def test_limits_that_are_none_are_refused(entry, says):
    with pytest.raises(ValueError, match=r"must be an object|unknown limit|got") as error:
        _limits.parse(entry)
    assert says in str(error.value)


def test_a_tenants_own_limits_override_the_general_ones():
    own, everybodys = {"stored_bytes": None, "vectors_in_flight": 3}, {"stored_bytes": 7, "device_share": 0.5}
    assert _limits.combined(own, everybodys) == TenantLimits(vectors_in_flight=3, device_share=0.5)
    assert _limits.combined({}, {}) == TenantLimits()
    assert _limits.describe({"b": {}, "a": own}) == [
        [
            "TENANT",
            "VECTORS_PER_SECOND",
            "VECTORS_IN_FLIGHT",
            "DEVICE_SHARE",
            "RESIDENT_BYTES",
            "STORED_BYTES",
            "TRANSIT_BYTES",
            "PROGRAM_BYTES",
        ],
        ["a", "-", "3", "-", "-", "none", "-", "-"],
        ["b", "-", "-", "-", "-", "-", "-", "-"],
    ]


def test_vectors_without_an_answer_are_given_back(clock):
    a = meter(clock, vectors_per_second=2)
    for _ in range(10):
        a.begin(2)
        a.end(2, 0.0, 0)
    use(a, 2)
    refusal(a)


def test_a_tenant_pays_for_the_vectors_that_were_multiplied(clock):
    a = meter(clock, vectors_per_second=2)
    for _ in range(2):
        a.begin(64)
        a.end(64, 0.0, 1)
    refusal(a)
