"""The rules and the dashboard on a real Prometheus, which scrapes a real server under
load.
"""

import contextlib
import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from tests.support.waiting import until

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/hvpd.json").read_text())
TARGETS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    if panel["type"] != "row"
    for target in panel["targets"]
}
RULES = (DEPLOY / "prometheus/rules.yml").read_text()
RECORDS = re.findall(r"record: (\S+)", RULES)
COUNT = len(RECORDS) + len(re.findall(r"alert: (\w+)", RULES))
WAIT = 120
N = 100_000

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs prometheus and promtool: apt-get install --no-install-recommends prometheus",
)


def promtool(*arguments, cwd=DEPLOY / "prometheus"):
    return subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=WAIT, check=False)


def test_the_rules_are_valid():
    found = promtool("check", "rules", "rules.yml")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{COUNT} rules found" in found.stdout


def test_the_configuration_is_valid():
    found = promtool("check", "config", "prometheus.yml")
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_rules_pass_their_tests():
    found = promtool("test", "rules", "rules_test.yml")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("instance:hvpd_queue_seconds:p99_5m > 1", "instance:hvpd_queue_seconds:p99_5m > 100"),
        ('expr: up{job="hvpd"} == 0', 'expr: up{job="hvpd"} == 1'),
        ("0.99, sum by (job, instance, le) (rate(hvpd_queue", "0.5, sum by (job, instance, le) (rate(hvpd_queue"),
    ],
    ids=["threshold", "comparison", "quantile"],
)
def test_rules_that_are_wrong_do_not_pass_their_tests(right, wrong, tmp_path):
    assert RULES.count(right) == 1
    (tmp_path / "rules.yml").write_text(RULES.replace(right, wrong))
    shutil.copy(DEPLOY / "prometheus/rules_test.yml", tmp_path)
    assert promtool("check", "rules", "rules.yml", cwd=tmp_path).returncode == 0
    assert promtool("test", "rules", "rules_test.yml", cwd=tmp_path).returncode == 1


class Prometheus:
    """The process, and its HTTP API."""

    def __init__(self, folder, scraped):
        config = (DEPLOY / "prometheus/prometheus.yml").read_text()
        assert config.count("hvpd:9464") == 1
        assert config.count("15s") == 2
        (folder / "prometheus.yml").write_text(config.replace("hvpd:9464", scraped).replace("15s", "1s"))
        shutil.copy(DEPLOY / "prometheus/rules.yml", folder)
        self.lines = []
        self.process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(ready,), daemon=True)
        self._reader.start()
        assert ready.wait(WAIT), self.lines
        assert self.process.poll() is None, self.lines

    def _read(self, ready):
        with self.process.stderr as stderr:
            for line in stderr:
                self.lines.append(line)
                if found := re.search(r'"?Listening on"? address=(127\.0\.0\.1:\d+)', line):
                    self.address = found[1]
                if "ready to receive web requests" in line:
                    ready.set()
        ready.set()

    def get(self, path, **query):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        return answer["data"]

    def values(self, expression):
        """Return the numbers of an instant query, without NaN."""
        found = [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]
        return [value for value in found if math.isfinite(value)]

    def stop(self):
        self.process.terminate()
        self.process.wait(WAIT)
        self._reader.join(WAIT)


class Load:
    """Load on the server until the test ends it."""

    def __init__(self, address):
        self._address = address
        self._stop = threading.Event()
        self.ended = threading.Event()
        self.error = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            with contextlib.closing(hvpd.connect(self._address)) as client:
                with contextlib.closing(hvpd.connect(self._address)) as teammate:
                    self._use(client, teammate)
        except BaseException as error:  # noqa: BLE001 - raised when the load ends
            self.error = error
        finally:
            self.ended.set()

    def _use(self, client, teammate):
        scales = np.linspace(1.0, 2.0, N)
        objective = client.register(
            lambda x, scales: 0.5 * jnp.sum(scales * x**2), np.zeros(N), scales, name="demo/watched", platforms=("cpu",)
        )
        same = teammate.objective("demo/watched")
        points = [np.full(N, float(value)) for value in range(8)]
        while not self._stop.is_set():
            for x in points:
                H = objective.at(x).hessian()
                np.testing.assert_allclose(H @ np.ones(N), scales)
                H @ np.ones((N, 3))  # The block is padded to four and has several chunks.
                same.at(x)
            with pytest.raises(hvpd.NotFoundError):
                client.objective("demo/nothing")

    def stop(self):
        self._stop.set()
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        assert self.error is None, self.error


