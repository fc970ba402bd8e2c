"""The demo, `make demo`: a network's curvature, served to a solver that has neither
jax, nor the network, nor the data.

This process owns the objective. It starts a server, and registers a network's
cross-entropy on handwritten digits. Then it starts digits_solve.py, which does all the
solving in a process of its own. At the end it checks every answer against plain jax.
"""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_digits

import hvpd

NAME = "digits/mlp"
LAYERS = (64, 100, 40, 10)
DECAY = 1e-2
"""Weight decay: enough to make the Hessian positive definite at the minimum."""
PICTURE = Path("digits.png")


def logits(params, X):
    """Return the classes' scores of images X[images, pixels]: a network with tanh."""
    *hidden, (W, b) = params
    for weights, bias in hidden:
        X = jnp.tanh(X @ weights + bias)
    return X @ W + b


def loss(params, X, y):
    """Return the mean cross-entropy with weight decay."""
    correct = jnp.take_along_axis(jax.nn.log_softmax(logits(params, X)), y[:, None], axis=1)
    return -correct.mean() + 0.5 * DECAY * sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params))


def solve(address):
    """Run the solver process; return its results."""
    with tempfile.TemporaryDirectory(prefix="hvpd-demo-") as folder:
        out = Path(folder, "solved.npz")
        # One BLAS thread is enough for the solver's short vectors. BLAS threads that
        # wait in a loop would take the cores from the server.
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("digits_solve.py"), address, NAME, out],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            sys.exit(f"the solver failed with exit code {done.returncode}; its own message is above")
        with np.load(out) as found:
            return dict(found)


def distance(ours, reference):
    """Return the relative error in the Euclidean norm."""
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def check(found, objective, X, y):
    """Compare with plain jax in this process.

    Return rows of (name, at the start, at the minimum), the residuals of the
    eigenpairs, and plain jax's ms a product.
    """
    value_and_grad = jax.jit(lambda p: jax.value_and_grad(loss)(p, X, y))
    hessp = jax.jit(lambda p, v: jax.jvp(lambda q: jax.grad(loss)(q, X, y), (p,), (v,))[1])

    def multiply(params, vectors):
        return np.stack([objective.ravel(hessp(params, objective.unravel(v))) for v in vectors])

    columns = []
    for x, f, g, HV in zip(found["x"], found["value"], found["gradient"], found["HV"], strict=True):
        params = objective.unravel(x)
        value, gradient = value_and_grad(params)
        gradient = objective.ravel(gradient)
        products = multiply(params, found["V"].T)
        columns.append((abs(f / float(value) - 1), distance(g, gradient), distance(HV.T, products)))
    rows = list(zip(("value", "gradient", "Hessian-vector products"), *columns, strict=True))

    # At the minimum, params and gradient are those of the last point.
    eigenvalues, vectors, steps = found["eigenvalues"], found["eigenvectors"].T, found["steps"]
    started = time.perf_counter()
    products = multiply(params, [*vectors, *steps])
    plain_ms = 1e3 * (time.perf_counter() - started) / len(products)
    Hv, Hd = products[: len(vectors)], products[len(vectors) :]
    eigen_residuals = np.linalg.norm(Hv - eigenvalues[:, None] * vectors, axis=1)
    cg_residuals = np.linalg.norm(Hd + found["shifts"][:, None] * steps + gradient, axis=1)
    rows.append(
        (f"{len(eigenvalues)} eigenpairs: max |Hv - λv| / λmax", None, eigen_residuals.max() / eigenvalues.max())
    )
    rows.append(("CG: max |(H + λI) d + g| / |g|", None, cg_residuals.max() / np.linalg.norm(gradient)))
    return rows, eigen_residuals, plain_ms


def report(found, rows, plain_ms):
    """Print the table."""
    print("\nAgreement with plain jax in this process (relative)   at the start   at the minimum")
    for what, start, end in rows:
        print(f"  {what:<51} {'' if start is None else f'{start:.1e}':>12} {end:>16.1e}")
    print("\nWork                       products   seconds   ms a product   on the device   mean width of a batch")
    for phase, (products, seconds, latency, device, width) in zip(found["phases"], found["figures"], strict=True):
        print(f"  {phase:<24} {products:>8,.0f} {seconds:>9.1f} {latency:>14.2f} {device:>15.2f} {width:>23.2f}")
    total = np.array(found["figures"])
    each = total[:, 0] @ total[:, 2:] / total[:, 0].sum()
    print(f"  {'all':<24} {total[:, 0].sum():>8,.0f} {total[:, 1].sum():>9.1f} ", end="")
    print(f"{each[0]:>13.2f} {each[1]:>15.2f} {each[2]:>23.2f}")
    print(f"  {'plain jax, on the CPU, in this process':<43} {plain_ms:>15.2f}")
    print("\n  ms a product: from call to result, waiting for other solvers' products included.")
    print("  width: vectors in the launch that a product was part of; a wide launch takes longer than a narrow one.")
    print(
        "  Some of the network's neurons end as copies of each other. Bottom eigenvalues then come in multiples, of which"
    )
    print("  Lanczos, and so eigsh, may miss some: what it reports are eigenpairs to the residual above.")


