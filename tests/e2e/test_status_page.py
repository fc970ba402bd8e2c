"""The status page in Debian's headless chromium. The test speaks the DevTools protocol
over a pipe, which needs no package.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import hvpd
from hvpd_server.errors import Code, ServiceError, to_status
from hvpd_server.status_page.history import History
from hvpd_server.status_page.http_server import HttpServer
from hvpd_server.status_page.objectives import Entry, Facts
from hvpd_server.status_page.page import Status
from hvpd_server.telemetry.metrics import Metrics, ProductRecord
from hvpd_server.telemetry.readings import Live, Memory
from tests.support.objectives import quadratic

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 120.0

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

PIPE = """
import os, sys
for there, here in ((100, int(sys.argv[1])), (101, int(sys.argv[2])), (3, 100), (4, 101)):
    os.dup2(here, there)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""A script that starts a program with two descriptors as its 3 and 4."""

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)


class Browser:
    """A chromium process. https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, profile):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", PIPE, str(theirs_in), str(theirs_out)),
                *(CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers = itertools.count(1)
        self._rest = b""
        self.events = []

    def call(self, method, session=None, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (found := self._receive()).get("id") != number:
            self.events.append(found)
        assert "error" not in found, found["error"]
        return found["result"]

    def _receive(self):
        while b"\0" not in self._rest:
            readable, _, _ = select.select([self._in], [], [], WAIT)
            piece = os.read(self._in, 1 << 20) if readable else b""
            assert piece, "the browser says nothing"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def close(self):
        try:
            self.call("Browser.close")
            self._process.wait(WAIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(WAIT)
            os.close(self._in)
            os.close(self._out)


class Tab:
    """A page, by default as large as a phone."""

    def __init__(self, browser, address):
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._target = target
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.size(360, 740, mobile=True)
        self.call("Page.navigate", url=address)
        self.until("location.protocol === 'http:' && document.readyState === 'complete'")

    def call(self, method, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def size(self, width, height, *, mobile):
        self._width = width
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def value(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression):
        """Ask until a condition holds."""
        ends = time.monotonic() + WAIT
        while not self.value(expression):
            assert time.monotonic() < ends, f"never: {expression}; the page says {self.text()}"

    def fits(self):
        """Return whether nothing is wider than the window. Wide content makes a phone's
        window wider, too.
        """
        return self.value("document.documentElement.scrollWidth") <= self._width

    def text(self, selector="body"):
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def said(self):
        """Return the console's messages, and errors that were not caught."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [
            event["params"]
            for event in self._browser.events
            if event["method"] in kinds and event.get("sessionId") == self._session
        ]

    def close(self):
        self._browser.call("Target.closeTarget", targetId=self._target)


@pytest.fixture(scope="module")
def browser():
    # Its last processes may write there for a moment after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        with contextlib.closing(Browser(profile)) as opened:
            yield opened


@pytest.fixture
def tab(browser):
    """Yield a function that opens pages."""
    with contextlib.ExitStack() as stack:
        yield lambda address: stack.enter_context(contextlib.closing(Tab(browser, address)))


TILE = "[...document.querySelectorAll('.tile')].find((tile) => tile.innerText.startsWith({name}))"


def tile(tab, name):
    """Return the value of a tile."""
    found = TILE.format(name=json.dumps(name))
    return tab.value(f"({found})?.querySelector('.value').innerText")


DRAWN = "document.querySelectorAll('tbody tr').length > 0 && document.querySelectorAll('.tile').length > 5"


# Against a server that works


def page_of(server):
    return next(line for line in reversed(server.lines) if "hvpd: status page on " in line).split(" on ")[1]


@contextlib.contextmanager
def load(address):
    """Run a client that asks for many products a second, of an objective that is
    registered here.
    """
    with hvpd.connect(address) as client:
        objective = client.register(quadratic, np.zeros(20), np.eye(20), name="watched/quadratic")
        with pytest.raises(hvpd.NotFoundError):
            client.objective("<b>nobody</b>")
        H = objective.at(np.zeros(20)).hessian()
        stop = threading.Event()

        def ask():
            while not stop.wait(0.01):  # The browser needs the CPU, too.
                H @ np.ones((20, 3))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            stop.set()
            asking.join(WAIT)


def test_the_page_shows_the_load_and_that_the_server_is_gone_and_back(serve, tab):
    server = serve(supervised=True)
    page = tab(page_of(server))
    page.until("document.querySelector('#state').innerText === 'serving'")
    with load(server.address):
        busy = TILE.format(name="'Vectors a second'")
        page.until(f"Number(({busy})?.querySelector('.value').innerText.replace(',', '')) > 0")
        page.until("document.querySelector('#objectives tbody')?.innerText.includes('watched/quadratic')")
        page.until("document.querySelector('#tenants tbody')?.innerText.includes('anonymous')")
        page.until("document.querySelectorAll('.chart .line').length >= 8")
        page.until("document.querySelectorAll('.chart .column').length >= 1")
        assert float(tile(page, "Products a second").replace(",", "")) > 0
        assert float(tile(page, "Mean batch width")) >= 3
        assert hvpd.__version__ in page.text("#facts")
        assert "no objective of name '<b>nobody</b>'" in page.text("#errors")
        assert "GetObjective" in page.text("#errors")
        assert page.fits()
        page.size(1280, 900, mobile=False)
        page.until("innerWidth === 1280")
        assert page.fits()
        assert page.said() == []
        pid = server.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), signal.SIGSTOP)  # Killed, it could be back before the page looks again.
        page.until("!document.querySelector('#lost').hidden")
        assert "does not answer since" in page.text("#lost")
        assert page.text("#state") == page.value("document.title").partition(" · ")[0] == "no answer"
        assert "watched/quadratic" in page.text("#objectives")
        os.kill(int(child), signal.SIGKILL)
        page.until("document.querySelector('#state').innerText === 'serving'")
        page.until(f"Number(({busy})?.querySelector('.value').innerText.replace(',', '')) > 0")
        assert page.value("document.querySelector('#lost').hidden")
    assert server.terminate() == 0
    page.until("!document.querySelector('#lost').hidden")


# Hostile contents, which a real server would refuse


HOSTILE = '<img src=x onerror="window.hit = 1"><script>window.hit = 1</script>'


class Listing:
    def __init__(self, names):
        self._entries = [Entry(f"{number:064x}", [name], 1e9) for number, name in enumerate(names)]

    def entries(self):
        return self._entries

    def facts(self, digest):
        number = int(digest, 16)
        return Facts(
            10**number if number < 9 else number, "float32", "forward_over_reverse", "highest", "failed", HOSTILE
        )

    def troubled(self):
        return {self._entries[0].digest: Facts(trouble="quarantined", reason=f"it is {HOSTILE}")}


@pytest.fixture
def shown(tab):
    """Open a page of these objectives, whose tenants and errors are hostile, too."""
    with contextlib.ExitStack() as stack:

        def shown(*names):
            metrics, clock = Metrics(), itertools.count(1)
            metrics.observe(
                lambda: Live(
                    {"data": 7 << 40},
                    budget_bytes=9 << 40,
                    hits={"data": 1},
                    misses={HOSTILE: 1},
                    pending=5,
                    pending_limit=9,
                    in_flight=3,
                    memory=[Memory(HOSTILE, 1, 2)],
                )
            )
            history = History(metrics, lambda: 2.0 * next(clock))
            for number, name in enumerate(names[:20]):
                metrics.named(f"{number:064x}", name)
                record = ProductRecord(f"{number:064x}", f"{HOSTILE}{number}", 2, 2, 0.001, 0.299, 0.0, 0.3)
                metrics.product(record)
                metrics.failed(
                    to_status(ServiceError(Code.NOT_FOUND, HOSTILE, f"{HOSTILE} {'x' * number}")), HOSTILE, HOSTILE
                )
            for _ in range(30):
                history.sample()
            facts = dict.fromkeys(("version", "jax", "platform", "device", "devices", "address"), HOSTILE)
            status = Status(facts, lambda: "draining", metrics, history, Listing(names))
            web = HttpServer("127.0.0.1", 0, status.pages())
            web.start()
            stack.callback(web.close)
            page = tab(f"http://{web.address}/")
            page.until(DRAWN)
            return page

        yield shown


def test_user_texts_are_shown_as_text(shown):
    page = shown(HOSTILE, "long" * 50, "a b")
    for place in ("#objectives", "#tenants", "#errors", "#facts", "#residency"):
        assert HOSTILE in page.text(place), place
    assert page.text("#state") == "draining"
    assert page.value("document.scripts.length") == page.value("document.images.length") == 1
    assert page.value("window.hit") is None
    assert page.fits()
    assert page.said() == []


def test_the_policy_holds_even_if_the_script_would_not(shown):
    page = shown("a")
    refused = (
        "(() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (error) { return error.name; } })()"
    )
    assert page.value(refused) == "TypeError"


def test_of_a_thousand_objectives_some_are_shown_and_all_are_found(shown):
    page = shown(*(f"team/model{number}" for number in range(1000)))
    rows = "document.querySelectorAll('#objectives tbody tr').length"
    assert page.value(rows) == 12
    page.value("document.querySelector('#objectives .more').click()")
    assert page.value(rows) == 50
    assert "950 more" in page.text("#objectives-more")
    assert "quarantined" in page.text("#objectives tbody tr")
    page.value("document.querySelector('#filter').focus()")
    page.call("Input.insertText", text="model777")
    page.until(f"{rows} === 1")
    assert "team/model777" in page.text("#objectives tbody")
    assert "1 of 1,000 match" in page.text("#objectives-more")
    assert page.fits()


def press(page, key):
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


def test_charts_are_told_in_words_and_read_by_keys(shown):
    page = shown("a", "b")
    labels = page.value("[...document.querySelectorAll('.chart svg')].map((svg) => svg.getAttribute('aria-label'))")
    assert len(labels) == 4
    assert all(label.endswith(".") and "5 min" in label for label in labels)
    assert "≤" in labels[2] or "width 2: 100 %" in labels[2]
    when = "document.querySelector('.chart .when').innerText"
    page.value("document.querySelector('.chart svg').focus()")
    assert page.value(when) == ""
    press(page, "ArrowLeft")
    page.until(f"{when} !== ''")
    press(page, "Escape")
    page.until(f"{when} === ''")


def test_tables_have_captions_headings_and_roles(shown):
    page = shown("a")
    assert page.value(
        "[...document.querySelectorAll('table')].every((table) => table.caption && table.getAttribute('role'))"
    )
    assert page.value("[...document.querySelectorAll('thead th')].every((cell) => cell.scope === 'col')")
    assert page.value("[...document.querySelectorAll('tbody th')].every((cell) => cell.scope === 'row')")
    assert page.value("document.querySelectorAll('h1').length") == 1


def test_the_page_rests_while_it_is_hidden(shown):
    page = shown("a")
    page.until("page.timer !== 0")
    for hidden in (True, False):
        page.value(f"Object.defineProperty(document, 'hidden', {{ value: {json.dumps(hidden)}, configurable: true }})")
        page.value("document.dispatchEvent(new Event('visibilitychange'))")
        page.until(f"(page.timer === 0) === {json.dumps(hidden)}")


@pytest.mark.parametrize("width", [320, 360, 414, 768, 1024, 1280, 1920])
def test_no_width_is_too_small(width, shown):
    page = shown(HOSTILE, "long" * 50, *(f"team/model{number}" for number in range(40)))
    page.size(width, 740, mobile=width < 700)
    page.until(f"innerWidth === {width}")
    page.value("document.querySelectorAll('.more').forEach((button) => button.click())")
    assert page.fits()
    page.value("document.querySelector('h1').style.paddingRight = '2000px'")
    assert not page.fits()  # The test would see it.
    assert page.said() == []


HOLES = """(() => {
  const places = [...document.querySelectorAll('.chart')].map((chart) => chart.getBoundingClientRect());
  const grid = document.querySelector('.charts').getBoundingClientRect();
  const row = (place) => places.filter((each) => Math.abs(each.top - place.top) < 1);
  return places.filter((place) => Math.abs(Math.max(...row(place).map((each) => each.right)) - grid.right) > 1).length;
})()"""
"""How many charts are in a row that does not reach the right edge."""

BROKEN = r"""(() => {
  const broken = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT, (node) => (
    node.parentElement.closest('th, td') ? NodeFilter.FILTER_ACCEPT : NodeFilter.FILTER_SKIP));
  while (texts.nextNode()) {
    const range = document.createRange();
    for (const { 0: word, index } of texts.currentNode.data.matchAll(/[^\s\u200b/-]+/g)) {
      range.setStart(texts.currentNode, index);
      range.setEnd(texts.currentNode, index + word.length);
      if (word.length <= 18 && new Set([...range.getClientRects()].map((each) => each.top)).size > 1) broken.push(word);
    }
  }
  return broken;
})()"""
"""Words of at most 18 characters in tables that are on two lines."""

CLIPPED = """[...document.querySelectorAll('table')].filter((table) => (
  table.scrollWidth > table.parentElement.clientWidth)).map((table) => table.parentElement.id)"""
"""The tables that are wider than their place."""


@pytest.mark.parametrize("width", [320, 390, 759, 760, 999, 1000, 1280, 1920])
def test_no_hole_is_between_charts_and_no_word_is_broken(width, shown):
    page = shown("team/quadratic", "long" * 50, *(f"team/classifier-of-digits{number}" for number in range(12)))
    page.size(width, 740, mobile=width < 700)
    page.until(f"innerWidth === {width}")
    assert page.value(HOLES) == 0
    assert page.value(BROKEN) == []
    assert page.value(CLIPPED) == []
    # The test would see them.
    page.value("document.querySelector('.chart').remove()")
    page.value("document.querySelector('.charts').style.gridTemplateColumns = '1fr 1fr'")
    narrow = "'display: inline-block; max-width: 3ch; overflow-wrap: anywhere'"
    page.value(f"document.querySelector('#objectives tbody th .text').style.cssText = {narrow}")
    assert page.value(HOLES) == 1
    assert page.value(BROKEN) != []


CONTRAST = """(() => {
  const rgb = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return { r, g, b, a }; };
  const light = ({ r, g, b }) => [r, g, b].map((part) => part / 255).map((part) => (
    part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)).reduce((sum, part, index) => (
    sum + part * [0.2126, 0.7152, 0.0722][index]), 0);
  const behind = (node) => {
    const color = rgb(getComputedStyle(node).backgroundColor);
    return color.a === 1 || !node.parentElement ? color : behind(node.parentElement);
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const node of document.querySelectorAll('body *')) {
    const style = getComputedStyle(node), svg = node instanceof SVGElement;
    const said = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
    const drawn = node.matches('.line');
    if ((!said && !drawn) || !node.checkVisibility()) continue;
    const color = rgb(drawn ? style.stroke : svg ? style.fill : style.color);
    const opacity = Number(style.opacity) * Number(drawn ? style.strokeOpacity : 1);
    found.push([ratio(color, behind(node)), `${node.tagName}.${node.getAttribute('class')}`, drawn, opacity]);
  }
  return found;
})()"""
"""The contrast of each text and line with its background, by WCAG 2's formula."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out_in_light_and_dark(scheme, shown):
    page = shown("a", "b")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.until(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
    found = page.value(CONTRAST)
    assert {drawn for _, _, drawn, _ in found} == {True, False}
    assert [each for each in found if each[3] != 1 or each[0] < (3.0 if each[2] else 4.5)] == []
    page.value("document.querySelector('h1').style.color = '#777'")
    assert [name for ratio, name, _, _ in page.value(CONTRAST) if name == "H1.null" and ratio < 4.5]


def test_the_line_of_p99_can_be_seen(shown):
    page = shown("a", "b")
    thin = "getComputedStyle(document.querySelector('.line.thin'))"
    assert page.value(f"parseFloat({thin}.strokeWidth)") >= 1.5
    assert page.value(f"{thin}.strokeOpacity") == "1"
    assert page.value(f"{thin}.strokeDasharray") != "none"
    assert "p99 (dashed)" in page.text("#charts")
