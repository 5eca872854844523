"""Attention kernels equal their float32 references; what a row must not read is NaN.

Runs natively on a GPU and in Triton's interpreter; the tests choose shapes that each can take.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hasten.kernels.attention import attention_reference

BLOCK_SIZE = 16
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def check_rows(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Each row's error, relative to its norm; NaN does not pass. A row of zeros is zeros."""
    error = (actual.double() - expected.double()).norm(dim=1)
    assert bool((error <= tolerance * expected.double().norm(dim=1)).all()), error


def decode_case(
    device: str,
    positions: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    has_norm: bool,
    max_context: int,
) -> dict[str, Any]:
    """Random arguments of decode_attention."""
    (num_heads, num_kv_heads), rows, blocks = heads, len(positions), max_context // BLOCK_SIZE
    with torch.device(device):
        shape = ((rows + 2) * blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        block_tables = torch.randperm(shape[0])[: (rows + 1) * blocks].view(rows + 1, blocks).int()
        slots = torch.randperm(rows + 1)[:rows].int()
        for slot, position in zip(slots.tolist(), positions, strict=True):
            where = torch.arange(max(position, 0))
            cells = block_tables[slot, where // BLOCK_SIZE].long() * BLOCK_SIZE + where % BLOCK_SIZE
            for cache in (keys, values):
                cache.flatten(0, 1)[cells] = torch.randn(len(cells), num_kv_heads, head_dim).to(dtype)
        angles = torch.randn(max_context, head_dim // 2)
        case: dict[str, Any] = {
            "qkv": torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "keys": keys,
            "values": values,
            "block_tables": block_tables,
            "slots": slots,
            "positions": torch.tensor(positions, dtype=torch.int32),
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "scale": head_dim**-0.5,
        }
        if has_norm:
            case |= {"q_norm": torch.randn(head_dim).to(dtype), "k_norm": torch.randn(head_dim).to(dtype), "eps": 1e-6}
    return case


def check_decode(case: dict[str, Any], window: int | None, *, is_early: bool, num_launches: int, config: Any) -> None:
    """Launches with one workspace: what the first leaves behind must not disturb the next."""
    from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention, decode_attention_reference

    qkv, num_heads, head_dim = case["qkv"], case["num_heads"], case["keys"].shape[-1]
    expected_cache = {name: case[name].clone() for name in ("keys", "values")}
    expected = decode_attention_reference(**case | expected_cache, window=window)
    workspace = DecodeWorkspace(len(qkv), num_heads, head_dim, qkv.device)
    for _ in range(num_launches):
        out = torch.full_like(expected, float("nan"))
        actual = decode_attention(**case, window=window, workspace=workspace, out=out, is_early=is_early, config=config)
        assert actual is out
        check_rows(out, expected, TOLERANCES[qkv.dtype])
    for name, cache in expected_cache.items():
        difference = max(4 * torch.finfo(cache.dtype).eps, 1e-6)  # a rounding to the other side, and those behind it
        torch.testing.assert_close(case[name], cache, atol=difference, rtol=difference, equal_nan=True)
    assert not workspace.counters.any()


def check_ragged(
    device: str,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    chunks: Sequence[tuple[int, int]],
    window: int | None,
) -> None:
    """chunks: each sequence's context length and the number of its last tokens in the step."""
    from hasten.kernels.cuda.ragged_attention import TILE_FIELDS, attention_tiles, ragged_attention

    torch.manual_seed(0)
    (num_heads, num_kv_heads), scale = heads, head_dim**-0.5
    ends, counts = np.array(chunks).T
    blocks_each = 2 + int(ends.max()) // BLOCK_SIZE  # more than are used
    shape = ((1 + len(chunks)) * blocks_each, BLOCK_SIZE, num_kv_heads, head_dim)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
    block_tables = torch.randperm(shape[0]).view(1 + len(chunks), blocks_each).int()
    owners = torch.randperm(1 + len(chunks))[: len(chunks)]  # each sequence's row of the table
    queries, expected = [], []
    for owner, (context_len, num_queries) in zip(owners.tolist(), chunks, strict=True):
        with torch.device(device):
            q = torch.randn(num_queries, num_heads, head_dim).to(dtype)
            k, v = (torch.randn(context_len, num_kv_heads, head_dim).to(dtype) for _ in range(2))
        where = torch.arange(context_len)
        slots = (block_tables[owner, where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE).to(device)
        keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots] = k, v
        queries.append(q)
        expected.append(attention_reference(q.cpu(), k.cpu(), v.cpu(), scale, window).flatten(1))
    tiles = attention_tiles(counts.cumsum() - counts, counts, owners.numpy(), ends - counts, num_heads // num_kv_heads)
    padded = torch.cat((torch.from_numpy(tiles), torch.zeros(3, TILE_FIELDS, dtype=torch.int32))).to(device)
    actual = ragged_attention(torch.cat(queries), keys, values, block_tables.to(device), padded, scale, window)
    check_rows(actual, torch.cat(expected).to(device), TOLERANCES[dtype])
