"""Operators and objectives of a server in jax and in libraries of jax.

>>> import hvpd.jax                                      # doctest: +SKIP
>>> A = hvpd.jax.lineax_operator(H)                      # doctest: +SKIP
>>> lineax.linear_solve(A, b, lineax.GMRES(1e-6, 1e-6))  # doctest: +SKIP

`H.as_jax()` and `objective.as_jax()` are functions of jax arrays. Most libraries take
such functions as they are: jax.scipy.sparse.linalg, matfree, optimistix, optax. This
module has what these functions do not cover. `import hvpd` does not import it.
"""

from collections.abc import Iterable
from typing import Any

from hvpd._errors import MissingExtraError

try:
    import jax
except ImportError as error:
    raise MissingExtraError(f"hvpd.jax needs jax here: pip install 'hvpd[jax]' ({error})") from error

from hvpd._jax.errors import own_errors as errors
from hvpd._jax.functions import Function, Linear
from hvpd._operators.symmetric import SymmetricOperator, not_an_operator

__all__ = ["Function", "Linear", "errors", "lineax_operator"]


def lineax_operator(operator: SymmetricOperator, tags: Iterable[object] | object = ()) -> Any:
    """Return an operator as a `lineax.AbstractLinearOperator`.

    It is tagged as symmetric. Other tags are claims of the caller, which neither hvpd
    nor lineax checks. For example, lineax's CG asks for `positive_semidefinite_tag` or
    `negative_semidefinite_tag`.

    Args:
        operator: An operator of shape (n, n), such as a Hessian.
        tags: Tags of lineax, one or several.

    Returns:
        A lineax operator on flat vectors of shape (n,).

    Raises:
        MissingExtraError: lineax is not installed.
        InvalidArgumentError: It is no operator of hvpd, or it is asynchronous. Or it is
            float64, and jax computes with 32 bits.

    Example:
        >>> A = hvpd.jax.lineax_operator(H, lineax.positive_semidefinite_tag)
        >>> lineax.linear_solve(A, -gradient, lineax.CG(rtol=1e-8, atol=1e-8)).value
    """
    try:
        import lineax  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"lineax_operator needs lineax: pip install lineax ({error})") from error
    if not isinstance(operator, SymmetricOperator):
        raise not_an_operator("lineax_operator", operator)
    claimed = tags if isinstance(tags, (tuple, list, set, frozenset)) else (tags,)
    structure = jax.ShapeDtypeStruct((operator.shape[0],), operator.dtype)
    return lineax.FunctionLinearOperator(operator.as_jax(), structure, {lineax.symmetric_tag, *claimed})
