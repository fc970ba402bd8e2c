"""The status page gets its data in bounded answers, for any texts of users, and its
own files only.
"""

import json
import re
import urllib.parse

import pytest

from hvpd_server.errors import Code, ServiceError, to_status
from hvpd_server.status_page.history import History
from hvpd_server.status_page.http_server import Request
from hvpd_server.status_page.objectives import Catalogue, Entry, Facts
from hvpd_server.status_page.page import Status
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.telemetry.metrics import Metrics, ProductRecord
from hvpd_server.telemetry.readings import Live, Memory

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x00"


class Listing:
    """A catalogue without a store."""

    def __init__(self, *entries, troubled=None):
        self._entries = entries
        self._troubled = troubled or {}
        self.asked = []

    def entries(self):
        return self._entries

    def facts(self, digest):
        self.asked.append(digest)
        return self._troubled.get(digest, Facts(7, "float64", "auto", "highest", "passed"))

    def troubled(self):
        return self._troubled


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def status(metrics, clock):
    """Return a function that makes a status page of objectives, with its history."""

    def status(*entries, **settings):
        history = History(metrics, clock, lambda: 1000 + clock.now)
        listing = Listing(*entries, **settings)
        made = Status({"version": "1.2"}, lambda: "serving", metrics, history, listing, clock, lambda: 1000 + clock.now)
        made.history, made.listing = history, listing
        return made

    return status


def ask(status, **query):
    answer = status.pages()["/status.json"](Request(urllib.parse.urlencode(query), None, None))
    assert answer.content_type == "application/json"
    return json.loads(answer.body)


def product(metrics, digest, tenant="ann", compute=0.5, columns=1):
    metrics.product(ProductRecord(digest, tenant, columns, columns, 0.0, compute, compute, compute))


def entry(number, *names):
    return Entry(f"{number:064x}", names, 5.0)


def test_the_page_tells_the_servers_facts_and_load(status, metrics, clock):
    made = status(entry(1, "a"))
    product(metrics, f"{1:064x}", columns=4)
    metrics.opened()
    metrics.observe_streams(lambda: 2)
    metrics.observe(
        lambda: Live(
            {"data": 30, "point": 12},
            budget_bytes=100,
            hits={"data": 3},
            misses={"data": 1},
            pending=6,
            pending_limit=64,
            in_flight=5,
            memory=[Memory("cuda:0", 1, 2)],
        )
    )
    metrics.evicted("point")
    clock.now += 2
    made.history.sample()
    found = ask(made)
    assert (found["state"], found["facts"], found["uptime"], found["time"]) == ("serving", {"version": "1.2"}, 2, 1102)
    now = found["now"]
    assert (now["products_per_second"], now["columns_per_second"], now["width"]) == (0.5, 2, 4)
    assert (now["pending"], now["pending_limit"], now["in_flight"], now["calls"], now["streams"]) == (6, 64, 5, 1, 2)
    assert (now["resident_bytes"], now["budget_bytes"]) == (42, 100)
    assert found["memory"] == [{"device": "cuda:0", "in_use_bytes": 1, "limit_bytes": 2}]
    kinds = {row["kind"]: row for row in found["residency"]}
    assert kinds["data"] == {"kind": "data", "bytes": 30, "hits": 3, "misses": 1, "evictions": 0}
    assert kinds["point"]["evictions"] == 1
    (tenant,) = found["tenants"]["rows"]
    assert (tenant["name"], tenant["products"], tenant["device_seconds"], tenant["device_share"]) == (
        "ann",
        1,
        0.5,
        0.25,
    )
    (objective,) = found["objectives"]["rows"]
    assert (objective["names"], objective["products"], objective["check"], objective["n"]) == (["a"], 1, "passed", 7)


