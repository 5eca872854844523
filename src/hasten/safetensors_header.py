"""The header of a safetensors file: which tensors it holds, and whether it holds them whole.

Every claim is checked: sizes against the file, offsets against each other, shapes against
byte counts. A hostile file raises WeightsError and costs no more memory than a header may
have. Tensor data is not read, but for samples that tell one set of weights from another.
Format: an 8-byte little-endian header length, a JSON header, the data without gaps.
"""

import json
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from hasten.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library has the same limit
MAX_DIMENSIONS = 64
MAX_NAME_CHARACTERS = 1000
SAMPLE_BYTES = 65_536

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_FOREIGN_FORMATS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"PK\x03\x04", "a PyTorch zip archive: convert it with save_pretrained(..., safe_serialization=True)"),
    (b"\x80", "a Python pickle: convert it with save_pretrained(..., safe_serialization=True)"),
    (b"GGUF", "a GGUF file: give the original Hugging Face folder instead"),
    (b"\x89HDF", "an HDF5 file: give a folder with safetensors weights instead"),
    (b"<", "an HTML or XML page, perhaps a failed download: download it again"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a safetensors header describes it.

    Args:
        dtype: in safetensors' spelling, "BF16".
        file: name of the file in the model's folder.
        offset: first byte of the data, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightsFile:
    """One safetensors file that was found whole.

    Args:
        fingerprint: the header and samples from the start, the middle and the end of the file.
    """

    tensors: dict[str, TensorInfo]
    fingerprint: bytes


def read_weights_file(path: Path) -> WeightsFile:
    """Checks a file's header against itself and against the file's size.

    Raises:
        WeightsError: the file cannot be read, or it is not a whole safetensors file.
    """
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header = _read_header(path, file, file_bytes)
            samples = []
            for position in (0, file_bytes // 2, max(0, file_bytes - SAMPLE_BYTES)):
                file.seek(position)
                samples.append(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    return WeightsFile(_parse_header(path, header, file_bytes), header + b"".join(samples))


def _read_header(path: Path, file: BinaryIO, file_bytes: int) -> bytes:
    start = file.read(32)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
        raise WeightsError(f"{path} is not a safetensors file: {_foreign_format(start, length)}")
    if length > file_bytes - 8:
        raise WeightsError(
            f"{path} is truncated: its header alone has {length:,} bytes, the file has {file_bytes:,}: "
            "download it again"
        )
    file.seek(8)
    return file.read(length)


def _foreign_format(start: bytes, length: int) -> str:
    for magic, description in _FOREIGN_FORMATS:
        if start.startswith(magic):
            return f"it is {description}"
    if len(start) < 9:
        return f"it has only {len(start)} bytes: download it again"
    if length > MAX_HEADER_BYTES:
        return f"its header would have {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed"
    return "it does not begin with a header"


def _parse_header(path: Path, header: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header, object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the header of {path} is not valid JSON ({error}): download the file again") from error
    if not isinstance(entries, dict):
        raise WeightsError(f"the header of {path} is not a JSON object")
    entries.pop("__metadata__", None)
    data_start = 8 + len(header)
    tensors = sorted((_tensor(path, name, entry, data_start) for name, entry in entries.items()), key=_span)
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=data_start)
    if end != file_bytes:
        state = "is truncated" if end > file_bytes else "has bytes that its header does not describe"
        raise WeightsError(
            f"{path} {state}: the header says {end:,} bytes, the file has {file_bytes:,}: download it again"
        )
    expected = data_start
    for tensor in tensors:
        if tensor.offset != expected:
            problem = "overlaps another tensor" if tensor.offset < expected else "leaves a gap before it"
            raise WeightsError(f"{path}: the data of tensor {tensor.name} {problem}")
        expected += tensor.num_bytes
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
        raise WeightsError(f"{path}: a tensor's name is not printable text: {reprlib.repr(name)}")
    if not isinstance(entry, dict):
        raise WeightsError(f"{path}: the header's entry of tensor {name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise WeightsError(f"{path}: tensor {name} has the unknown dtype {reprlib.repr(dtype)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise WeightsError(f"{path}: tensor {name} has an impossible shape")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{path}: tensor {name} has impossible data_offsets")
    num_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BITS[dtype] != num_bytes * 8:
        raise WeightsError(
            f"{path}: tensor {name} is {dtype} of shape {reprlib.repr(shape)}, which does not fill {num_bytes:,} bytes"
        )
    return TensorInfo(name, dtype, tuple(shape), path.name, data_start + offsets[0], num_bytes)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)


def _span(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.offset, tensor.num_bytes


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
