"""Decode attention as a Triton kernel: contexts are split over programs, the last to arrive combines.

It serves what the CUDA C++ kernel of `decode_attention` does not: float32, groups of more than
8 queries, GPUs before Hopper, and Triton's interpreter on a CPU. Which programs take part is
worked out from the row's position at run time. Counters are zero between launches.
"""

import triton
import triton.language as tl

from hasten.kernels.cuda.rotary import load_heads


@triton.jit
def load_tile(
    keys,
    values,
    table,
    tile,
    first,
    end,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Keys and values of a tile's positions that lie in [first, end), zeros elsewhere: [TILE, DIM] each."""
    positions = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    seen = (positions >= first) & (positions < end)
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    rows = ((blocks * BLOCK_SIZE + positions % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
    mask = seen[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(keys + rows[:, None] + dims[None, :], mask=mask, other=0.0)
    v = tl.load(values + rows[:, None] + dims[None, :], mask=mask, other=0.0)
    return k, v, seen


@triton.jit
def add_keys(scores, v, maximum, total, attended):
    """Adds keys to an online softmax in base 2; all of a row's may be hidden (-inf) where its maximum is finite."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, 1)
    attended = tl.dot(weights.to(v.dtype), v, attended * decay[:, None], input_precision="ieee")
    return new_maximum, total, attended


@triton.jit
def _attend(q, k, v, seen, scale, maximum, total, attended):
    """Adds a tile, of which at least one position is seen."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    return add_keys(scores, v, maximum, total, attended)


@triton.jit
def _combine(
    partials,
    maxima,
    sums,
    out,
    num_active,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merges the partial results of one row and key head; the pointers are at their first one."""
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIM)
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    attended = tl.zeros([HEADS, DIM], tl.float32)
    is_value = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    for start in range(0, num_active, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        rows = splits[:, None] * GROUP + heads[None, :]
        is_active = splits < num_active
        mask = is_active[:, None] & (heads < GROUP)[None, :]
        part_maximum = tl.load(maxima + rows, mask=mask, other=0.0, cache_modifier=".cg")
        part_total = tl.load(sums + rows, mask=mask, other=1.0, cache_modifier=".cg")
        part = tl.load(
            partials + rows[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=is_active[:, None, None] & is_value[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        part_maximum = tl.where(is_active[:, None], part_maximum, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(part_maximum, 0))
        weights = tl.exp2(part_maximum - new_maximum[None, :])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(part_total * weights, 0)
        attended = attended * decay[:, None] + tl.sum(part * weights[:, :, None], 0)
        maximum = new_maximum
    attended = attended / total[:, None]
    tl.store(out + heads[:, None] * HEAD_DIM + dims[None, :], attended.to(out.dtype.element_ty), mask=is_value)


@triton.jit(
    do_not_specialize=["window", "tiles_per_split", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "slots", "positions"],
)
def decode_kernel(
    qkv,
    cos,
    sin,
    keys,
    values,
    block_tables,
    slots,
    positions,
    q_norm,
    k_norm,
    partials,
    maxima,
    sums,
    counters,
    out,
    eps,
    scale,
    window,
    tiles_per_split,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not EARLY:
            tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    heads = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, DIM)
    is_dim = dims < HEAD_DIM
    is_value = (heads < GROUP)[:, None] & is_dim[None, :]
    to = (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP  # the group's first head among all rows' heads

    first = tl.maximum(position - window + 1, 0)
    end = position  # the token itself is added below
    first_tile = first // TILE
    end_tile = tl.where(end > first, (end + TILE - 1) // TILE, first_tile)
    num_active = (end_tile - first_tile + tiles_per_split - 1) // tiles_per_split
    num_active = tl.minimum(tl.maximum(num_active, 1), num_splits)
    if (position < 0) | (split >= num_active):
        if PDL and EARLY:
            tl.extra.cuda.gdc_wait()
        if (position < 0) & (split == 0):
            nothing = tl.zeros([PADDED_GROUP, DIM], out.dtype.element_ty)
            tl.store(out + (to + heads[:, None]) * HEAD_DIM + dims[None, :], nothing, mask=is_value)
        return

    table = block_tables + slot.to(tl.int64) * table_stride
    tile = first_tile + split
    if EARLY:  # the first tile is on its way while the predecessor still computes q
        first_k, first_v, first_seen = load_tile(
            keys, values, table, tile, first, end, kv_head, NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, TILE
        )
        if PDL:
            tl.extra.cuda.gdc_wait()

    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    attended = tl.zeros([PADDED_GROUP, DIM], tl.float32)
    cos += position.to(tl.int64) * (HEAD_DIM // 2)
    sin += position.to(tl.int64) * (HEAD_DIM // 2)
    source = qkv + row.to(tl.int64) * (NUM_KV_HEADS * (GROUP + 2) * HEAD_DIM)
    group = source + kv_head * GROUP * HEAD_DIM
    q = load_heads(group, heads, heads < GROUP, cos, sin, q_norm, eps, HEAD_DIM, DIM, HAS_NORM)
    if split == 0:  # the token itself
        own = source + (NUM_KV_HEADS * GROUP + kv_head) * HEAD_DIM
        one = tl.arange(0, 1)
        own_k = load_heads(own, one, one == 0, cos, sin, k_norm, eps, HEAD_DIM, DIM, HAS_NORM)
        own_v = tl.load(own + NUM_KV_HEADS * HEAD_DIM + dims[None, :], mask=is_dim[None, :], other=0.0)
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        cell = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        tl.store(keys + cell + dims[None, :], own_k, mask=is_dim[None, :])
        tl.store(values + cell + dims[None, :], own_v, mask=is_dim[None, :])
        maximum = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * scale
        total = tl.full([PADDED_GROUP], 1.0, tl.float32)
        attended += own_v.to(tl.float32)

    if EARLY:
        if tile < end_tile:
            maximum, total, attended = _attend(q, first_k, first_v, first_seen, scale, maximum, total, attended)
        tile += num_active
    for each in range(tile, end_tile, num_active):
        k, v, seen = load_tile(
            keys, values, table, each, first, end, kv_head, NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, TILE
        )
        maximum, total, attended = _attend(q, k, v, seen, scale, maximum, total, attended)

    if num_active == 1:
        attended = attended / total[:, None]
        tl.store(
            out + (to + heads[:, None]) * HEAD_DIM + dims[None, :], attended.to(out.dtype.element_ty), mask=is_value
        )
        return
    part = to * num_splits + split * GROUP
    tl.store(partials + (part + heads[:, None]) * HEAD_DIM + dims[None, :], attended, mask=is_value)
    tl.store(maxima + part + heads, maximum, mask=heads < GROUP)
    tl.store(sums + part + heads, total, mask=heads < GROUP)
    tl.debug_barrier()  # every thread's partial result before the one thread that counts
    counter = counters + row * NUM_KV_HEADS + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") == num_active - 1:
        begin = to * num_splits
        _combine(
            partials + begin * HEAD_DIM,
            maxima + begin,
            sums + begin,
            out + to * HEAD_DIM,
            num_active,
            GROUP,
            HEADS,
            HEAD_DIM,
            DIM,
            CHUNK,
        )
        tl.store(counter, 0)
