"""What lies between the products of a prefill or a big decode batch: norms, rotary with the cache write, SiLU·mul.

Each is one pass over its rows, computed in float32. The fp8 variants return what a product
with per-token activation scales takes: codes and one scale a row, amax / 448. `scale_rows` and
`silu_mul_fp8` can apply the scales of a product that left them out. On Hopper the kernels start
while their predecessor still runs and wait for it before their first read.

Which step needs which kernel is decided by the model; the products are elsewhere.
"""

import functools
import os

import torch
import triton
import triton.language as tl

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""

MIN_AMAX = 1e-12
"""A row of zeros gets the scale of this amax, so that no scale is zero."""

FP8 = torch.float8_e4m3fn


@functools.cache
def has_dependent_launch() -> bool:
    """Whether kernels may start before their predecessor ends (programmatic dependent launch)."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] >= 9


def launch_options() -> dict[str, bool]:
    """Keyword arguments of a launch, besides the kernel's own PDL argument."""
    return {"launch_pdl": True} if has_dependent_launch() else {}


@triton.jit
def begin(PDL: tl.constexpr):
    """Lets the successor start, then waits until the predecessor's writes are there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def load_heads(
    source, heads, seen, cos, sin, weight, eps, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HAS_NORM: tl.constexpr
):
    """Heads of one token in float32, [len(heads), DIM], normalized if wanted and rotated in pairs (i, i + half).

    source: the token's first head; seen: which heads are read; cos, sin: the position's row;
    weight: of the norm over a head. DIM is HEAD_DIM rounded up; what is past HEAD_DIM is 0.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, DIM)
    is_dim = dims < HEAD_DIM
    is_first = dims < HALF
    partners = tl.where(is_first, dims + HALF, dims - HALF)
    mask = seen[:, None] & is_dim[None, :]
    rows = source + heads[:, None] * HEAD_DIM
    own = tl.load(rows + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(rows + partners[None, :], mask=mask, other=0.0).to(tl.float32)
    pairs = tl.where(is_first, dims, dims - HALF)
    c = tl.load(cos + pairs, mask=is_dim, other=0.0)
    s = tl.load(sin + pairs, mask=is_dim, other=0.0)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(own * own, 1) / HEAD_DIM + eps)[:, None]
        own *= inverse * tl.load(weight + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
        partner *= inverse * tl.load(weight + partners, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    return own * c[None, :] + partner * tl.where(is_first, -s, s)[None, :]


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
    weight,
    out,
    scales,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    TO_FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    if HAS_NORM:
        factors = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    begin(PDL)
    y = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        y = y * tl.rsqrt(tl.sum(y * y, 0) / WIDTH + eps) * factors
    if TO_FP8:
        _store_fp8(out, scales, row, columns, mask, y, WIDTH, LARGEST, SMALLEST)
    else:
        tl.store(out + row * WIDTH + columns, y.to(out.dtype.element_ty), mask=mask)


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
    y = gate / (1.0 + tl.exp(-gate)) * up
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


@triton.jit
def _rotate_and_write_kernel(
    qkv,
    cos,
    sin,
    positions,
    slot_mapping,
    keys,
    values,
    q_out,
    k_out,
    v_out,
    q_norm,
    k_norm,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    kv_heads = tl.arange(0, KV_HEADS)
    dims = tl.arange(0, DIM)
    is_head = heads < NUM_HEADS
    is_kv_head = kv_heads < NUM_KV_HEADS
    begin(PDL)
    position = tl.maximum(tl.load(positions + token), 0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    cos += position * (HEAD_DIM // 2)
    sin += position * (HEAD_DIM // 2)
    source = qkv + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    dtype = qkv.dtype.element_ty

    q = load_heads(source, heads, is_head, cos, sin, q_norm, eps, HEAD_DIM, DIM, HAS_NORM).to(dtype)
    to = token * (NUM_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
    tl.store(q_out + to, q, mask=is_head[:, None] & (dims < HEAD_DIM)[None, :])

    source += NUM_HEADS * HEAD_DIM
    row = kv_heads[:, None] * HEAD_DIM + dims[None, :]
    mask = is_kv_head[:, None] & (dims < HEAD_DIM)[None, :]
    k = load_heads(source, kv_heads, is_kv_head, cos, sin, k_norm, eps, HEAD_DIM, DIM, HAS_NORM).to(dtype)
    v = tl.load(source + NUM_KV_HEADS * HEAD_DIM + row, mask=mask)
    tl.store(k_out + token * (NUM_KV_HEADS * HEAD_DIM) + row, k, mask=mask)
    tl.store(v_out + token * (NUM_KV_HEADS * HEAD_DIM) + row, v, mask=mask)
    in_cache = slot * (NUM_KV_HEADS * HEAD_DIM) + row
    tl.store(keys + in_cache, k, mask=mask & (slot >= 0))
    tl.store(values + in_cache, v, mask=mask & (slot >= 0))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm of x [rows, width] over the width; out may be x."""
    out = torch.empty_like(x) if out is None else out
    _row_kernel(x, weight, eps, out, None)
    return out


def rms_norm_fp8(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x [rows, width] as float8_e4m3fn codes [rows, width] and float32 scales [rows, 1]."""
    codes, scales = _fp8_outputs(x, x.shape[1])
    _row_kernel(x, weight, eps, codes, scales)
    return codes, scales


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] as float8_e4m3fn codes [rows, width] and float32 scales [rows, 1]."""
    codes, scales = _fp8_outputs(x, x.shape[1])
    _row_kernel(x, None, 0.0, codes, scales)
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


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits a step's qkv, normalizes (if given) and rotates q and k, and writes k and v into the cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        cos, sin: [max_positions, head_dim / 2] float32.
        positions: [num_tokens] int32 or int64.
        slot_mapping: [num_tokens] int32 or int64, where a token's k and v go; a negative slot is skipped.
        keys, values: one layer's cache, [num_blocks, block_size, num_kv_heads, head_dim].
        q_norm, k_norm: [head_dim], weights of an RMSNorm over each head.
        out: memory for what is returned; it may have room for more tokens.

    Returns:
        q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim], contiguous; or out.
    """
    num_tokens, head_dim = qkv.shape[0], keys.shape[3]
    assert qkv.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = out or tuple(qkv.new_empty(num_tokens, count, head_dim) for count in heads)
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and len(q) >= num_tokens
    _rotate_and_write_kernel[(num_tokens,)](
        qkv,
        cos,
        sin,
        positions,
        slot_mapping,
        keys,
        values,
        q,
        k,
        v,
        q_norm,
        k_norm,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HEADS=triton.next_power_of_2(num_heads),
        KV_HEADS=triton.next_power_of_2(num_kv_heads),
        DIM=triton.next_power_of_2(head_dim),
        HAS_NORM=q_norm is not None,
        PDL=has_dependent_launch(),
        num_warps=4,
        **launch_options(),
    )
    return q, k, v


def _fp8_outputs(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape[0], width, dtype=FP8, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def _row_kernel(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor, scales: torch.Tensor | None
) -> None:
    rows, width = x.shape
    assert x.is_contiguous() and out.is_contiguous()
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](
        x,
        weight,
        out,
        scales,
        eps,
        WIDTH=width,
        BLOCK=block,
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
