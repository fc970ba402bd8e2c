"""Operators as matrices of PETSc: on a stand-in, and on petsc4py where it imports."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import hvpd
import hvpd.petsc
from hvpd._operators.curvature import HessianOperator

MATRIX = np.diag([1.0, 2.0, 3.0]) + 0.5


@pytest.fixture
def H(dense_point):
    return HessianOperator(dense_point(MATRIX))


class Vector:
    """As much of PETSc's Vec as a product uses."""

    def __init__(self, values):
        self.values = np.array(values)

    def getArray(self, *, readonly):
        assert readonly
        return self.values

    def setArray(self, values):
        self.values = values


class Matrix:
    """As much of PETSc's Mat as `mat` uses."""

    Option = SimpleNamespace(SYMMETRIC="symmetric")

    def createPython(self, size, *, context, comm):
        self.size, self.context, self.comm = size, context, comm
        return self

    def setUp(self):
        self.ready = True

    def setOption(self, option, value):
        self.option = (option, value)


@pytest.fixture
def petsc(monkeypatch):
    package, module = ModuleType("petsc4py"), ModuleType("petsc4py.PETSc")
    module.Mat, module.COMM_SELF, module.ScalarType = Matrix, "self", np.float64
    package.PETSc = module
    monkeypatch.setitem(sys.modules, "petsc4py", package)
    monkeypatch.setitem(sys.modules, "petsc4py.PETSc", module)
    return module


def test_a_product_fills_the_vector(H, petsc):
    found = hvpd.petsc.mat(H)
    assert (found.size, found.comm, found.ready, found.option) == ((3, 3), "self", True, ("symmetric", True))
    for multiply in (found.context.mult, found.context.multTranspose):
        y = Vector(np.zeros(3))
        multiply(found, Vector([1.0, 2.0, 3.0]), y)
        np.testing.assert_allclose(y.values, MATRIX @ [1.0, 2.0, 3.0])


def test_complex_scalars_are_refused(H, petsc):
    petsc.ScalarType = np.complex128
    with pytest.raises(hvpd.InvalidArgumentError, match="scalars of complex128, and an operator here is real"):
        hvpd.petsc.mat(H)


def test_without_petsc4py_the_error_names_it(H, monkeypatch):
    monkeypatch.setitem(sys.modules, "petsc4py", None)
    with pytest.raises(hvpd.MissingExtraError, match="pip install petsc petsc4py"):
        hvpd.petsc.mat(H)


@pytest.mark.skipif(importlib.util.find_spec("petsc4py") is None, reason="petsc4py is not installed")
def test_petscs_cg_solves_with_it(H):
    from petsc4py import PETSc

    A = hvpd.petsc.mat(H)
    x, b = A.createVecs()
    b.setArray(np.ones(3))
    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOperators(A)
    ksp.setType("cg")
    ksp.getPC().setType("none")
    ksp.setTolerances(rtol=1e-12)
    ksp.solve(b, x)
    np.testing.assert_allclose(x.getArray(), np.linalg.solve(MATRIX, np.ones(3)), rtol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("slepc4py") is None, reason="slepc4py is not installed")
def test_slepc_finds_its_eigenvalues(H):
    from slepc4py import SLEPc

    eps = SLEPc.EPS().create()
    eps.setOperators(hvpd.petsc.mat(H))
    eps.setProblemType(SLEPc.EPS.ProblemType.HEP)
    eps.solve()
    assert np.isclose(eps.getEigenvalue(0).real, np.linalg.eigvalsh(MATRIX)[-1])
