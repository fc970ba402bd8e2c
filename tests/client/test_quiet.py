"""A failed handshake gives hvpd's error, without lines of gRPC's core before it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

PROGRAM = """
import os, sys
import hvpd
from hvpd._errors import UnavailableError

try:
    hvpd.connect(sys.argv[1], tls=True, connect_timeout=5)
except UnavailableError as error:
    print(error.reason, os.environ.get("GRPC_VERBOSITY"))
"""


@pytest.fixture(scope="module")
def plain():
    """Yield the address of a server without TLS."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("verbosity", [None, "INFO"])
def test_grpc_is_quiet_unless_the_user_chose_a_verbosity(plain, verbosity):
    others = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    chosen = {} if verbosity is None else {"GRPC_VERBOSITY": verbosity}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, plain], check=True, env=others | chosen, capture_output=True, text=True
    )
    # The variable is as before, for programs that this process starts.
    assert done.stdout == f"TLS {verbosity}\n"
    assert ("Handshake failed" in done.stderr) is (verbosity is not None), done.stderr
