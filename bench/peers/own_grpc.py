"""hvpd without its vector port: products go by gRPC, as through a proxy."""

from contextlib import AbstractContextManager

from bench.peers import own
from bench.peers._peer import About
from bench.peers._spec import Spec

ABOUT = About("hvpd by gRPC", "own", "on the server", batches=True)


def serving(spec: Spec) -> AbstractContextManager[str]:
    """Start a server that offers no vector port."""
    return own.serving(spec, "--vector-port", "off")


connect = own.connect
