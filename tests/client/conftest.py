"""Threads that end with their test, and a point whose curvature is a dense matrix."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from hvpd._krylov.runner import Runner
from hvpd._progress import Reporter
from hvpd.v1 import curvature_pb2


class DensePoint:
    """A point whose curvature is `matrix`; `products` holds the width of each block."""

    def __init__(self, matrix, *, slices=None, kind=curvature_pb2.OPERATOR_HESSIAN):
        self.matrix = np.asarray(matrix)
        self.n, self.dtype = len(self.matrix), self.matrix.dtype
        self.products = []
        self.kind = kind
        self.reporter = Reporter()
        self.objective = SimpleNamespace(
            label="dense", digest="d1gest", precision="highest", slices=lambda: slices or {"": slice(0, self.n)}
        )

    def _runner(self, multiply, n, origin, asked, scale, shift, update):
        return Runner(multiply, n, self.dtype, origin=origin)

    def multiply(self, block, operator=curvature_pb2.OPERATOR_HESSIAN, seed=0, leaves=(), mode="", precision=""):
        assert operator == self.kind
        assert (mode, precision) == ("", "")
        spans = list(self.objective.slices().values())
        kept = np.concatenate([np.arange(spans[leaf].start, spans[leaf].stop) for leaf in leaves or range(len(spans))])
        assert block.dtype == self.dtype
        assert block.flags.c_contiguous
        assert block.shape[1:] == kept.shape
        self.products.append(len(block))
        return block @ self.matrix[np.ix_(kept, kept)]

    def quadratic_form(self, block, *asked):
        return np.einsum("kn,kn->k", block, self.multiply(block, *asked))


@pytest.fixture
def beside():
    """Run functions in threads, which have ended when the test ends."""
    threads = []

    def start(function, *args):
        threads.append(threading.Thread(target=function, args=args))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def dense_point():
    return DensePoint


@pytest.fixture
def spectrum():
    return _spectrum


def _spectrum(values, seed=0, dtype=np.float64):
    """Return a symmetric matrix with these eigenvalues, and its eigenvectors."""
    values = np.asarray(values, np.float64)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values),) * 2))
    matrix = (Q * values) @ Q.T
    return ((matrix + matrix.T) / 2).astype(dtype), Q
