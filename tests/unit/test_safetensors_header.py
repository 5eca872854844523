import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from hasten.errors import WeightsError
from hasten.safetensors_header import read_weights_file

GOOD = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int8)}, {"format": "pt"})


def with_header(header: object, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    tensors = read_weights_file(path).tensors
    assert {name: (each.dtype, each.shape, each.num_bytes) for name, each in tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("I8", (4,), 4),
    }
    start = tensors["a"].offset
    assert np.frombuffer(GOOD[start : start + 24], np.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has only 0 bytes"),
        (b"abc", "has only 3 bytes"),
        (GOOD[:-1], f"is truncated: the header says {len(GOOD)} bytes, the file has {len(GOOD) - 1}"),
        (GOOD[:40], "is truncated: its header alone has"),
        (GOOD + b"x", "has bytes that its header does not describe"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer.*git lfs pull"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "PyTorch zip archive: convert"),
        (b"\x80\x02}q\x00(X\x01" + bytes(100), "Python pickle: convert"),
        (b"GGUF\x03\0\0\0" + bytes(100), "GGUF file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML or XML page"),
        (struct.pack("<Q", 2**63) + b"{}", "header would have 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "at most 100,000,000 are allowed"),
        (struct.pack("<Q", 2) + b"[]", "does not begin with a header"),
        (with_header(b"{nonsense}"), "not valid JSON"),
        (with_header(b'{"a": ' + b"[" * 100_000), "not valid JSON"),
        (with_header(b'{"\xff": 1}'), "not valid JSON"),
        (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (with_header(b'{"a": {}, "a": {}}'), "a key appears twice"),
        (with_header({"a": 3}), "entry of tensor a is not an object"),
        (with_header({"a": {}}), "unknown dtype None"),
        (with_header({"a": entry(dtype="F31")}, bytes(4)), "unknown dtype 'F31'"),
        (with_header({"a": entry(dtype=["F32"])}, bytes(4)), "unknown dtype"),
        (with_header({"a": entry(shape=[-1])}, bytes(4)), "impossible shape"),
        (with_header({"a": entry(shape=[True])}, bytes(4)), "impossible shape"),
        (with_header({"a": entry(shape=[1.0])}, bytes(4)), "impossible shape"),
        (with_header({"a": entry(shape=4)}, bytes(4)), "impossible shape"),
        (with_header({"a": entry(shape=[1] * 65)}, bytes(4)), "impossible shape"),
        (with_header({"a": entry(shape=[2**63])}, bytes(4)), "impossible shape"),
        (with_header({"a": entry(shape=[2**62, 2**62])}, bytes(4)), "does not fill 4 bytes"),
        (with_header({"a": entry(shape=[2])}, bytes(4)), "does not fill 4 bytes"),
        (with_header({"a": entry(data_offsets=[4, 0])}, bytes(4)), "impossible data_offsets"),
        (with_header({"a": entry(data_offsets=[-4, 0])}, bytes(4)), "impossible data_offsets"),
        (with_header({"a": entry(data_offsets=[0])}, bytes(4)), "impossible data_offsets"),
        (with_header({"a": entry(), "b": entry()}, bytes(4)), "overlaps another tensor"),
        (with_header({"a": entry(data_offsets=[4, 8])}, bytes(8)), "leaves a gap"),
        (with_header({"\x1b[31m": entry()}, bytes(4)), "not printable text"),
        (with_header({"a" * 1001: entry()}, bytes(4)), "not printable text"),
    ],
)
def test_hostile_file_is_refused_with_its_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_weights_file(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(WeightsError, match="not a regular file"):
        read_weights_file(path)


def test_link_that_leads_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"cannot read .*: No such file"):
        read_weights_file(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)


def check_never_crashes(path: Path, content: bytes) -> None:
    """Either the file is refused as WeightsError or its tensors fill it exactly."""
    path.write_bytes(content)
    try:
        tensors = read_weights_file(path).tensors
    except WeightsError:
        return
    data_start = 8 + struct.unpack("<Q", content[:8])[0]
    assert data_start + sum(tensor.num_bytes for tensor in tensors.values()) == len(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@given(content=st.binary(max_size=64))
def test_random_bytes(scratch: Path, content: bytes) -> None:
    check_never_crashes(scratch, content)
    check_never_crashes(scratch, with_header(b"{" + content))


@given(header=st.dictionaries(st.text(max_size=8), entries | json_values, max_size=3), data=st.binary(max_size=40))
def test_random_headers(scratch: Path, header: dict[str, Any], data: bytes) -> None:
    check_never_crashes(scratch, with_header(header, data))


@given(position=st.integers(0, len(GOOD) - 1), replacement=st.binary(max_size=3), length=st.integers(0, 4))
def test_mutated_files(scratch: Path, position: int, replacement: bytes, length: int) -> None:
    check_never_crashes(scratch, GOOD[:position] + replacement + GOOD[position + length :])
