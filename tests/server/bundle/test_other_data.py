"""Other data than the registered is bound if it fits, and else refused."""

import pytest

from hvpd.v1 import tensor_pb2
from hvpd_server.bundle import (
    check_data,
)
from hvpd_server.errors import Code, ServiceError


def test_other_data_of_the_same_shapes_can_be_bound(bundle):
    check_data(bundle, bundle.data)
    for tensor in bundle.data:
        tensor.digest = "0" * 64
    check_data(bundle, bundle.data)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float32"), ("shape", [5, 4]), ("shape", [3, 5]), ("shape", [])]
)
def test_data_that_does_not_fit_is_refused_by_its_place(bundle, field, value):
    data = [tensor_pb2.Tensor.FromString(tensor.SerializeToString()) for tensor in bundle.data]
    if field == "dtype":
        data[0].dtype = value
    else:
        data[0].shape[:] = value
    with pytest.raises(
        ServiceError, match=r"data\[0\]\['features'\] is .*, the objective takes float64\[5, 3\]"
    ) as refused:
        check_data(bundle, data)
    assert (refused.value.code, refused.value.reason) == (Code.INVALID_ARGUMENT, "DATA_MISMATCH")


@pytest.mark.parametrize("count", [0, 3])
def test_data_with_leaves_missing_is_refused(bundle, count):
    with pytest.raises(ServiceError, match=f"data has {count} leaves, the objective takes 4"):
        check_data(bundle, bundle.data[:count])
