"""Elementwise kernels equal their float32 references; outputs are poisoned first where they are given.

Runs natively on a GPU and in Triton's interpreter; the tests choose shapes that each can take.
"""

import torch

from hasten.kernels.rms_norm import rms_norm_reference
from hasten.kernels.rotary import rotate_reference
from hasten.kernels.silu_mul import silu_mul_reference

BLOCK_SIZE = 16
NUM_BLOCKS = 40
EPS = 1e-5
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}


def check_norm_and_silu_mul(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    from hasten.kernels.cuda import elementwise

    torch.manual_seed(0)
    tolerance = TOLERANCES[dtype]
    with torch.device(device):
        x, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
        gate_up = torch.randn(rows, 2 * width).to(dtype)
    norm = elementwise.rms_norm(x, weight, EPS, out=torch.full_like(x, float("nan")))
    product = elementwise.silu_mul(gate_up, out=torch.full_like(x, float("nan")))
    torch.testing.assert_close(norm, rms_norm_reference(x, weight, EPS), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(product, silu_mul_reference(gate_up), atol=tolerance, rtol=tolerance)
    assert elementwise.rms_norm(x, weight, EPS, out=x) is x
    assert torch.equal(x, norm)
    addend, hidden = gate_up[:, :width].contiguous(), gate_up[:, width:].contiguous()
    total = hidden + addend
    norm = elementwise.rms_norm(hidden, weight, EPS, addend=addend)
    assert torch.equal(hidden, total)
    assert torch.equal(norm, elementwise.rms_norm(total, weight, EPS))


def check_fp8_rows(device: str, dtype: torch.dtype, magnitude: float, rows: int, width: int) -> None:
    """Codes times scales are the values, to half a step of three mantissa bits; a row of zeros stays zeros."""
    from hasten.kernels.cuda import elementwise

    torch.manual_seed(0)
    with torch.device(device):
        x, weight = (torch.randn(rows, width) * magnitude).to(dtype), torch.randn(width).to(dtype)
        gate_up = (torch.randn(rows, 2 * width) * magnitude).to(dtype)
    for (codes, scales), expected in (
        (elementwise.quantize_fp8(x), x.float()),
        (elementwise.rms_norm_fp8(x, weight, EPS), rms_norm_reference(x.float(), weight, EPS)),
        (elementwise.silu_mul_fp8(gate_up), silu_mul_reference(gate_up.float())),
    ):
        assert codes.dtype == torch.float8_e4m3fn and scales.shape == (rows, 1) and bool((scales > 0).all())
        amax = expected.abs().amax(1, keepdim=True)
        torch.testing.assert_close(scales, amax.clamp(min=elementwise.MIN_AMAX) / 448, rtol=1e-5, atol=0)
        is_right = (codes.float() * scales - expected).abs() <= expected.abs() / 15 + scales / 500
        if device == "cpu":  # Triton 3.6's interpreter loses the carry where rounding reaches the next power of two
            is_right |= torch.frexp((expected / scales).to(torch.float8_e4m3fn).float()).mantissa.abs() == 0.5
        assert bool(is_right.all())


def check_fp8_norm_of_a_sum(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    from hasten.kernels.cuda import elementwise

    torch.manual_seed(0)
    with torch.device(device):
        x, addend, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, width), (rows, width), (width,)))
    total = x + addend
    found = elementwise.rms_norm_fp8(x, weight, EPS, addend=addend)
    assert torch.equal(x, total)
    for actual, expected in zip(found, elementwise.rms_norm_fp8(total, weight, EPS), strict=True):
        assert torch.equal(actual.float(), expected.float())


def check_late_scales(device: str, dtype: torch.dtype, rows: int, width: int, *, has_more: bool) -> None:
    from hasten.kernels.cuda import elementwise

    torch.manual_seed(0)
    with torch.device(device):
        x, row_scale, column_scale = torch.randn(rows, width).to(dtype), torch.rand(rows, 1), torch.rand(width)
        bias, residual = (torch.randn(width).to(dtype), torch.randn(rows, width).to(dtype)) if has_more else (None,) * 2
        gate_up, scales = torch.randn(rows, 2 * width), torch.rand(2 * width)
    expected = x.float() * row_scale * column_scale
    if bias is not None and residual is not None:
        expected = expected + bias.float() + residual.float()
    out = x if residual is None else residual
    assert elementwise.scale_rows(x, row_scale, column_scale, bias=bias, residual=residual, out=out) is out
    torch.testing.assert_close(out, expected.to(dtype), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    late = elementwise.silu_mul_fp8(gate_up, row_scale, scales)
    for actual, wanted in zip(late, elementwise.silu_mul_fp8(gate_up * row_scale * scales), strict=True):
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=0.13, atol=1e-6)


def check_rotate_and_write(
    device: str, dtype: torch.dtype, num_tokens: int, heads: tuple[int, int], head_dim: int, *, has_norm: bool
) -> None:
    """Rows of q and k are rotated, those of k and v written; a negative slot is skipped."""
    from hasten.kernels.cuda.rotary import rotate_and_write

    torch.manual_seed(0)
    num_heads, num_kv_heads = heads
    with torch.device(device):
        qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        angles = torch.randn(1000, head_dim // 2)
        positions = torch.randint(1000, (num_tokens,))
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens]
        slots[num_tokens // 2 :: 7] = -1
        cache_shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
        keys, values = (torch.full(cache_shape, 7.0, dtype=dtype) for _ in range(2))
        norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if has_norm else (None, None)
    q, k, v = rotate_and_write(
        qkv,
        angles.cos().to(dtype).float(),
        angles.sin().to(dtype).float(),
        positions,
        slots,
        keys,
        values,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm=norms[0],
        k_norm=norms[1],
        eps=EPS,
    )
    split = qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), 1)
    rotations = torch.polar(torch.ones_like(angles[positions]), angles[positions]).unsqueeze(1)
    for actual, source, weight in ((q, split[0], norms[0]), (k, split[1], norms[1])):
        expected = rotate_reference(source if weight is None else rms_norm_reference(source, weight, EPS), rotations)
        torch.testing.assert_close(actual, expected, atol=4 * TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert torch.equal(v, split[2])
    for cache, rows in ((keys, k), (values, v)):
        expected = torch.full_like(cache, 7.0)
        expected.flatten(0, 1)[slots[slots >= 0]] = rows[slots >= 0]
        assert torch.equal(cache, expected)
