"""Problems of CUTEst, by the package sif2jax
(https://github.com/johannahaffner/sif2jax).

Only the modules of single problems are imported. The package imports a thousand of
them, and takes 40 s.
"""

import functools
import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

UNCONSTRAINED = "_unconstrained_minimisation"
FOLDERS = {
    "unconstrained": UNCONSTRAINED,
    "bounded": "_bounded_minimisation",
    "constrained": "_constrained_minimisation",
    "quadratic": "_quadratic_problems",
}
"""The package's folder for each class of problems."""


def problem(name: str) -> Any:
    """Return an unconstrained problem, in float64.

    Args:
        name: The problem's name, such as "HELIX".
    """
    with jax.enable_x64(True):
        return getattr(_module(UNCONSTRAINED, name.lower()), name)()


def problems(kind: str) -> Iterator[type[Any]]:
    """Yield the problems of a class, in the order of their files. If a file has a
    family of problems, the first one stands for all.

    Args:
        kind: One of `FOLDERS`.
    """
    folder = _bare_package() / FOLDERS[kind]
    for path in sorted(folder.glob("[a-z]*.py")):
        with jax.enable_x64(True):
            module = _module(folder.name, path.stem)
        yield from itertools.islice((each for each in vars(module).values() if _is_problem(module, each)), 1)


def _is_problem(module: types.ModuleType, found: object) -> bool:
    own = isinstance(found, type) and found.__module__ == module.__name__
    return own and hasattr(found, "objective") and not inspect.isabstract(found)


def _module(folder: str, name: str) -> types.ModuleType:
    package = _bare_package()
    bare = f"bare_sif2jax.cutest.{folder}"
    if bare not in sys.modules:
        inner = sys.modules[bare] = types.ModuleType(folder)
        inner.__path__ = [str(package / folder)]
    return importlib.import_module(f"{bare}.{name}")


@functools.cache
def _bare_package() -> Path:
    """Make a package that has the modules of the problems, and imports none of them.
    Return the folder of their classes.
    """
    found = importlib.util.find_spec("sif2jax")
    assert found is not None, "sif2jax is not installed"
    folder = Path(found.origin or "").parent
    for name, path in (("bare_sif2jax", folder), ("bare_sif2jax.cutest", folder / "cutest")):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(path)]
    return folder / "cutest"
