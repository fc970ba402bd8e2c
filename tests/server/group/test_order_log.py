"""The numbers of a group's orders."""

import pytest

from hvpd_server.group.order_log import DisagreementError, OrderLog


def test_orders_are_numbered_and_each_rank_reports_them_in_turn():
    log = OrderLog([1, 2])
    assert [log.append(float(now)) for now in range(3)] == [1, 2, 3]
    log.done(1, 1)
    log.done(1, 2)
    assert log.oldest(1) == (3, 2.0)
    assert log.oldest(2) == (1, 0.0)
    assert log.pending == 3
    assert not log.reached(1)
    log.done(2, 1)
    assert log.reached(1)
    assert not log.reached(2)


@pytest.mark.parametrize(("reports", "why"), [([2], "order 1 was expected"), ([1, 2, 3], "no order was expected")])
def test_a_rank_that_reports_another_order_disagrees(reports, why):
    log = OrderLog([1])
    log.append(0.0)
    log.append(0.0)
    *first, last = reports
    for number in first:
        log.done(1, number)
    with pytest.raises(DisagreementError, match=why):
        log.done(1, last)


def test_a_leader_alone_waits_for_nobody():
    log = OrderLog([])
    assert log.reached(log.append(0.0))
    assert log.pending == 0
