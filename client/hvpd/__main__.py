"""`python -m hvpd`, the same as the command `hvpd`."""

import sys

from hvpd._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
