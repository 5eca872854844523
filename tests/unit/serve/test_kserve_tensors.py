"""Tensors of the Open Inference Protocol: whatever comes is a tensor of its shape, or a RequestError."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

from hasten.errors import RequestError
from hasten.serve.kserve_tensors import STRUCT_CODES, Tensor, bytes_of

DATATYPES = st.sampled_from([*STRUCT_CODES, "BYTES"]) | st.text(max_size=8)
SHAPES = st.lists(st.integers(-2, 5) | st.integers(-(2**70), 2**70), max_size=10)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@given(DATATYPES, SHAPES, st.binary(max_size=64))
def test_any_bytes_are_a_tensor_of_their_shape_or_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    try:
        tensor = Tensor.from_bytes("x", datatype, shape, raw)
    except RequestError:
        return
    assert len(tensor.values) == math.prod(shape)
    if datatype == "BYTES" or datatype in ("INT32", "INT64", "UINT32", "UINT64"):
        assert bytes_of(datatype, tensor.values) == raw


@given(DATATYPES, SHAPES, JSON)
def test_any_json_is_a_tensor_of_its_shape_or_refused(datatype: str, shape: list[int], data: Any) -> None:
    try:
        tensor = Tensor.from_json("x", datatype, shape, data)
    except RequestError:
        return
    assert len(tensor.values) == math.prod(shape)
    assert {type(value) for value in tensor.values} <= {int, float, bool, str}


@given(st.lists(st.text(max_size=20), max_size=5))
def test_texts_are_those_of_tritonclient(texts: list[str]) -> None:
    raw = bytes_of("BYTES", texts)
    assert Tensor.from_bytes("x", "BYTES", [len(texts)], raw).values == texts
    if texts:
        assert raw == serialize_byte_tensor(np.array([text.encode() for text in texts], np.object_)).item()


def test_numbers_are_little_endian() -> None:
    assert Tensor.from_bytes("x", "INT64", [1, 2], np.array([-1, 2**40]).tobytes()).values == (-1, 2**40)
    assert bytes_of("INT32", [5, -6]) == np.array([5, -6], np.int32).tobytes()
    assert bytes_of("FP32", np.array([0.5, -6], np.float32)) == struct.pack("<2f", 0.5, -6)


def test_nested_and_flat_lists_are_the_same() -> None:
    nested = Tensor.from_json("x", "INT32", [2, 2], [[1, 2], [3, 4]])
    assert nested == Tensor.from_json("x", "INT32", [2, 2], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "reason"),
    [
        ("BYTES", [1], b"\x01\x00", "ends within the length"),
        ("BYTES", [1], struct.pack("<I", 5) + b"abc", "longer than what was sent"),
        ("BYTES", [1], struct.pack("<i", -1) + b"abc", "longer than what was sent"),
        ("BYTES", [1], struct.pack("<I", 2) + b"\xc3\x28", "is not UTF-8"),
        ("BYTES", [2], struct.pack("<I", 1) + b"a", "1 elements, which is not its shape"),
        ("INT32", [1], b"\x00" * 5, "5 bytes, and an element of INT32 has 4"),
        ("INT32", [2], b"\x00" * 4, "not its shape"),
        ("INT32", [-1, -1], b"\x00" * 4, "not its shape"),
        ("INT8", [1], b"\x00", "no datatype 'INT8'"),
        ("INT32", [1] * 9, b"\x00" * 4, "9 dimensions"),
    ],
)
def test_what_is_wrong_with_bytes_is_said(datatype: str, shape: list[int], raw: bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        Tensor.from_bytes("x", datatype, shape, raw)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [("INT32", [True]), ("INT32", [1.5]), ("FP32", ["1"]), ("BOOL", [1]), ("BYTES", [1]), ("X", [1])],
)
def test_json_values_of_another_type_are_refused(datatype: str, data: list[Any]) -> None:
    with pytest.raises(RequestError, match=f"x is {datatype}, and"):
        Tensor.from_json("x", datatype, [1], data)
