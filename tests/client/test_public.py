"""The public names are a contract: a change here is a change in the CHANGELOG."""

import hvpd

NAMES = """
AccessError
Certificate
Choice
Client
Composite
CurvatureOperator
DeadlineError
DerivativeRules
Diagonal
HessianOperator
HvpdError
IncompatibleError
InvalidArgumentError
Listing
LowRankOperator
MissingExtraError
NotFoundError
NystromPreconditioner
Objective
OverloadedError
Point
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
