"""Share an objective: one client registers it under a name, and another finds it by
that name and solves, without jax.

The second client is a process of its own here, like one on a teammate's machine.
It never sees the function.
"""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np

import hvpd

TEAMMATE = """
import sys, hvpd
from scipy.sparse.linalg import cg
with hvpd.connect(sys.argv[1]) as client:
    objective = client.objective("team/least-squares")
    point = objective.at([0.0] * objective.n)
    step, _ = cg(point.hessian(), -point.gradient, rtol=1e-12)
assert "jax" not in sys.modules
print(*step)
"""

rng = np.random.default_rng(0)
A, b = rng.normal(size=(300, 50)), rng.normal(size=300)

with hvpd.local() as owner:
    owner.register(lambda x, A, b: 0.5 * jnp.sum((A @ x - b) ** 2), np.zeros(50), A, b, name="team/least-squares")
    command = [sys.executable, "-c", TEAMMATE, owner.address]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
error = np.abs(np.array(answer.split(), float) - np.linalg.lstsq(A, b)[0]).max()
print(f"the teammate's solution without jax, against numpy.linalg.lstsq here: {error:.1e}")
assert error < 1e-10
