"""Elementwise kernels in Triton's interpreter equal their references, at widths that no block size divides."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is there: tests/gpu runs the kernels natively", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from hasten.kernels.cuda import elementwise
from hasten.kernels.rms_norm import rms_norm_reference
from hasten.kernels.rotary import rotate_reference
from hasten.kernels.silu_mul import silu_mul_reference

BLOCK_SIZE = 16
EPS = 1e-5
DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3)]


@pytest.mark.parametrize("width", [1, 80, 128, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_norm_and_silu_mul(dtype: torch.dtype, tolerance: float, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    gate_up = torch.randn(5, 2 * width).to(dtype)
    norm = elementwise.rms_norm(x, weight, EPS, out=torch.full_like(x, float("nan")))
    product = elementwise.silu_mul(gate_up)
    expected = silu_mul_reference(gate_up.float()).to(dtype)
    torch.testing.assert_close(norm, rms_norm_reference(x, weight, EPS), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(product, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("width", [16, 200])
@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1.0, 1e4])
def test_fp8_rows(magnitude: float, width: int) -> None:
    """Codes times scales are the values, to half a step of three mantissa bits; a row of zeros stays zeros."""
    torch.manual_seed(0)
    x = torch.randn(5, width) * magnitude
    weight, gate_up = torch.randn(width), torch.randn(5, 2 * width) * magnitude
    for (codes, scales), expected in (
        (elementwise.quantize_fp8(x), x),
        (elementwise.rms_norm_fp8(x, weight, EPS), rms_norm_reference(x, weight, EPS)),
        (elementwise.silu_mul_fp8(gate_up), silu_mul_reference(gate_up)),
    ):
        assert codes.dtype == torch.float8_e4m3fn and scales.shape == (5, 1) and bool((scales > 0).all())
        amax = expected.abs().amax(1, keepdim=True)
        torch.testing.assert_close(scales, amax.clamp(min=elementwise.MIN_AMAX) / 448, rtol=1e-5, atol=0)
        error = (codes.float() * scales - expected).abs()
        is_power = torch.frexp((expected / scales).to(torch.float8_e4m3fn).float()).mantissa.abs() == 0.5
        # Triton 3.6's interpreter loses the carry where rounding reaches the next power of two
        assert bool((is_power | (error <= expected.abs() / 15 + amax / 448 / 500)).all())


@pytest.mark.parametrize("width", [16, 200])
@pytest.mark.parametrize("has_more", [False, True])
def test_late_scales(*, has_more: bool, width: int) -> None:
    torch.manual_seed(0)
    x, row_scale, column_scale = torch.randn(5, width), torch.rand(5, 1), torch.rand(width)
    bias, residual = (torch.randn(width), torch.randn(5, width)) if has_more else (None, None)
    expected = x * row_scale * column_scale + (bias + residual if has_more else 0)
    out = x if residual is None else residual
    assert elementwise.scale_rows(x, row_scale, column_scale, bias=bias, residual=residual, out=out) is out
    torch.testing.assert_close(out, expected)
    gate_up, scales = torch.randn(5, 2 * width), torch.rand(2 * width)
    late = elementwise.silu_mul_fp8(gate_up, row_scale, scales)
    for actual, wanted in zip(late, elementwise.silu_mul_fp8(gate_up * row_scale * scales), strict=True):
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=0.13, atol=1e-6)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 64), ((6, 2), 80), ((7, 1), 96), ((8, 2), 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rotate_and_write(
    *, dtype: torch.dtype, tolerance: float, heads: tuple[int, int], head_dim: int, has_norm: bool
) -> None:
    torch.manual_seed(0)
    num_tokens, (num_heads, num_kv_heads) = 9, heads
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    angles = torch.randn(50, head_dim // 2)
    positions = torch.randint(50, (num_tokens,))
    slots = torch.randperm(3 * BLOCK_SIZE)[:num_tokens]
    slots[4] = -1
    keys, values = (torch.full((3, BLOCK_SIZE, num_kv_heads, head_dim), 7.0, dtype=dtype) for _ in range(2))
    norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if has_norm else (None, None)
    q, k, v = elementwise.rotate_and_write(
        qkv,
        angles.cos(),
        angles.sin(),
        positions.int(),
        slots.int(),
        keys,
        values,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm=norms[0],
        k_norm=norms[1],
        eps=EPS,
    )
    split = qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), 1)
    rotations = torch.polar(torch.ones(num_tokens, 1, head_dim // 2), angles[positions].unsqueeze(1))
    for actual, source, weight in ((q, split[0], norms[0]), (k, split[1], norms[1])):
        wide = source.float() if weight is None else rms_norm_reference(source.float(), weight, EPS)
        torch.testing.assert_close(actual, rotate_reference(wide, rotations).to(dtype), atol=tolerance, rtol=tolerance)
    assert torch.equal(v, split[2])
    for cache, rows in ((keys, k), (values, v)):
        expected = torch.full_like(cache, 7.0)
        expected.flatten(0, 1)[slots[slots >= 0]] = rows[slots >= 0]
        assert torch.equal(cache, expected)
