"""The public names are a contract: a change here has a file in changes/."""

import subprocess
import sys

import hvpd

NAMES = """
AccessError
Certificate
Choice
Client
Composite
CurvatureOperator
CurvatureWarning
DeadlineError
DerivativeRules
Diagonal
Distribution
HessianOperator
HvpdError
IncompatibleError
InvalidArgumentError
Leaf
Listing
LowRankOperator
MissingExtraError
Mode
NotFoundError
NystromPreconditioner
Objective
OperatorName
OverloadedError
Plan
Platform
Point
Precision
ProductMode
ProductPrecision
Progress
Reduction
RegistrationCheck
Statistics
UnavailableError
Usage
__version__
composite
connect
local
nystrom
"""


def test_the_public_names_are_these_and_each_can_be_had():
    assert sorted(hvpd.__all__) == NAMES.split()
    assert set(dir(hvpd)) >= set(NAMES.split())
    for name in hvpd.__all__:
        assert getattr(hvpd, name) is not None


KRYLOV = """
DiagonalEstimate
Eigenpairs
Estimate
Lanczos
NotConvergedError
Origin
Result
Solution
Spectrum
diagonal
eigsh
lanczos
load
logdet
minimize
solve
spectrum
trace
trace_of
"""


def test_the_names_of_krylov_are_these():
    assert hvpd.krylov.__all__ == KRYLOV.split()
    for name in hvpd.krylov.__all__:
        assert getattr(hvpd.krylov, name) is not None


def test_heavy_parts_of_scipy_are_loaded_late():
    code = """
    import sys, hvpd
    hvpd.connect, hvpd.Objective, hvpd.Point
    assert "scipy.linalg" not in sys.modules
    hvpd.CurvatureOperator, hvpd.krylov.solve
    assert "scipy.linalg" in sys.modules
    assert "scipy.optimize" not in sys.modules
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
