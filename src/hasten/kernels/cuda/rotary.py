"""Rotary positions on a GPU: a step's qkv is split, q and k are rotated, and k and v are written into the cache.

One pass over the tokens, rounded where transformers rounds: a norm before its weights, and each product of
the rotation. The kernel for decode tokens (`decode_kernel`) rotates
for itself, with `load_heads`.
"""

import torch
import triton
import triton.language as tl

from hasten.kernels.cuda.dependent_launch import begin, has_dependent_launch, launch_options


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def load_heads(
    source, heads, seen, cos, sin, weight, eps, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HAS_NORM: tl.constexpr
):
    """Heads of one token, [len(heads), DIM], normalized if wanted and rotated in pairs (i, i + half).

    source: the token's first head; seen: which heads are read; cos, sin: the position's row;
    weight: of the norm over a head. DIM is HEAD_DIM rounded up; what is past HEAD_DIM is 0.
    """
    dtype = source.dtype.element_ty
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
        own_weight = tl.load(weight + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
        partner_weight = tl.load(weight + partners, mask=is_dim, other=0.0).to(tl.float32)[None, :]
        own = _rounded(_rounded(own * inverse, dtype) * own_weight, dtype)
        partner = _rounded(_rounded(partner * inverse, dtype) * partner_weight, dtype)
    turned = _rounded(partner * tl.where(is_first, -s, s)[None, :], dtype)
    return (_rounded(own * c[None, :], dtype) + turned).to(dtype)


# slices of one array, aligned differently in each step: one kernel is to serve all
@triton.jit(do_not_specialize_on_alignment=["positions", "slot_mapping"])
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

    q = load_heads(source, heads, is_head, cos, sin, q_norm, eps, HEAD_DIM, DIM, HAS_NORM)
    to = token * (NUM_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
    tl.store(q_out + to, q, mask=is_head[:, None] & (dims < HEAD_DIM)[None, :])

    source += NUM_HEADS * HEAD_DIM
    row = kv_heads[:, None] * HEAD_DIM + dims[None, :]
    mask = is_kv_head[:, None] & (dims < HEAD_DIM)[None, :]
    k = load_heads(source, kv_heads, is_kv_head, cos, sin, k_norm, eps, HEAD_DIM, DIM, HAS_NORM)
    v = tl.load(source + NUM_KV_HEADS * HEAD_DIM + row, mask=mask)
    tl.store(k_out + token * (NUM_KV_HEADS * HEAD_DIM) + row, k, mask=mask)
    tl.store(v_out + token * (NUM_KV_HEADS * HEAD_DIM) + row, v, mask=mask)
    in_cache = slot * (NUM_KV_HEADS * HEAD_DIM) + row
    tl.store(keys + in_cache, k, mask=mask & (slot >= 0))
    tl.store(values + in_cache, v, mask=mask & (slot >= 0))


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
        cos, sin: [max_positions, head_dim / 2] float32, of values that qkv's dtype has.
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
