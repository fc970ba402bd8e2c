"""Fixtures of the lane's tests: a problem, and the record of its launches."""

import dataclasses

import numpy as np
import pytest

from hvpd._registration import export as _export
from hvpd_server.device.programs import Kernels
from tests.support.engine import ROWS, N, logistic


@pytest.fixture(scope="session")
def problem(make_example):
    rng = np.random.default_rng(4)
    features = rng.normal(size=(ROWS, N))
    return make_example(logistic, rng.normal(size=N) / 8, features, np.sign(features[:, 0]))


@pytest.fixture(scope="session")
def registered(problem):
    """Return a function that registers the same problem otherwise:
    registered(fixed_bucket=8).
    """

    def registered(fun=logistic, **options):
        options = {"platforms": ("cpu",), "precision": "highest"} | options
        return dataclasses.replace(problem, export=_export.export(fun, problem.x, problem.data, **options))

    return registered


@pytest.fixture
def calls(monkeypatch):
    """Record every (program, width) that runs, in order.
    `calls.instead(name, width, args)` goes first, if it is set. It may raise, give a
    result, for which it has `calls.real`, or return None for the real result.
    """

    class Calls(list):
        instead = staticmethod(lambda name, width, args: None)

        def run(self):
            return [(name, width) for name, width in self if name != "value_and_grad"]

    noted, call = Calls(), Kernels.call

    def noting(self, name, width, *args):
        noted.append((name, width))
        noted.real = lambda: call(self, name, width, *args)
        found = noted.instead(name, width, args)
        return call(self, name, width, *args) if found is None else found

    monkeypatch.setattr(Kernels, "call", noting)
    return noted
