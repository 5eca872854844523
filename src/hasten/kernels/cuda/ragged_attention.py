"""Attention of a step's tokens over the paged KV cache, whichever sequences they belong to.

A program takes one tile: some consecutive tokens of one sequence, with all query heads of one key head, over
everything that they see of the cache. Which tiles there are is data on the GPU, so that a launch captured in a
CUDA graph serves every step of as many tokens: decodes, prompts, and what follows the part of a prompt that the
prefix cache has.

It reads the cache; `rotary.rotate_and_write` must have written the step's tokens before. One program reads a tile's
whole context: few tokens with long ones are faster in `decode_attention`, which splits it.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from hasten.kernels.cuda.decode_attention import LOG2_E
from hasten.kernels.cuda.decode_kernel import add_keys, load_tile
from hasten.kernels.cuda.dependent_launch import begin, has_dependent_launch, launch_options

ROWS = 64
"""Queries of a tile, a token's heads counted one by one: rows of the tensor cores' first operand."""

MIN_ROWS = 16

TILE_FIELDS = 4
"""int32 values of a tile: its first token's row in the step, its tokens (0: nothing to do), the row of its sequence
in the block tables, and the position of its first token."""

MAX_KEYS, KEY_BYTES = 64, 16384
"""Positions of the cache that a program reads at a time at most, and bytes of their keys."""


def tokens_per_tile(group: int) -> int:
    """Tokens of one tile where a key head has so many query heads."""
    return max(1, ROWS // group)


def attention_tiles(
    starts: np.ndarray, counts: np.ndarray, slots: np.ndarray, positions: np.ndarray, group: int
) -> np.ndarray:
    """The tiles of sequences that have `counts` tokens in a step, [num_tiles, TILE_FIELDS] int32.

    Args:
        starts: row of each sequence's first token in the step.
        slots: its row in the block tables.
        positions: its first token's.
        group: query heads of a key head.
    """
    size = tokens_per_tile(group)
    num_tiles = -(-counts // size)
    owners = np.repeat(np.arange(len(counts)), num_tiles)
    first = (np.arange(len(owners)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * size
    columns = starts[owners] + first, np.minimum(counts[owners] - first, size), slots[owners], positions[owners] + first
    return np.stack(columns, axis=1).astype(np.int32)


def ragged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of all tokens that lie in a tile; what is returned for others means nothing.

    Args:
        q: [num_tokens, heads, dim], rotated.
        keys, values: one layer's cache, [num_blocks, block_size, kv_heads, dim].
        block_tables: [max_num_seqs, max_blocks_per_seq] int32.
        tiles: [num_tiles, TILE_FIELDS] int32, see `attention_tiles`.
        window: tokens that a query sees, itself included; None for all.

    Returns:
        [num_tokens, heads * dim].
    """
    _, block_size, num_kv_heads, head_dim = keys.shape
    group = q.shape[1] // num_kv_heads
    assert q.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and tiles.is_contiguous()
    out, dim = torch.empty_like(q), triton.next_power_of_2(head_dim)
    _ragged_kernel[(len(tiles), num_kv_heads)](
        q,
        keys,
        values,
        block_tables,
        tiles,
        out,
        scale * LOG2_E,
        2**31 - 1 if window is None else window,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(tokens_per_tile(group) * group)),
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=block_size,
        KEYS=min(MAX_KEYS, KEY_BYTES // (dim * keys.element_size())),
        FIELDS=TILE_FIELDS,
        PDL=has_dependent_launch(),
        num_warps=4,
        num_stages=2,
        **launch_options(),
    )
    return out.flatten(1)


# tiles and tables are slices of one array, aligned differently in each step: one kernel is to serve all
@triton.jit(do_not_specialize=["window", "table_stride"], do_not_specialize_on_alignment=["block_tables", "tiles"])
def _ragged_kernel(
    q,
    keys,
    values,
    block_tables,
    tiles,
    out,
    scale,
    window,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tile = tiles + tl.program_id(0) * FIELDS
    kv_head = tl.program_id(1)
    num_tokens = tl.load(tile + 1)
    if num_tokens == 0:
        return
    start = tl.load(tile).to(tl.int64)
    table = block_tables + tl.load(tile + 2).to(tl.int64) * table_stride
    position = tl.load(tile + 3)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    token = rows // GROUP
    heads = ((start + token) * NUM_KV_HEADS + kv_head) * GROUP + rows % GROUP  # among all tokens' heads
    is_value = (token < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + heads[:, None] * HEAD_DIM + dims[None, :], mask=is_value, other=0.0)
    last = position + token  # that each row sees

    first = tl.maximum(position - window + 1, 0)
    end = position + num_tokens
    maximum = tl.full([ROWS], -1e30, tl.float32)  # finite: a window may hide all of a row's first keys
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    from_tile = first // KEYS
    seen_by_all = tl.where(window >= end, (position + 1) // KEYS, from_tile)
    for each in range(from_tile, seen_by_all):
        k, v, _ = load_tile(
            keys, values, table, each, first, end, kv_head, NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, KEYS
        )
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        maximum, total, attended = add_keys(scores, v, maximum, total, attended)
    for each in range(seen_by_all, (end + KEYS - 1) // KEYS):
        k, v, _ = load_tile(
            keys, values, table, each, first, end, kv_head, NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, KEYS
        )
        where = (each * KEYS + tl.arange(0, KEYS))[None, :]
        is_seen = (where <= last[:, None]) & (where > last[:, None] - window)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_seen, scores, float("-inf"))
        maximum, total, attended = add_keys(scores, v, maximum, total, attended)
    attended = attended / total[:, None]
    tl.store(out + heads[:, None] * HEAD_DIM + dims[None, :], attended.to(out.dtype.element_ty), mask=is_value)
