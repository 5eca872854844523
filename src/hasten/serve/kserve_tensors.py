"""Tensors of the Open Inference Protocol: bytes and lists into checked Python values, and back.

Whatever a client sends is either a tensor whose elements number what its shape says, or a RequestError;
no length in the bytes is believed before it was compared with how many there are. Bytes are little-endian
and row-major; an element of BYTES is four bytes of length and then UTF-8.

Not here: which tensors a model has (`kserve_models`), and where they stand in a message.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.errors import RequestError

INTEGERS = {"INT32": "i", "INT64": "q", "UINT32": "I", "UINT64": "Q"}
FLOATS = {"FP32": "f", "FP64": "d"}
STRUCT_CODES = {"BOOL": "?", **INTEGERS, **FLOATS}
LENGTH = struct.Struct("<I")
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Tensor:
    """One tensor of a request.

    Args:
        values: all elements in row-major order: int, float, bool or str.

    Raises:
        RequestError: the shape and the number of values disagree.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]

    def __post_init__(self) -> None:
        if len(self.shape) > MAX_DIMENSIONS:
            raise RequestError(
                f"{self.name} has {len(self.shape)} dimensions, and at most {MAX_DIMENSIONS} are allowed"
            )
        if any(size < 0 for size in self.shape) or math.prod(self.shape) != len(self.values):
            raise RequestError(
                f"{self.name} has {len(self.values)} elements, which is not its shape {list(self.shape)}"
            )

    @classmethod
    def from_bytes(cls, name: str, datatype: str, shape: Sequence[int], raw: bytes) -> "Tensor":
        """Of the protocol's binary form. Raises RequestError."""
        return cls(
            name, datatype, tuple(shape), _texts(name, raw) if datatype == "BYTES" else _numbers(name, datatype, raw)
        )

    @classmethod
    def from_json(cls, name: str, datatype: str, shape: Sequence[int], data: Any) -> "Tensor":
        """Of a JSON list, flat or nested. Raises RequestError."""
        values: list[Any] = data if isinstance(data, list) else [data]
        for _ in shape[1:MAX_DIMENSIONS]:
            if not all(isinstance(row, list) for row in values):
                break
            values = [value for row in values for value in row]
        for value in values:
            if not _is_of(datatype, value):
                raise RequestError(f"{name} is {datatype}, and {str(value)[:40]!r} is not")
        return cls(name, datatype, tuple(shape), values)


Elements = Sequence[Any] | np.ndarray
"""All of a tensor's in row-major order: str, or numbers, where they are many as an array of one dimension."""


def bytes_of(datatype: str, values: Elements) -> bytes:
    """The protocol's binary form of str values (BYTES) or numbers."""
    if datatype == "BYTES":
        encoded = [text.encode() for text in values]
        return b"".join([part for each in encoded for part in (LENGTH.pack(len(each)), each)])
    return np.asarray(values, f"<{STRUCT_CODES[datatype]}").tobytes()


def _numbers(name: str, datatype: str, raw: bytes) -> tuple[Any, ...]:
    if (code := STRUCT_CODES.get(datatype)) is None:
        raise RequestError(f"{name}: there is no datatype {datatype[:40]!r} here")
    size = struct.calcsize(code)
    if len(raw) % size:
        raise RequestError(f"{name} has {len(raw)} bytes, and an element of {datatype} has {size}")
    return struct.unpack(f"<{len(raw) // size}{code}", raw)


def _texts(name: str, raw: bytes) -> list[str]:
    texts: list[str] = []
    position = 0
    while position < len(raw):
        start = position + LENGTH.size
        if start > len(raw):
            raise RequestError(f"{name} ends within the length of element {len(texts)}")
        position = start + LENGTH.unpack_from(raw, position)[0]
        if position > len(raw):
            raise RequestError(f"{name}: element {len(texts)} is said to be longer than what was sent")
        texts.append(text_of(name, raw[start:position]))
    return texts


def text_of(name: str, raw: bytes) -> str:
    """One element of BYTES. Raises RequestError if it is no UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def _is_of(datatype: str, value: Any) -> bool:
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) if datatype in FLOATS else isinstance(value, int) and datatype in INTEGERS
