"""Progress of long work. The delay before it is shown is shortened here."""

import logging
import sys
import threading

import pytest

import hvpd
from hvpd import _progress
from hvpd._progress import Reporter, reporter
from tests.support.threads import no_threads
from tests.support.waiting import until

WAIT = 60.0


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_progress, "DELAY", 0.0)
    monkeypatch.setattr(_progress, "_INTERVAL", 0.001)


def test_long_work_is_shown_until_its_end(quick):
    shown, seen = [], threading.Event()

    def show(progress):
        shown.append(progress)
        seen.set()

    with reporter(show).stage("uploading", 10, "B") as stage:
        stage.done = 4
        assert seen.wait(WAIT)
    first, last = shown[0], shown[-1]
    assert (first.stage, first.total, first.unit, first.finished) == ("uploading", 10, "B", False)
    assert (last.done, last.finished) == (4, True)
    assert [each.finished for each in shown].count(True) == 1


def test_short_work_is_not_shown():
    shown = []
    with reporter(shown.append).stage("tracing"):
        pass
    assert shown == []


def test_work_that_fails_ends_its_progress(quick):
    shown, seen = [], threading.Event()
    with pytest.raises(ZeroDivisionError), reporter(lambda each: (shown.append(each), seen.set())).stage("tracing"):
        assert seen.wait(WAIT)
        raise ZeroDivisionError
    assert shown[-1].finished


def test_an_error_of_the_function_ends_only_the_progress(quick, caplog):
    called = threading.Event()

    def broken(progress):
        called.set()
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR, "hvpd"):
        found = reporter(broken)
        with found.stage("tracing"):
            assert called.wait(WAIT)
        called.clear()
        with found.stage("again"):
            pass
    assert not called.is_set()
    assert len(caplog.records) == 1


def test_without_a_function_there_is_no_thread():
    before = threading.active_count()
    with Reporter().stage("tracing"):
        assert threading.active_count() == before


def test_bars_show_the_stage_and_the_count(quick, capsys):
    seen = threading.Event()
    bars = _progress._Bars()

    def show(stage, progress):
        bars(stage, progress)
        seen.set()

    with Reporter(show).stage("uploading", 2048, "B") as stage:
        stage.done = 1024
        assert seen.wait(WAIT)
    assert "hvpd: uploading" in capsys.readouterr().err


@pytest.mark.parametrize(("unit", "says"), [("products", "7 products ["), ("B", "7.00B [")])
def test_a_bar_shows_a_count_and_its_unit(unit, says):
    bar = _progress._bar(_progress.Progress("sparse", 0, None, unit, 1.0, finished=False))
    bar.n = 7
    assert says in str(bar)
    bar.close()


def test_a_notebook_without_ipywidgets_gets_bars_without_a_warning(quick, monkeypatch):
    """tqdm.auto imports the package, and warns if that fails."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # An import fails.
    bar = _progress._bar(_progress.Progress("tracing", 0, None, "", 1.0, finished=False))
    assert bar.desc.startswith("hvpd: tracing")
    bar.close()


def test_a_missing_tqdm_is_an_error_only_if_bars_are_demanded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reporter(None)
    with pytest.raises(hvpd.MissingExtraError, match=r"pip install 'hvpd\[progress\]'"):
        reporter(True)


@pytest.mark.parametrize("progress", [1, "bars", object()])
def test_something_that_is_no_function_is_refused(progress):
    with pytest.raises(hvpd.InvalidArgumentError, match="progress must be a function, True, False or None"):
        reporter(progress)


def test_work_without_a_thread_for_its_progress_goes_on(quick):
    shown = []
    progress = reporter(shown.append)
    with no_threads(), progress.stage("tracing"):
        pass
    assert shown == []
    with progress.stage("tracing"):
        until(lambda: shown)
