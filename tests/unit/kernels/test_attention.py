"""Paged attention equals the written-out softmax, however blocks lie and chunks are cut."""

import pytest
import torch

from hasten.kernels.attention import attention_reference, paged_attention, plan_attention
from hasten.kernels.kv_cache import allocate_kv_cache

BLOCK_SIZE = 4
DIM = 16

TABLES = {"consecutive": lambda i: range(10 * i, 10 * i + 10), "scattered": lambda i: range(10 * i + 9, 10 * i - 1, -1)}

CHUNKS = [[(1, 1)], [(7, 7)], [(33, 1)], [(33, 12), (1, 1), (20, 20)], [(9, 1), (17, 1), (40, 1)]]


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("order", TABLES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "chunks", [[(1, 1)], [(7, 7)], [(33, 1)], [(33, 12), (1, 1), (20, 20)], [(9, 1), (17, 1), (40, 1)]]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_equals_reference(
    *,
    dtype: torch.dtype,
    tolerance: float,
    chunks: list[tuple[int, int]],
    heads: tuple[int, int],
    order: str,
    window: int | None,
) -> None:
    """chunks: each sequence's context length and the number of its last tokens in the step."""
    torch.manual_seed(0)
    num_heads, num_kv_heads = heads
    cache = allocate_kv_cache(1, 10 * len(chunks), BLOCK_SIZE, num_kv_heads, DIM, dtype, "cpu")
    keys, values = cache.key_rows[0].fill_(float("nan")), cache.value_rows[0].fill_(float("nan"))
    tables = [tuple(TABLES[order](i)) for i in range(len(chunks))]
    queries, expected, starts = [], [], [0]
    for table, (context_len, num_queries) in zip(tables, chunks, strict=True):
        k, v = (torch.randn(context_len, num_kv_heads, DIM).to(dtype) for _ in range(2))
        slots = torch.tensor([table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(context_len)])
        keys[slots], values[slots] = k, v
        queries.append(torch.randn(num_queries, num_heads, DIM).to(dtype))
        expected.append(attention_reference(queries[-1], k, v, DIM**-0.5, window).flatten(1))
        starts.append(starts[-1] + num_queries)
    context_lens = [context_len for context_len, _ in chunks]
    plan = plan_attention(starts, context_lens, tables, rows=keys, block_size=BLOCK_SIZE, window=window, dtype=dtype)
    q = torch.cat(queries).unflatten(1, (num_kv_heads, -1))
    actual = paged_attention(q, keys, values, plan, DIM**-0.5)
    torch.testing.assert_close(actual, torch.cat(expected), atol=tolerance, rtol=tolerance)
