"""Elementwise kernels on the GPU equal their references, in the sizes of real models."""

import pytest
import torch

from elementwise_checks import check_fp8_rows, check_late_scales, check_norm_and_silu_mul, check_rotate_and_write

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("rows", [1, 17, 256])
@pytest.mark.parametrize("width", [80, 896, 4096, 5120, 14336, 18944])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_silu_mul(dtype: torch.dtype, width: int, rows: int) -> None:
    check_norm_and_silu_mul("cuda", dtype, rows, width)


@pytest.mark.parametrize("width", [16, 4096, 14336, 18944])
@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_rows(dtype: torch.dtype, magnitude: float, width: int) -> None:
    check_fp8_rows("cuda", dtype, magnitude, 33, width)


@pytest.mark.parametrize("width", [16, 4096, 14336, 18944])
@pytest.mark.parametrize("has_more", [False, True])
def test_late_scales(*, has_more: bool, width: int) -> None:
    check_late_scales("cuda", torch.bfloat16, 33, width, has_more=has_more)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((32, 8), 128), ((28, 4), 128), ((8, 8), 64), ((6, 2), 80), ((7, 1), 96)]
)
@pytest.mark.parametrize("num_tokens", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_and_write(
    *, dtype: torch.dtype, num_tokens: int, heads: tuple[int, int], head_dim: int, has_norm: bool
) -> None:
    check_rotate_and_write("cuda", dtype, num_tokens, heads, head_dim, has_norm=has_norm)
