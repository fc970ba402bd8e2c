"""Traces and lowers a problem of bench.register once, and prints seconds and bytes as
JSON: `python -m bench._registering NAME`.

It runs with the client of the checkout that is on the path. That may be older than
`hvpd._registration`.
"""

import argparse
import importlib
import json
import time

import scipy.linalg  # noqa: F401 - jaxlib imports it for the first Cholesky; a solver's process has it already

from bench._objectives import Problem, gaussian_process, mlp, transformer


def problems(*, quick: bool) -> dict[str, Problem]:
    """Return a digits network, a language model of 100 million parameters, and a
    Gaussian process.
    """
    small = {"digits MLP": mlp((64, 64, 10), 1_797), "Gaussian process": gaussian_process(200, 5)}
    return small if quick else small | {"transformer of 100 M": transformer(2, 64, 768, 14, 12)}


def main() -> None:
    """Register without a server: the client's work before it uploads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    problem = problems(quick=arguments.quick)[arguments.name]
    try:
        export = importlib.import_module("hvpd._registration.export")
    except ImportError:
        export = importlib.import_module("hvpd._export")
    started = time.perf_counter()
    made = export.export(problem.fun, problem.x, problem.data, platforms=("cpu", "cuda"), precision="highest")
    seconds = time.perf_counter() - started
    data = {tensor.digest for tensor in (*made.bundle.data, *made.bundle.captured)}
    size = sum(len(memoryview(blob).cast("B")) for digest, blob in made.blobs.items() if digest not in data)
    print(json.dumps({"seconds": seconds, "bytes": size}))


if __name__ == "__main__":
    main()
