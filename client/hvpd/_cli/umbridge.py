"""`hvpd umbridge`: objectives as models of UM-Bridge."""

import argparse
import signal
import sys
import threading

from hvpd._cli.common import connect, connection, show
from hvpd._errors import InvalidArgumentError
from hvpd._transport.address import is_local


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    umbridge = commands.add_parser(
        "umbridge",
        help="serve objectives by UM-Bridge, for its clients in C++, Python, R, Julia, MATLAB and MUQ",
        description="Stand in front of a server, and answer UM-Bridge requests until SIGTERM or Ctrl-C: Evaluate, Gradient, "
        "ApplyJacobian and ApplyHessian. A model has one input for each leaf of x, and one output. `hvpd: UM-Bridge on URL` on stderr "
        "says that it is ready.",
    )
    umbridge.add_argument("name", metavar="NAME", nargs="+", help="names or digests of the objectives")
    umbridge.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    umbridge.add_argument(
        "--port", type=int, default=4242, help="port to listen on; 0 picks a free one (default: 4242)"
    )
    umbridge.add_argument(
        "--retry-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long a request waits while the hvpd server is away (default: 60)",
    )
    connection(umbridge)
    umbridge.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hvpd._umbridge.http_server import UmbridgeServer
    from hvpd._umbridge.model import Model

    if not 0 <= arguments.port < 1 << 16:
        raise InvalidArgumentError(f"--port must be from 0 to 65535, got {arguments.port}", reason="INVALID_OPTION")
    names = list(dict.fromkeys(arguments.name))
    with connect(arguments, retry_timeout=arguments.retry_timeout) as client:
        models = [Model(name, client.objective(name)) for name in names]
        try:
            server = UmbridgeServer(models, arguments.host, arguments.port)
        except OSError as error:
            raise InvalidArgumentError(
                f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror or error}: choose another --host or --port",
                reason="ADDRESS",
            ) from None
        with server:
            if not is_local(arguments.host):
                show(
                    "hvpd: warning: UM-Bridge has no tokens: everyone who reaches this port can use the objectives",
                    sys.stderr,
                )
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: _stop(server))
                signal.signal(signal.SIGINT, lambda *_: _stop(server))
            show(f"hvpd: UM-Bridge on {server.url}: {', '.join(names)}", sys.stderr)
            server.serve_forever(poll_interval=0.1)
    return 0


def _stop(server: "object") -> None:
    # `shutdown` waits for the loop, which runs in this thread.
    threading.Thread(target=server.shutdown, daemon=True).start()  # type: ignore[attr-defined]
