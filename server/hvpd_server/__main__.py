"""`python -m hvpd_server`: what `hvpd.local()` starts, and the supervisor. People use `hvpd serve`."""

import os
import sys

from hvpd_server import _app, _config, _supervisor


def main() -> int:
    """Serves with the settings of the command line and the environment."""
    try:
        config = _config.load(_config.parse())
    except ValueError as error:
        print(f"hvpd: {error}", file=sys.stderr)  # noqa: T201
        return 2
    board = _supervisor.board_of()
    owned = os.environ.get("HVPD_OWNED")
    return _app.run(config, owner=sys.stdin.fileno() if owned else None, ephemeral=owned == "ephemeral", board=board)


if __name__ == "__main__":
    sys.exit(main())
