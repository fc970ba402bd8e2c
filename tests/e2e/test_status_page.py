"""The status page in a browser: Debian's chromium without a screen, spoken to by the DevTools protocol over a pipe, which takes no
package.
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
import types
from pathlib import Path

import numpy as np
import pytest

import hvpd
from hvpd_server._batcher import Job
from hvpd_server._catalogue import Entry, Facts
from hvpd_server._errors import Code, ServiceError, to_status
from hvpd_server._history import History
from hvpd_server._metrics import Live, Memory, Metrics
from hvpd_server._status import Status
from hvpd_server._web import Door

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 120.0

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

PIPE = """
import os, sys
for there, here in ((100, int(sys.argv[1])), (101, int(sys.argv[2])), (3, 100), (4, 101)):
    os.dup2(here, there)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a program with two descriptors as its 3 and 4."""

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)


class Browser:
    """A chromium of one's own. https://chromedevtools.github.io/devtools-protocol/"""

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
    """One page, as large as a phone unless it is told otherwise."""

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
        """Asks until it is so."""
        ends = time.monotonic() + WAIT
        while not self.value(expression):
            assert time.monotonic() < ends, f"never: {expression}; the page says {self.text()}"

    def fits(self):
        """Whether nothing is wider than the window. What is makes the window of a phone wider, too."""
        return self.value("document.documentElement.scrollWidth") <= self._width

    def text(self, selector="body"):
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def said(self):
        """What the console has, and errors that nobody caught."""
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
    """Opens pages."""
    with contextlib.ExitStack() as stack:
        yield lambda address: stack.enter_context(contextlib.closing(Tab(browser, address)))


TILE = "[...document.querySelectorAll('.tile')].find((tile) => tile.innerText.startsWith({name}))"


def tile(tab, name):
    """The value of a tile."""
    found = TILE.format(name=json.dumps(name))
    return tab.value(f"({found})?.querySelector('.value').innerText")


DRAWN = "document.querySelectorAll('tbody tr').length > 0 && document.querySelectorAll('.tile').length > 5"


# Against a server that works


def quadratic(x, A):
    return x @ A @ x / 2


def page_of(server):
    return next(line for line in reversed(server.lines) if "hvpd: status page on " in line).split(" on ")[1]


@contextlib.contextmanager
def load(address):
    """Somebody who asks for products all the time, of an objective that is registered here."""
    with hvpd.connect(address) as client:
        objective = client.register(quadratic, np.zeros(20), np.eye(20), name="watched/quadratic")
        with pytest.raises(hvpd.NotFoundError):
            client.objective("<b>nobody</b>")
        H = objective.at(np.zeros(20)).hessian()
        stop = threading.Event()

        def ask():
            while not stop.is_set():
                H @ np.ones((20, 3))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            stop.set()
            asking.join(WAIT)


def test_it_shows_what_a_server_does_and_that_it_is_gone_and_back(serve, tab):
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


# With what no server would let itself be given


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
    """A page of these objectives, whose tenants and errors are hostile, too."""
    with contextlib.ExitStack() as stack:

        def shown(*names):
            metrics, clock = Metrics(), itertools.count(1)
            metrics.observe(
                lambda: Live({"data": 7 << 40}, 9 << 40, {"data": 1}, {HOSTILE: 1}, 5, 9, 3, [Memory(HOSTILE, 1, 2)])
            )
            history = History(metrics, lambda: 2.0 * next(clock))
            for number, name in enumerate(names[:20]):
                metrics.named(f"{number:064x}", name)
                point = types.SimpleNamespace(objective=types.SimpleNamespace(digest=f"{number:064x}"))
                job = Job((), np.zeros((2, 1)), f"{HOSTILE}{number}", point=point, width=2)
                job.queued, job.started, job.finished = 0.0, 0.001, 0.3
                metrics.product(job)
                metrics.failed(
                    to_status(ServiceError(Code.NOT_FOUND, HOSTILE, f"{HOSTILE} {'x' * number}")), HOSTILE, HOSTILE
                )
            for _ in range(30):
                history.sample()
            facts = dict.fromkeys(("version", "jax", "platform", "device", "devices", "address"), HOSTILE)
            status = Status(facts, lambda: "draining", metrics, history, Listing(names))
            door = Door("127.0.0.1", 0, status.pages())
            door.start()
            stack.callback(door.close)
            page = tab(f"http://{door.address}/")
            page.until(DRAWN)
            return page

        yield shown


def test_what_users_have_chosen_is_text(shown):
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


def test_it_rests_while_nobody_looks(shown):
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
    assert not page.fits()  # It would be seen.
    assert page.said() == []
