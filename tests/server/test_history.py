"""The status page's history shows the counts between samples, in a bounded number of
samples.
"""

import pytest

from hvpd._wire.distribution import Distribution
from hvpd_server.status_page.history import MAX_SAMPLES, History
from hvpd_server.telemetry.metrics import Metrics, ProductRecord
from hvpd_server.telemetry.readings import Live, Use
from tests.support.waiting import until


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def history(metrics, clock):
    return History(metrics, clock, lambda: 1000 + clock.now)


def product(metrics, *, digest="a" * 64, tenant="ann", queue=0.001, compute=0.01, columns=1, width=None):
    width = width or columns
    device = compute * columns / width
    metrics.product(ProductRecord(digest, tenant, columns, width, queue, compute, device, queue + compute))


def test_before_the_first_interval_is_over_there_is_nothing(history):
    assert history.since(0) == []
    assert history.rates().seconds == 0
    assert history.rates().width is None


def test_a_sample_counts_from_the_sample_before(history, metrics, clock):
    product(metrics)
    clock.now += 2
    history.sample()
    for _ in range(3):
        product(metrics, columns=2, width=4, compute=0.04, queue=0.2)
    metrics.answered("StreamProducts", 0.3)
    metrics.answered("CreatePoint", 50.0)
    metrics.observe(lambda: Live({}, pending=7, in_flight=5))
    clock.now += 4
    history.sample()
    first, second = history.since(0)
    assert (first.number, first.products, first.columns, first.time, first.seconds) == (1, 1, 1, 1102, 2)
    assert (second.number, second.products, second.columns, second.time, second.seconds) == (2, 3, 6, 1106, 4)
    assert (second.pending, second.in_flight) == (7, 5)
    assert dict(zip(history.width_bounds, second.widths, strict=False))[4] == sum(second.widths) == 3
    assert first.request is None
    assert 0.25 < second.request[0] <= second.request[1] <= 0.5  # CreatePoint is no product.
    assert 0.1 < second.queue[0] <= 0.25
    assert 0.025 < second.compute[0] <= 0.05
    assert history.since(1) == [second]
    assert history.since(2) == []


def test_rates_are_of_the_last_samples(history, metrics, clock):
    for _ in range(20):
        product(metrics, columns=3, width=8)
        clock.now += 2
        history.sample()
    found = history.rates()
    assert found.seconds == 10
    assert found.products == pytest.approx(0.5)
    assert found.columns == pytest.approx(1.5)
    assert found.width == 8
    use = found.usage["a" * 12, "ann"]
    assert (use.products, use.columns) == (5, 15)
    assert use.device_seconds == pytest.approx(5 * 0.01 * 3 / 8)
    for _ in range(5):
        clock.now += 2
        history.sample()
    assert history.rates().products == 0
    assert history.rates().width is None


def test_an_account_that_began_anew_is_not_negative():
    assert Use(2, 3, 0.5).since(Use(100, 200, 7.0)) == Use(2, 3, 0.5)


def test_a_clock_that_stands_still_makes_no_sample(history, metrics):
    product(metrics)
    history.sample()
    assert history.since(0) == []


def test_the_past_is_bounded_and_numbers_go_on(history, clock):
    for _ in range(MAX_SAMPLES + 50):
        clock.now += 2
        history.sample()
    found = history.since(0)
    assert len(found) == MAX_SAMPLES
    assert [sample.number for sample in found] == list(range(51, MAX_SAMPLES + 51))


def test_it_takes_samples_by_itself_and_goes_on_after_one_that_failed(metrics, monkeypatch, caplog):
    monkeypatch.setattr("hvpd_server.status_page.history.INTERVAL", 0.001)
    history = History(metrics)
    answers = iter([RuntimeError("once")])
    live = metrics.live

    def failing():
        for error in answers:
            raise error
        return live()

    monkeypatch.setattr(metrics, "live", failing)
    history.start()
    try:
        until(lambda: len(history.since(0)) >= 2)
    finally:
        history.close()
    assert "no sample could be taken" in caplog.text


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([0, 0, 0], 0.5, None),
        ([4, 0, 0], 0.5, 0.5),
        ([4, 0, 0], 1.0, 1.0),
        ([0, 4, 0], 0.25, 1.5),
        ([2, 2, 0], 0.5, 1.0),
        ([2, 2, 0], 0.75, 2.0),
        ([0, 0, 9], 0.5, 3.0),
    ],
)
def test_quantiles_are_those_of_prometheus(counts, share, expected):
    """Quantiles are linear within a bucket:
    https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile
    """
    assert Distribution((1.0, 3.0), counts).quantile(share) == expected


def test_totals_equal_the_exported_metrics(metrics):
    for number in range(300):
        product(metrics, tenant=f"tenant{number}", columns=2)
    metrics.evicted("data")
    metrics.compiled(1.0, "compiled")
    metrics.launched("hvp", 8, 3)
    totals = metrics.totals()
    value = metrics.registry.get_sample_value
    assert totals.products == value("hvpd_products_total") == 300
    assert totals.columns == value("hvpd_columns_total") == 600
    assert sum(totals.queue.counts) == value("hvpd_queue_seconds_count")
    assert sum(use.products for use in totals.usage.values()) == 300
    assert totals.usage["other", "other"].products == 200
    assert totals.evictions["data"] == totals.compiles["compiled"] == 1
    assert (totals.launched_columns, totals.padding_columns) == (8, 3)
