"""Code of users, for mypy: test_types checks it, and nothing runs it. `mypy --strict`
refuses an `ignore` that hides no error, so each of them states that a word is refused.
"""

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import LinearOperator

import hvpd


def loss(x: Any, X: Any) -> Any:
    return (X @ x).sum()


def solver(v: npt.NDArray[np.float64], V: npt.NDArray[np.float32]) -> None:
    point = hvpd.connect().objective("digits/mlp").at(v)
    H = point.hessian(mode="linearized", precision="high")
    assert_type(H, hvpd.HessianOperator)
    assert_type(H @ v, npt.NDArray[Any])
    assert_type(H @ V, npt.NDArray[Any])
    assert_type(H @ [1.0, 2.0], npt.NDArray[Any])
    assert_type(H @ H, LinearOperator[Any])
    assert_type(2 * H, hvpd.HessianOperator)
    assert_type(H * 0.5, hvpd.HessianOperator)
    assert_type(H / 2, hvpd.HessianOperator)
    assert_type((2 * H) @ v, npt.NDArray[Any])
    assert_type(H.matvec(v), npt.NDArray[Any])
    assert_type(H.matmat(V), npt.NDArray[Any])
    assert_type(H.block("out") @ v, npt.NDArray[Any])
    assert_type(hvpd.nystrom(H, 5) @ v, npt.NDArray[Any])
    assert_type(point.ggn(precision="default") @ v, npt.NDArray[Any])
    assert_type(point.kfac(1e-3).inverse() @ v, npt.NDArray[Any])


def registers(client: hvpd.Client, x: Any, X: Any, mode: hvpd.Mode, precision: hvpd.ProductPrecision) -> None:
    fun = hvpd.composite(loss, loss, distribution="normal", reduction="sum")
    objective = client.register(fun, x, X, mode=mode, precision=precision, row_reduction="sum", platforms=("tpu",))
    client.register_stablehlo("module", x, mode="auto", precision="exported")
    assert_type(objective.check(x, operator="ggn"), hvpd.Certificate)


def wrong_words(client: hvpd.Client, x: Any) -> None:
    client.register(loss, x, mode="forward")  # type: ignore[arg-type]
    client.register(loss, x, precision="low")  # type: ignore[arg-type]
    client.register(loss, x, precision="exported")  # type: ignore[arg-type]
    client.register(loss, x, row_reduction="max")  # type: ignore[arg-type]
    client.register(loss, x, platforms=("gpu",))  # type: ignore[arg-type]
    client.register_stablehlo("module", x, mode="forward")  # type: ignore[arg-type]
    hvpd.composite(loss, loss, distribution="poisson")  # type: ignore[arg-type]
    hvpd.composite(loss, loss, reduction="max")  # type: ignore[arg-type]
    objective = client.objective("digits/mlp")
    objective.check(x, operator="kfac")  # type: ignore[arg-type]
    objective.at(x).hessian(mode="auto")  # type: ignore[arg-type]
    objective.at(x).hessian(precision="exported")  # type: ignore[arg-type]
    objective.at(x).fisher(precision="low")  # type: ignore[arg-type]
