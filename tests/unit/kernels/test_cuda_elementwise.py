"""Elementwise kernels in Triton's interpreter equal their references, at widths that no block size divides."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is there: tests/gpu runs the kernels natively", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from elementwise_checks import (
    check_fp8_norm_of_a_sum,
    check_fp8_rows,
    check_late_scales,
    check_norm_and_silu_mul,
    check_rotate_and_write,
)

DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("width", [1, 80, 128, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_silu_mul(dtype: torch.dtype, width: int) -> None:
    check_norm_and_silu_mul("cpu", dtype, 5, width)


@pytest.mark.parametrize("width", [16, 200])
@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1.0, 1e4])
def test_fp8_rows(magnitude: float, width: int) -> None:
    check_fp8_rows("cpu", torch.float32, magnitude, 5, width)


@pytest.mark.parametrize("width", [16, 200])
def test_fp8_norm_of_a_sum(width: int) -> None:
    check_fp8_norm_of_a_sum("cpu", torch.float32, 5, width)


@pytest.mark.parametrize("width", [16, 200])
@pytest.mark.parametrize("has_more", [False, True])
def test_late_scales(*, has_more: bool, width: int) -> None:
    check_late_scales("cpu", torch.float32, 5, width, has_more=has_more)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 64), ((6, 2), 80), ((7, 1), 96), ((8, 2), 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_and_write(*, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, has_norm: bool) -> None:
    check_rotate_and_write("cpu", dtype, 9, heads, head_dim, has_norm=has_norm)