def test_samples_are_sent_once_and_all_of_them_after_a_restart(status, clock):
    made = status()
    for _ in range(5):
        clock.now += 2
        made.history.sample()
    first = ask(made)
    assert [sample["i"] for sample in first["samples"]] == [1, 2, 3, 4, 5]
    clock.now += 2
    made.history.sample()
    assert [sample["i"] for sample in ask(made, instance=first["instance"], since=5)["samples"]] == [6]
    assert len(ask(made, instance="another", since=5)["samples"]) == 6
    assert len(ask(made, since=5)["samples"]) == 6


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "\u0663", "9" * 5000, " 1"])
def test_a_query_that_is_none_is_refused(since, status):
    with pytest.raises(ValueError, match=r"."):
        ask(status(), since=since)
    with pytest.raises(ValueError, match=r"."):
        status().pages()["/status.json"](Request("&".join(f"a{n}=1" for n in range(100)), None, None))


def test_of_a_thousand_objectives_the_busiest_are_sent_and_the_rest_can_be_found(status, metrics, clock):
    entries = [entry(number, f"team/m{number}") for number in range(1000)]
    made = status(*entries)
    for each in entries:
        metrics.named(each.digest, each.names[0])
    for _ in range(3):
        product(metrics, entries[700].digest)
    product(metrics, entries[300].digest)
    clock.now += 2
    made.history.sample()
    found = ask(made)
    objectives = found["objectives"]
    assert (objectives["total"], objectives["matching"], len(objectives["rows"])) == (1000, 1000, 50)
    assert [row["names"] for row in objectives["rows"][:2]] == [["team/m700"], ["team/m300"]]
    assert len(set(made.listing.asked)) == 50
    assert len(json.dumps(objectives)) < 30_000
    objectives = ask(made, filter=" M99")["objectives"]
    assert objectives["matching"] == len(objectives["rows"]) == 11
    assert ask(made, filter=entries[5].digest[:64])["objectives"]["rows"][0]["names"] == ["team/m5"]
    assert ask(made, filter="nothing")["objectives"]["matching"] == 0


def test_those_in_trouble_come_first_with_the_reason(status, metrics):
    busy, broken = entry(1, "busy"), entry(2, "broken")
    made = status(busy, broken, troubled={broken.digest: Facts(trouble="damaged", reason="a part is lost")})
    product(metrics, busy.digest)
    first, second = ask(made)["objectives"]["rows"]
    assert (first["names"], first["trouble"], first["reason"]) == (["broken"], "damaged", "a part is lost")
    assert (second["names"], second["trouble"]) == (["busy"], "")


def test_counts_under_a_moved_name_are_shown_once(status, metrics):
    old, new = entry(1), entry(2, "team/m")
    made = status(old, new)
    for each in (old, new):  # The name has moved from one to the other.
        metrics.named(each.digest, "team/m")
        product(metrics, each.digest)
    rows = {row["digest"]: row for row in ask(made)["objectives"]["rows"]}
    assert rows[new.digest]["products"] == 2
    assert rows[old.digest]["products"] is None
    assert rows[old.digest]["counted_as"] == "team/m"