@pytest.fixture(scope="module")
def watched(serve_module, tmp_path_factory):
    """Yield a server under load, and the Prometheus that has scraped it."""
    server = serve_module("--memory-budget", "8M")
    said = next(line for line in server.lines if "hvpd: metrics on " in line)
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), re.search(r"http://(.*)/metrics", said)[1])
    try:
        until(lambda: prometheus.values("hvpd_build_info") == [1.0])
        load = Load(server.address)
        try:
            yield prometheus, load
        finally:
            load.stop()
    finally:
        prometheus.stop()


def eventually(watched, expression):
    """Return the values of an expression as soon as it has any."""
    prometheus, load = watched
    ends = time.monotonic() + WAIT
    while not (found := prometheus.values(expression)):
        assert time.monotonic() < ends, f"no data of {expression}"
        assert not load.ended.wait(0.2), load.error
    return found


def filled_in(expression):
    """Return an expression as Grafana sends it when all choices of all variables are
    chosen.
    """
    filled = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$(job|instance|objective|tenant)\b", ".*", filled)


NEEDS_A_DEVICE = "hvpd_device_memory_limit_bytes"


@pytest.mark.parametrize("target", [target for target in TARGETS if NEEDS_A_DEVICE not in TARGETS[target]])
def test_every_panel_has_data(target, watched):
    found = eventually(watched, filled_in(TARGETS[target]))
    assert all(value >= 0 for value in found)


def test_only_panels_that_need_a_driver_are_empty_on_a_cpu(watched):
    prometheus, _ = watched
    left = [expression for expression in TARGETS.values() if NEEDS_A_DEVICE in expression]
    assert len(left) == 1
    assert prometheus.values(filled_in(left[0])) == []


@pytest.mark.parametrize("record", RECORDS)
def test_every_recording_rule_has_data(record, watched):
    assert eventually(watched, record)


def test_every_rule_is_evaluated_without_an_error(watched):
    prometheus, _ = watched
    eventually(watched, RECORDS[-1])
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == COUNT
    assert [rule for rule in rules if rule["health"] != "ok"] == []


def test_dashboard_variables_select_names_that_exist(watched):
    """The dashboard's variables query names that exist."""
    prometheus, _ = watched
    eventually(watched, "hvpd_usage_products_total")
    query = {"match[]": "hvpd_usage_products_total"}
    assert prometheus.get("label/objective/values", **query) == ["demo/watched"]
    assert prometheus.get("label/tenant/values", **query) == ["anonymous"]
    assert prometheus.values('sum(hvpd_usage_products_total{objective=~"demo/watched", tenant=~"anonymous"})') != []
    assert prometheus.values('sum(hvpd_usage_products_total{objective=~"another"})') == []


def test_prometheus_counts_the_clients_requests(watched):
    prometheus, _ = watched
    eventually(watched, "hvpd_points_remade_total > 8")
    for name in ("products", "columns", "padding_columns", "points_found"):
        eventually(watched, f"hvpd_{name}_total > 0")
    assert prometheus.values('hvpd_failures_total{code="NOT_FOUND", reason="OBJECTIVE_NOT_FOUND"}')[0] > 0
    assert prometheus.values('hvpd_evictions_total{kind="point"}')[0] > 0
    assert prometheus.values('hvpd_transfer_seconds_count{direction="receive"}')[0] > 0
    for method in ("StreamProducts", "CreatePoint", "UploadBlob"):
        assert prometheus.values(f'hvpd_request_seconds_count{{method="{method}"}}')[0] > 0, method
    assert prometheus.values("hvpd_open_streams")[0] >= 1
    assert prometheus.values("hvpd_open_calls")[0] >= prometheus.values("hvpd_open_streams")[0]
    assert prometheus.values("up") == [1.0]
