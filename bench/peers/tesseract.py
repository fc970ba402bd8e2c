"""Tesseract: a served gradient and its Jacobian-vector product, which is the Hessian's
product, by HTTP. It sends x with every vector, both in base64.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.peers._peer import About
from bench.peers._spec import PART, Given, Multiply, Spec, as_vector, free_port, listening

ABOUT = About("Tesseract", "peer", "sent with every vector", installed=True)


@contextlib.contextmanager
def serving(spec: Spec) -> Iterator[str]:
    """Run Tesseract's own server, with a process for each core."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="hvpd-bench-", ignore_cleanup_errors=True) as folder:
        environment = {
            "TESSERACT_API_PATH": str(Path(__file__).with_name("_tesseract_api.py")),
            "TESSERACT_OUTPUT_PATH": folder,
            "TESSERACT_OUTPUT_FORMAT": "json+base64",
            PART: spec.part,
        }
        cores = len(os.sched_getaffinity(0))
        command = [str(Path(sys.executable).with_name("tesseract-runtime")), "serve"]
        with subprocess.Popen(
            [*command, "--port", str(port), "--num-workers", str(cores)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as server:
            try:
                listening(port)
                yield f"127.0.0.1:{port}"
            finally:
                server.terminate()


def connect(address: str, given: Given) -> Multiply:
    """Return a call of the Jacobian-vector product."""
    from tesseract_core import Tesseract

    client = Tesseract.from_url(f"http://{address}")
    client.available_endpoints  # noqa: B018 - asks the server once, and not with the first product
    inputs = {"x": given.x}
    return lambda v: as_vector(
        client.jacobian_vector_product(inputs, ["x"], ["gradient"], {"x": v})["gradient"],
    )
