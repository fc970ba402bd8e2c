"""Progress of work that takes longer than a second, as bars or by a function.

Work that ends sooner is never shown. One thread for each client looks at running work,
and only while there is some.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hvpd._errors import InvalidArgumentError, MissingExtraError

_log = logging.getLogger("hvpd")

DELAY = 1.0
"""Seconds of work before its progress is shown."""

_INTERVAL = 0.25
"""Seconds between two updates."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Work that has taken longer than a second; see `connect(progress=...)`.

    Example:
        >>> def show(progress):
        ...     print(progress.stage, f"{progress.seconds:.0f} s")
        >>> client = hvpd.connect("gpu-box:7070", progress=show)
    """

    stage: str
    """Kind of work, in words: "tracing", "uploading", "compiling", ..."""
    done: float
    """Units that are done; 0 if nothing is counted."""
    total: float | None
    """Units in all; None if it is not known."""
    unit: str
    """"B" for bytes, "products", or empty."""
    seconds: float
    """Seconds since the work began."""
    finished: bool
    """Whether this is the last call for this work."""


Show = Callable[["Stage", Progress], None]
"""Shows the progress of one piece of work."""


class Stage:
    """One piece of work.

    Attributes:
        name: Kind of work, in words. May change.
        done: Units that are done. The work counts them.
        total: Units in all; None if it is not known. May change.
        unit: Name of the unit.
    """

    def __init__(self, name: str, total: float | None = None, unit: str = "") -> None:
        self.name = name
        self.done = 0.0
        self.total = total
        self.unit = unit
        self.began = time.monotonic()
        self.shown = False
        """Whether its progress has been shown."""

    def progress(self, *, finished: bool = False) -> Progress:
        """Return the progress as it is now."""
        seconds = time.monotonic() - self.began
        return Progress(self.name, self.done, self.total, self.unit, seconds, finished)


class Reporter:
    """Shows the progress of one client's work.

    Args:
        show: Shows it; called by a thread of this class, and by the thread that ends
            the work. None: nothing is shown.
    """

    def __init__(self, show: Show | None = None) -> None:
        self._show = show
        self._lock = threading.Lock()
        """Held to change the next, and while progress is shown."""
        self._running: list[Stage] = []
        self._begun = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def stage(self, name: str, total: float | None = None, unit: str = "") -> Iterator[Stage]:
        """Show the progress of the body of a `with` statement."""
        stage = self.begin(name, total, unit)
        try:
            yield stage
        finally:
            self.end(stage)

    def begin(self, name: str, total: float | None = None, unit: str = "") -> Stage:
        """Show the progress of work from now on, until `end`."""
        stage = Stage(name, total, unit)
        if self._show is not None:
            with self._lock:
                self._running.append(stage)
                if self._thread is None:
                    thread = threading.Thread(target=self._watch, name="hvpd-progress", daemon=True)
                    with contextlib.suppress(RuntimeError):  # The system has no more threads.
                        thread.start()
                        self._thread = thread
            self._begun.set()
        return stage

    def end(self, stage: Stage) -> None:
        """Stop to show the progress of work."""
        if self._show is not None:
            with self._lock:
                if stage in self._running:
                    self._running.remove(stage)
                if stage.shown:
                    self._try(stage, finished=True)

    def _watch(self) -> None:
        while True:
            self._begun.wait()
            time.sleep(_INTERVAL)
            with self._lock:
                if not self._running:
                    self._begun.clear()
                for stage in self._running:
                    if time.monotonic() - stage.began >= DELAY:
                        stage.shown = True
                        self._try(stage)

    def _try(self, stage: Stage, *, finished: bool = False) -> None:
        if self._show is None:
            return
        try:
            self._show(stage, stage.progress(finished=finished))
        except Exception:  # noqa: BLE001 - nothing may fail because of its progress
            _log.exception("progress cannot be shown, and is not shown any more")
            self._show = None


def reporter(progress: object) -> Reporter:
    """Return the reporter that `connect(progress=...)` asks for.

    Args:
        progress: A function, or True for bars, or False for nothing. None for bars if a
            person watches, and tqdm is installed.

    Raises:
        InvalidArgumentError: It is none of these.
        MissingExtraError: It is True, and tqdm is not installed.
    """
    if progress is None:
        return Reporter(_Bars() if importlib.util.find_spec("tqdm") and _is_watched() else None)
    if progress is False:
        return Reporter()
    if progress is True:
        if not importlib.util.find_spec("tqdm"):
            raise MissingExtraError("progress bars need tqdm: pip install 'hvpd[progress]', or pass a function")
        return Reporter(_Bars())
    if not callable(progress):
        raise InvalidArgumentError(
            f"progress must be a function, True, False or None, got {progress!r}", reason="INVALID_OPTION"
        )
    call: Callable[[Progress], object] = progress

    def show(_: Stage, found: Progress) -> None:
        call(found)

    return Reporter(show)


def _is_watched() -> bool:
    """Return whether stderr is a terminal, or this is a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"


class _Bars:
    """One bar of tqdm for each piece of work. The bar goes when the work ends."""

    def __init__(self) -> None:
        self._bars: dict[int, Any] = {}

    def __call__(self, stage: Stage, progress: Progress) -> None:
        bar = self._bars.get(id(stage))
        if bar is None:
            bar = self._bars[id(stage)] = _bar(progress)
            bar.start_t -= progress.seconds
        bar.set_description_str(f"hvpd: {progress.stage}", refresh=False)
        bar.total, bar.n = progress.total, progress.done
        bar.refresh()
        if progress.finished:
            self._bars.pop(id(stage)).close()


def _bar(progress: Progress) -> Any:
    # In a notebook without ipywidgets, tqdm.auto would warn.
    tqdm = importlib.import_module("tqdm.auto" if importlib.util.find_spec("ipywidgets") else "tqdm").tqdm
    counted = progress.total is not None or progress.unit
    return tqdm(
        desc=f"hvpd: {progress.stage}",
        total=progress.total,
        unit=progress.unit if progress.unit == "B" else f" {progress.unit}",
        unit_scale=progress.unit == "B",
        unit_divisor=1024,
        leave=False,
        dynamic_ncols=True,
        bar_format=None if counted else "{desc} {elapsed}",
    )
