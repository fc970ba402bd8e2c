"""Imports gRPC without the log lines of its core.

gRPC would print a line for each handshake that fails, before hvpd's own error says what
is wrong. gRPC reads $GRPC_VERBOSITY once, at its import. If the user set the variable,
or imported gRPC before, gRPC logs as it does.
"""

import os

_KEY = "GRPC_VERBOSITY"

if _KEY in os.environ:
    import grpc
else:
    os.environ[_KEY] = "NONE"
    try:
        import grpc
    finally:
        del os.environ[_KEY]  # Other programs that this process starts log as they do.

__all__ = ["grpc"]
