"""The files in deploy/ against the server's exports and against each other: names,
labels, ports, paths.
"""

import json
import re
from pathlib import Path

import pytest

from hvpd_server import config
from hvpd_server.telemetry.metrics import Metrics, ProductRecord
from hvpd_server.telemetry.readings import Live, Memory

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/hvpd.json").read_text())
RULES = (DEPLOY / "prometheus/rules.yml").read_text()
RULE_TESTS = (DEPLOY / "prometheus/rules_test.yml").read_text()
COMPOSE = (DEPLOY / "compose.yaml").read_text()
SCRAPES = (DEPLOY / "prometheus/prometheus.yml").read_text()

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

METRIC = re.compile(r"(?<![:\w])(?:hvpd|process)_\w+(?![:\w])")
"""Names of metrics in an expression. Names with colons are those of recording rules."""


@pytest.fixture(scope="module")
def exported():
    """Return the names of all samples that a server can export."""
    metrics = Metrics()
    metrics.answered("ComputeProduct", 1.0)
    metrics.product(ProductRecord("a" * 64, "", 1, 1, 0.0, 0.0, 0.0, 0.0))
    metrics.observe(lambda: Live({}, memory=[Memory("cuda:0", 1, 2)]))
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_query_metrics_that_exist(panel, exported):
    for target in panel["targets"]:
        found = METRIC.findall(target["expr"])
        assert found
        assert set(found) <= exported


def test_compose_builds_a_target_that_there_is():
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (DEPLOY.parent / "Dockerfile").read_text(), re.MULTILINE)
    (target,) = re.findall(r"^ +target: (\S+)$", COMPOSE, re.MULTILINE)
    assert {target, "cpu", "cuda"} <= set(stages)


def test_rules_query_metrics_that_exist(exported):
    found = set(METRIC.findall(RULES))
    assert len(found) > 10
    assert found <= exported


def test_rules_ask_for_records_that_there_are():
    records = re.findall(r"record: (\S+)", RULES)
    assert len(set(records)) == len(records) > 5
    assert set(re.findall(r"instance:\w+:\w+", RULES)) == set(records)


def test_every_rule_has_a_test():
    alerts, records = re.findall(r"alert: (\w+)", RULES), re.findall(r"record: (\S+)", RULES)
    fires = set(re.findall(r"alertname: (\w+)\n\s+eval_time: \w+\n\s+exp_alerts:\n\s+- exp_labels", RULE_TESTS))
    assert len(set(alerts)) == len(alerts) > 5
    assert fires == set(alerts)
    assert {record for record in records if record in RULE_TESTS} == set(records)


def test_every_alert_has_a_summary_and_a_remedy():
    for alert in re.split(r"- alert: ", RULES)[1:]:
        assert re.search(r"severity: (critical|warning)", alert)
        assert re.search(r"summary: .*\$labels\.instance", alert)
        assert re.search(r"description: \".{20,}\"", alert)


# The dashboard


def test_the_dashboard_is_one_that_grafana_reads():
    assert DASHBOARD["schemaVersion"] == 39
    assert DASHBOARD["uid"] == DASHBOARD["title"] == "hvpd"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(PANELS) >= 16
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)


def test_panels_do_not_lie_on_each_other():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_take_the_datasource_that_is_chosen_and_their_targets_are_told_apart():
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert panel["fieldConfig"]["defaults"]["unit"]


def test_variables_are_used_and_those_that_are_used_are_there():
    assert {"objective", "tenant"} <= set(VARIABLES)
    text = json.dumps([*PANELS, *(variable.get("query") for variable in VARIABLES.values())])
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"}
    assert used == set(VARIABLES)
    for variable in VARIABLES.values():
        if variable["type"] == "query":
            assert variable["datasource"]["uid"] == "${datasource}"
            assert variable["allValue"] == ".*"


def test_panels_select_by_the_dashboards_variables():
    for expression in EXPRESSIONS:
        for selector in re.findall(r"hvpd_usage_\w+\{([^}]*)\}", expression):
            assert 'objective=~"$objective"' in selector
            assert 'tenant=~"$tenant"' in selector
        for selector in re.findall(r"(?:hvpd|process)_\w+\{([^}]*)\}", expression):
            assert 'instance=~"$instance"' in selector


def test_panels_of_a_fleet_show_each_server():
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    fleet = DASHBOARD["panels"][titles.index("The servers of a fleet") + 1 :]
    assert len(fleet) == 6
    for panel in fleet:
        for target in panel["targets"]:
            sums = re.findall(r"sum by \(([^)]*)\)", target["expr"])
            assert all("instance" in by.split(", ") for by in sums)
            assert "{{instance}}" in target["legendFormat"]


# The compose file


def test_images_are_pinned():
    images = re.findall(r"image: (\S+)", COMPOSE)
    assert len(images) == 2
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images)


def test_mounted_files_exist():
    mounted = re.findall(r"- (\./\S+?):(/\S+?):ro", COMPOSE)
    assert len(mounted) == 4
    assert all((DEPLOY / source).exists() for source, _ in mounted)
    places = dict(mounted)
    provider = (DEPLOY / "grafana/provisioning/dashboards/hvpd.yml").read_text()
    assert f"path: {places['./grafana/dashboards']}" in provider
    assert f"{places['./grafana/dashboards']}/hvpd.json" in COMPOSE
    assert Path(places["./prometheus/rules.yml"]).parent == Path(places["./prometheus/prometheus.yml"]).parent
    assert "- rules.yml" in SCRAPES


def test_settings_of_the_server_are_ones_that_it_has():
    variables = dict(re.findall(r"(HVPD_\w+): \"?([^\s\"]+)", COMPOSE))
    settings = {f"HVPD_{field.upper()}" for field in config.Config.__dataclass_fields__}
    assert set(variables) <= settings
    assert f'targets: ["hvpd:{variables["HVPD_METRICS_PORT"]}"]' in SCRAPES
    assert f"127.0.0.1:{variables['HVPD_PORT']}:{variables['HVPD_PORT']}" in COMPOSE


def test_nothing_listens_beyond_this_machine():
    published = re.findall(r"- (\S+:\d+:\d+)$", COMPOSE, re.MULTILINE)
    assert len(published) == 5
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_datasource_is_the_one_that_the_dashboard_begins_with():
    datasource = (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
    assert f"uid: {VARIABLES['datasource']['current']['value']}\n" in datasource
    assert "http://prometheus:9090" in datasource
    assert re.search(r"^  prometheus:$", COMPOSE, re.MULTILINE)


def test_the_interval_is_that_of_the_scrapes():
    datasource = (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
    (interval,) = re.findall(r"scrape_interval: (\w+)", SCRAPES)
    assert f"timeInterval: {interval} " in datasource
