"""What lies between the products of a prefill or a big decode batch: norms, SiLU·mul, scales.

Each is one pass over its rows, computed in float32 and rounded where transformers rounds: a norm
before its weights, SiLU before it is multiplied. The fp8 variants round only their results, to what
a product with per-token activation scales takes: codes and one scale a row, amax / 448. `scale_rows`
and `silu_mul_fp8` can apply the scales of a product that left them out.

Which step needs which kernel is decided by the model; the products and the rotation are elsewhere.
"""

import torch
import triton
import triton.language as tl

from hasten.kernels.cuda.dependent_launch import begin, has_dependent_launch, launch_options

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""

MIN_AMAX = 1e-12
"""A row of zeros gets the scale of this amax, so that no scale is zero."""

FP8 = torch.float8_e4m3fn


@triton.jit
def _store_fp8(
    codes, scales, row, columns, mask, y, WIDTH: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr
):
    amax = tl.maximum(tl.max(tl.abs(y), 0), SMALLEST)
    y = tl.minimum(tl.maximum(y * (LARGEST / amax), -LARGEST), LARGEST)
    tl.store(codes + row * WIDTH + columns, y.to(codes.dtype.element_ty), mask=mask)
    tl.store(scales + row, amax / LARGEST)


@triton.jit
def _rms_norm_kernel(
    x,
    addend,
    weight,
    out,
    scales,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_NORM: tl.constexpr,
    TO_FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    dtype = x.dtype.element_ty
    if HAS_NORM:
        factors = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    begin(PDL)
    at = row * WIDTH + columns
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        rounded = (y + tl.load(addend + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(x + at, rounded, mask=mask)
        y = rounded.to(tl.float32)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(y * y, 0) / WIDTH + eps)
        if not TO_FP8:
            y = y.to(dtype).to(tl.float32)
        y *= factors
    if TO_FP8:
        _store_fp8(out, scales, row, columns, mask, y, WIDTH, LARGEST, SMALLEST)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_kernel(
    gate_up,
    row_scale,
    column_scale,
    out,
    scales,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    TO_FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    if HAS_SCALES:
        gate_scale = tl.load(column_scale + columns, mask=mask, other=0.0)
        up_scale = tl.load(column_scale + WIDTH + columns, mask=mask, other=0.0)
    begin(PDL)
    start = gate_up + row * (2 * WIDTH)
    gate = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALES:
        factor = tl.load(row_scale + row)
        gate *= gate_scale * factor
        up *= up_scale * factor
    y = gate / (1.0 + tl.exp(-gate))
    if not TO_FP8:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    y *= up
    if TO_FP8:
        _store_fp8(out, scales, row, columns, mask, y, WIDTH, LARGEST, SMALLEST)
    else:
        tl.store(out + row * WIDTH + columns, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scale_rows_kernel(
    x,
    row_scale,
    column_scale,
    bias,
    residual,
    out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    scale = tl.load(column_scale + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        offset = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    begin(PDL)
    y = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    y *= scale * tl.load(row_scale + row)
    if HAS_BIAS:
        y += offset
    if HAS_RESIDUAL:
        y += tl.load(residual + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, y.to(out.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    addend: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm of x [rows, width] over the width; out may be x.

    Args:
        addend: [rows, width], first added to x, in place.
    """
    out = torch.empty_like(x) if out is None else out
    _row_kernel(x, addend, weight, eps, out, None)
    return out


def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, addend: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x [rows, width] as float8_e4m3fn codes [rows, width] and float32 scales [rows, 1].

    Args:
        addend: [rows, width], first added to x, in place.
    """
    codes, scales = _fp8_outputs(x, x.shape[1])
    _row_kernel(x, addend, weight, eps, codes, scales)
    return codes, scales


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] as float8_e4m3fn codes [rows, width] and float32 scales [rows, 1]."""
    codes, scales = _fp8_outputs(x, x.shape[1])
    _row_kernel(x, None, None, 0.0, codes, scales)
    return codes, scales


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up of gate_up [rows, 2 * width], gate first → [rows, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    block = min(4096, triton.next_power_of_2(width))
    _silu_kernel(gate_up, None, None, out, None, width, block)
    return out


def silu_mul_fp8(
    gate_up: torch.Tensor, row_scale: torch.Tensor | None = None, column_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up as float8_e4m3fn codes [rows, width] and float32 scales [rows, 1].

    Args:
        row_scale, column_scale: [rows, 1] and [2 * width] float32, what gate_up is still to be multiplied by.
    """
    width = gate_up.shape[1] // 2
    codes, scales = _fp8_outputs(gate_up, width)
    _silu_kernel(gate_up, row_scale, column_scale, codes, scales, width, triton.next_power_of_2(width))
    return codes, scales


def scale_rows(
    x: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """x * row_scale * column_scale + bias + residual; out may be x or residual.

    Args:
        x, residual, out: [rows, width].
        row_scale, column_scale: [rows, 1] and [width] float32.
        bias: [width].
    """
    rows, width = x.shape
    assert x.is_contiguous() and out.is_contiguous() and (residual is None or residual.is_contiguous())
    block = min(4096, triton.next_power_of_2(width))
    _scale_rows_kernel[(rows, triton.cdiv(width, block))](
        x,
        row_scale,
        column_scale,
        bias,
        residual,
        out,
        WIDTH=width,
        BLOCK=block,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        PDL=has_dependent_launch(),
        num_warps=_num_warps(block),
        **launch_options(),
    )
    return out


def _fp8_outputs(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape[0], width, dtype=FP8, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def _row_kernel(
    x: torch.Tensor,
    addend: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    rows, width = x.shape
    assert x.is_contiguous() and out.is_contiguous() and (addend is None or addend.is_contiguous())
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](
        x,
        addend,
        weight,
        out,
        scales,
        eps,
        WIDTH=width,
        BLOCK=block,
        HAS_ADDEND=addend is not None,
        HAS_NORM=weight is not None,
        TO_FP8=scales is not None,
        LARGEST=FP8_MAX,
        SMALLEST=MIN_AMAX,
        PDL=has_dependent_launch(),
        num_warps=_num_warps(block),
        **launch_options(),
    )


def _silu_kernel(
    gate_up: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    width: int,
    block: int,
) -> None:
    assert gate_up.is_contiguous() and out.is_contiguous()
    _silu_mul_kernel[(gate_up.shape[0], triton.cdiv(width, block))](
        gate_up,
        row_scale,
        column_scale,
        out,
        scales,
        WIDTH=width,
        BLOCK=block,
        HAS_SCALES=row_scale is not None,
        TO_FP8=scales is not None,
        LARGEST=FP8_MAX,
        SMALLEST=MIN_AMAX,
        PDL=has_dependent_launch(),
        num_warps=_num_warps(block),
        **launch_options(),
    )


def _num_warps(block: int) -> int:
    """16 elements a thread, so that a row's loads are all in flight at once."""
    return min(16, max(1, block // 512))
