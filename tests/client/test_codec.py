"""Arrays to bytes and back, exactly for every dtype and layout."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvpd import InvalidArgumentError
from hvpd._wire import codec

dtypes = st.sampled_from(["float64", "float32", "float16", "int8", "uint64", "bool", "complex64"])


@given(dtypes.flatmap(lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))))
def test_any_array_survives(array):
    back = codec.array(bytes(codec.payload(array)), array.dtype.name, array.shape)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype


def test_bfloat16_survives():
    array = np.arange(5, dtype=ml_dtypes.bfloat16)
    assert np.array_equal(codec.array(codec.payload(array), "bfloat16", (5,)), array)


def test_layout_and_byte_order_do_not_matter():
    array = np.arange(12.0).reshape(3, 4)
    expected = array.tobytes()
    assert bytes(codec.payload(np.asfortranarray(array))) == expected
    assert bytes(codec.payload(array.astype(">f8"))) == expected
    assert bytes(codec.payload(array[::-1][::-1])) == expected


def test_a_contiguous_array_is_not_copied():
    array = np.arange(12.0)
    array[0] = 7
    assert np.shares_memory(np.frombuffer(codec.payload(array)), array)


@given(st.binary(max_size=100), st.integers(1, 40))
def test_chunks_put_together_are_the_whole(data, size):
    chunks = list(codec.chunks(data, size))
    assert b"".join(chunks) == data
    assert all(len(chunk) <= size for chunk in chunks)
    assert len({len(chunk) for chunk in chunks[:-1]}) <= 1
    assert len(chunks) == max(1, -(-len(data) // size))


def test_digests_are_sha256_of_the_parts_together():
    assert codec.digest(b"ab", b"c") == hashlib.sha256(b"abc").hexdigest()
    assert codec.is_digest(codec.digest(b""))
    for wrong in ("", "0" * 63, "A" * 64, "0" * 63 + "\n", "../" + "0" * 61):
        assert not codec.is_digest(wrong)


def test_a_wrong_size_is_an_error():
    with pytest.raises(ValueError, match=r"float64\[2, 3\] takes 48 bytes, got 47"):
        codec.array(b"\0" * 47, "float64", (2, 3))


@pytest.mark.parametrize("name", ["object", "U5", "S3", "V8", "M8[s]", "m8[s]", "float77", "_rootmodule", ""])
def test_dtypes_that_cannot_be_sent(name):
    with pytest.raises(TypeError):
        codec.dtype(name)


@pytest.mark.parametrize(
    ("leaf", "x64", "expected"),
    [
        (0.5, False, "float32"),
        (0.5, True, "float64"),
        (3, True, "int32"),
        (2**40, True, "int64"),
        (True, False, "bool"),
        (np.float64(0.5), True, "float64"),
        (np.float64(0.5), False, "float32"),
        (np.ones(2), False, "float32"),
        (np.ones(2), True, "float64"),
        (np.ones(2, int), False, "int32"),
        (np.ones(2, np.uint8), False, "uint8"),
        ([1.0, 2.0], True, "float64"),
    ],
)
def test_data_gets_the_dtype_that_jax_would_give_it(leaf, x64, expected):
    x_dtype = np.dtype("float64" if x64 else "float32")
    assert codec.data_array(leaf, "data", x_dtype=x_dtype, x64=x64).dtype == expected


@pytest.mark.parametrize(
    "leaf", ["text", None, object(), np.array(["a"]), np.array([None]), np.datetime64("2026-01-01")]
)
def test_data_that_is_no_numbers(leaf):
    with pytest.raises(InvalidArgumentError, match=r"data\[1\] must be an array of numbers"):
        codec.data_array(leaf, "data[1]", x_dtype=np.dtype("float32"), x64=False)
