"""BentoML by HTTP, with adaptive batching. One service takes bytes, because BentoML
reads arrays from other machines only as JSON. The other makes batches and computes.
"""

import contextlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.peers._peer import About
from bench.peers._spec import PART, Given, Multiply, Spec, Vector, free_port

ABOUT = About("BentoML", "peer", "on the server", batches=True, installed=True)

_START_SECONDS = 170.0


@contextlib.contextmanager
def serving(spec: Spec) -> Iterator[str]:
    """Run BentoML's own server."""
    port = free_port()
    argv = [sys.executable, "-m", "bentoml", "serve", "bench.peers._bento_service:Vectors"]
    with subprocess.Popen(
        [*argv, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | {PART: spec.part, "BENTOML_DO_NOT_TRACK": "True"},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            _ready(port)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def _ready(port: int) -> None:
    """Wait until the server says that its services are ready. Its port may listen, and
    close again, before that.

    Raises:
        TimeoutError: It does not within `_START_SECONDS`.
    """
    ends = time.monotonic() + _START_SECONDS
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/readyz")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        if time.monotonic() > ends:
            raise TimeoutError(f"BentoML is not ready after {_START_SECONDS:g} s")
        time.sleep(0.05)


def connect(address: str, given: Given) -> Multiply:
    """Return a POST on a connection that stays open."""
    connection = http.client.HTTPConnection(address, timeout=120)
    headers = {"Content-Type": "application/octet-stream"}

    def multiply(v: Vector) -> Vector:
        connection.request("POST", "/multiply", v.tobytes(), headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(f"BentoML answered {answer.status}: {body[:200]!r}")
        return np.frombuffer(body, np.float32)

    return multiply