def test_user_texts_are_sent_bounded_and_without_control_characters(status, metrics):
    shown = HOSTILE.replace("\u202e\x00", r"\u202e\x00")
    made = status(entry(1, HOSTILE, *(f"name{n}" for n in range(100))))
    product(metrics, f"{1:064x}", tenant=HOSTILE)
    for number in range(300):
        error = ServiceError(Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", HOSTILE + "x" * 5000)
        metrics.failed(to_status(error), "GetObjective", f"{HOSTILE}{chr(97 + number % 26)}{'y' * (number // 26)}")
    found = ask(made)
    assert found["objectives"]["rows"][0]["names"][0] == shown
    assert len(found["objectives"]["rows"][0]["names"]) == 5
    assert found["objectives"]["rows"][0]["more_names"] == 96
    assert found["tenants"]["rows"][0]["name"] == shown
    assert len(found["failures"]) == 50
    assert all(failure["message"].startswith(shown) for failure in found["failures"])
    assert found["failures"][0]["method"] == "GetObjective"
    assert len(json.dumps(found)) < 100_000


def test_many_tenants_are_the_largest_of_them(status, metrics):
    for number in range(90):
        product(metrics, "a" * 64, tenant=f"tenant{number}", compute=1.0 + number)
    found = ask(status())["tenants"]
    assert (found["total"], len(found["rows"]), found["rows"][0]["name"]) == (90, 20, "tenant89")


def test_failures_that_clients_mend_by_themselves_are_marked(status, metrics):
    for reason in ("POINT_NOT_RESIDENT", "INTERNAL"):
        metrics.failed(to_status(ServiceError(Code.NOT_FOUND, reason, "it is gone")))
    found = {failure["reason"]: failure for failure in ask(status())["failures"]}
    assert found["POINT_NOT_RESIDENT"]["expected"]
    assert not found["INTERNAL"]["expected"]
    assert found["INTERNAL"]["tenant"] == "anonymous"


def test_the_data_for_all_readers_is_made_once_a_second(status, metrics, clock, monkeypatch):
    made = status()
    looked = []
    totals = metrics.totals
    monkeypatch.setattr(metrics, "totals", lambda: looked.append(1) or totals())
    for number in range(20):
        ask(made, filter=f"x{number}")
    assert len(looked) == 1
    clock.now += 1
    ask(made)
    assert len(looked) == 2


def test_a_real_store_is_shown(open_engine, rosen, clock):
    engine = open_engine(rosen)
    engine.store.add_objective(rosen.export.digest, "team/rosen")
    derivation = engine.objectives.derivation
    catalogue = Catalogue(engine.store, engine.checks, Quarantine(engine.store.root, 1), derivation)
    made = Status({}, lambda: "warming", engine.metrics, History(engine.metrics), catalogue)
    (row,) = ask(made)["objectives"]["rows"]
    assert (row["names"], row["n"], row["dtype"], row["products"]) == (["team/rosen"], 7, "float64", 0)
    Quarantine(engine.store.root, 1).strike(rosen.export.digest, "it never ended")
    made = Status(
        {},
        lambda: "serving",
        engine.metrics,
        History(engine.metrics),
        Catalogue(engine.store, engine.checks, Quarantine(engine.store.root, 1), derivation),
    )
    (row,) = ask(made)["objectives"]["rows"]
    assert (row["trouble"], row["n"]) == ("quarantined", 7)
    assert "it never ended" in row["reason"]


# The files


@pytest.fixture
def files(status):
    return {path: page(Request("", None, None)) for path, page in status().pages().items() if path != "/status.json"}


def test_the_page_has_nothing_of_others_and_nothing_that_its_policy_forbids(files):
    page = files["/"].body.decode()
    assert page.startswith("<!doctype html>")
    assert not re.findall(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>[^<]", page) == []
    for path in re.findall(r"(?:src|href)=\"([^\"]*)\"", page):
        assert f"/{path}" in {*files, "/metrics"}
    for answer in files.values():
        assert set(re.findall(r"https?://[^\s\"]+", answer.body.decode())) <= {"http://www.w3.org/2000/svg"}


def test_the_script_sets_text_and_no_html(files):
    script = files["/status.js"].body.decode()
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|console\.", script
    )


def test_each_id_that_the_script_looks_for_is_there(files):
    wanted = set(re.findall(r"find\(\"([\w-]+)\"\)", files["/status.js"].body.decode()))
    wanted |= set(re.findall(r"new Table\(\"([\w-]+)\"", files["/status.js"].body.decode()))
    found = re.findall(r"\bid=\"([\w-]+)\"", files["/"].body.decode())
    assert len(wanted) > 10
    assert wanted <= set(found)
    assert len(found) == len(set(found))


def test_each_class_and_colour_is_defined(files):
    styles = files["/status.css"].body.decode()
    assert set(re.findall(r"var\((--[\w-]+)\)", styles)) <= set(re.findall(r"(--[\w-]+):", styles))
    for name in re.findall(r"class=\"(\w+)\"", files["/"].body.decode()):
        assert f".{name}" in styles


def test_content_types_are_those_of_the_files(files):
    assert {path: answer.content_type.partition(";")[0] for path, answer in files.items()} == {
        "/": "text/html",
        "/status.js": "text/javascript",
        "/status.css": "text/css",
        "/icon.svg": "image/svg+xml",
    }
