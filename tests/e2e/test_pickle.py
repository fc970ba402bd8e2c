"""Clients, objectives, points and operators in other processes."""

import copy
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd


@pytest.fixture(scope="module")
def operator(client):
    objective = client.register(lambda x, c: c * jnp.sum(x**4), np.zeros(3), 1.0)
    return objective.at(np.arange(1.0, 4.0), 2.0).hessian(shift=1.0)


def test_all_reconnect_in_another_process(operator):
    point = operator.point
    parts = pickle.dumps((operator, point, point.objective))
    program = (
        "import pickle, sys, numpy as np; H, p, o = pickle.loads(sys.stdin.buffer.read()); "
        "print(*(H @ np.ones(3)), p.value, o.value(np.ones(3)))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=parts, capture_output=True, check=True)
    assert list(map(float, done.stdout.split())) == [25.0, 97.0, 217.0, 196.0, 3.0]


def test_copies_work(client, operator):
    again = copy.deepcopy(operator)
    np.testing.assert_array_equal(again @ np.ones(3), operator @ np.ones(3))
    assert pickle.loads(pickle.dumps(client)).address == client.address


def test_no_credential_is_in_a_pickle(server):
    with hvpd.connect(server.address, token="hvpd_secret") as client:
        objective = client.register(lambda x: jnp.sum(x**2), np.zeros(2))
        point = objective.at(np.zeros(2))
        for each in (client, objective, point, point.hessian()):
            assert b"secret" not in pickle.dumps(each)
