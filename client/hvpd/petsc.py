"""Operators as matrices of PETSc, for its Krylov solvers and for SLEPc.

>>> import hvpd.petsc                                    # doctest: +SKIP
>>> A = hvpd.petsc.mat(H)                                # doctest: +SKIP

`import hvpd` does not import this module, which needs petsc4py.
"""

from typing import Any

import numpy as np

from hvpd._errors import InvalidArgumentError, MissingExtraError
from hvpd._operators.symmetric import SymmetricOperator

__all__ = ["mat"]


class _Context:
    """What PETSc calls for a matrix of type "python"."""

    def __init__(self, operator: SymmetricOperator) -> None:
        self._operator = operator

    def mult(self, mat: Any, x: Any, y: Any) -> None:
        y.setArray(self._operator @ x.getArray(readonly=True))

    multTranspose = mult  # noqa: N815 - PETSc's name


def mat(operator: SymmetricOperator) -> Any:
    """Return an operator as a symmetric `petsc4py.PETSc.Mat` of type "python".

    The matrix belongs to this process alone (`COMM_SELF`), because a client has whole
    vectors. Vectors are converted between PETSc's scalars and the operator's dtype.

    Args:
        operator: An operator of shape (n, n), such as a Hessian.

    Raises:
        MissingExtraError: petsc4py is not installed.
        InvalidArgumentError: PETSc was built with complex scalars.

    Example:
        >>> ksp = PETSc.KSP().create(PETSc.COMM_SELF)
        >>> ksp.setOperators(hvpd.petsc.mat(H))
        >>> ksp.setType("cg")
    """
    try:
        from petsc4py import PETSc  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtraError(f"hvpd.petsc needs petsc4py: pip install petsc petsc4py ({error})") from error
    if np.dtype(PETSc.ScalarType).kind == "c":
        raise InvalidArgumentError(
            f"the PETSc that is installed has scalars of {np.dtype(PETSc.ScalarType)}, and an operator here is real: use a "
            "PETSc that was configured with real scalars",
            reason="DTYPE",
        )
    found = PETSc.Mat().createPython(operator.shape, context=_Context(operator), comm=PETSc.COMM_SELF)
    found.setUp()
    found.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    return found
