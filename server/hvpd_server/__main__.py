"""`python -m hvpd_server`, which `hvpd.local()` and the supervisor start."""

import contextlib
import os
import sys

# Before the first import of NumPy, which reads it. Idle threads of OpenBLAS spin, and
# take the cores from XLA's threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Before the first import of gRPC, which reads it. gRPC would log each failed handshake
# of any stranger, without a limit.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from hvpd_server import config as _config
from hvpd_server import supervisor
from hvpd_server.admission.vetting import Vetter


def main() -> int:
    """Serve with the settings of the command line and the environment."""
    try:
        config = _config.load(_config.parse())
    except ValueError as error:
        print(f"hvpd: {error}", file=sys.stderr)  # noqa: T201
        return 2
    liveness = supervisor.liveness_of()
    owned = os.environ.get("HVPD_OWNED")
    if _config.in_group(config):
        from hvpd_server.device import forming

        try:
            config = forming.placed(config)
        except ValueError as error:
            print(f"hvpd: {error}", file=sys.stderr)  # noqa: T201
            return 2
        if config.rank:
            from hvpd_server import rank

            rank.run(config, owner=sys.stdin.fileno() if owned else None, liveness=liveness)
    vetter = Vetter()
    with contextlib.suppress(OSError):  # The first objective starts it then.
        vetter.start()  # Before this process imports jax, so that both import at the same time.
    from hvpd_server import process

    return process.run(
        config, vetter, owner=sys.stdin.fileno() if owned else None, ephemeral=owned == "ephemeral", liveness=liveness
    )


if __name__ == "__main__":
    sys.exit(main())