def draw(found, eigen_residuals):
    """Draw convergence and spectrum."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    products, values, norms = found["convergence"].T
    left.semilogy(products, values, label="f", color="C0")
    left.semilogy(products, norms, label="|g|", color="C1")
    left.set(title="Minimise: trust-ncg", xlabel="Hessian-vector products")
    left.legend(loc="lower left")

    eigenvalues = found["eigenvalues"]
    for sign, mark, label in ((1, "o", "eigenvalue λ"), (-1, "v", "negative eigenvalue, |λ|")):
        chosen = np.flatnonzero(np.sign(eigenvalues) == sign)
        if len(chosen):
            middle.semilogy(chosen, np.abs(eigenvalues[chosen]), mark, color="C0", label=label)
    middle.semilogy(eigen_residuals, "x", color="C3", label="its residual |Hv - λv|")
    middle.axhline(DECAY, color="0.6", linestyle=":", label="weight decay")
    middle.set(title=f"Spectrum at the minimum: eigsh, n = {found['x'].shape[1]:,}")
    low = len(eigenvalues) - 5
    labels = [f"bottom {i + 1}" for i in range(low)] + [f"top {5 - i}" for i in range(5)]
    middle.set_xticks(range(len(eigenvalues)), labels, rotation=45, ha="right")
    middle.legend(loc="lower left")

    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(found["shifts"])))
    for index, (shift, color) in enumerate(zip(found["shifts"], colors, strict=True)):
        right.semilogy(found[f"cg_{index}"], color=color, label=f"λ = {shift:.1e}")
    right.set(title="Newton steps: (H + λI) d = -g by CG", xlabel="iterations", ylabel="relative residual")
    right.legend(fontsize="small")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=120)


def main():
    """Run the demo."""
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # The solver must end with this process.
    jax.config.update("jax_enable_x64", True)  # For the comparison. hvpd traces float64 in either mode.
    jax.config.update("jax_platforms", "cpu")  # An accelerator belongs to the server.
    images, y = load_digits(return_X_y=True)
    X = images / 16
    params = [(np.zeros((a, b)), np.zeros(b)) for a, b in itertools.pairwise(LAYERS)]

    print("starting a server ...", flush=True)
    with hvpd.local() as client:
        print(f"  {client!r}")
        objective = client.register(loss, params, X, y, name=NAME)
        print(f"registered {objective.name}: {objective.n:,} parameters, {len(X):,} images, {objective.dtype}")
        print("starting the solver, a process without jax, the network or the images ...", flush=True)
        found = solve(client.address)
        print("checking its answers with plain jax in this process ...", flush=True)
        rows, eigen_residuals, plain_ms = check(found, objective, X, y)
        right = int((logits(objective.unravel(found["x"][1]), X).argmax(axis=1) == y).sum())
    report(found, rows, plain_ms)
    draw(found, eigen_residuals)
    worst = max(start for _, start, _ in rows if start is not None)
    if not worst < 1e-9:
        sys.exit(f"hvpd and plain jax differ by {worst:.1e}: that is a bug in hvpd, please report it with this output")
    print(f"\n{right:,} of {len(X):,} digits are classified right; {time.perf_counter() - began:.0f} s in all.")
    print(f"\nWhat to try next:\n  open {PICTURE}                              convergence, spectrum, Newton steps")
    print("  .venv/bin/python examples/lobpcg_blocks.py   one idea each: see examples/README.md")
    print("  .venv/bin/hvpd serve                         a server that stays; then, in any Python on this machine:")
    print(
        '      client = hvpd.connect("localhost:7070"); client.register(...); client.objective("name").at(x).hessian()'
    )
    print("  docs/index.md                                the rest: serving other machines, GPUs, limits")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
