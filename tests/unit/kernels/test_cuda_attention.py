"""Attention kernels in Triton's interpreter equal their references: split, window, norm, padding rows."""

from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is there: tests/gpu runs the kernels natively", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

from triton.runtime import interpreter

from hasten.kernels.attention import attention_reference
from hasten.kernels.cuda.decode_attention import (
    CLUSTERS,
    SOURCE,
    DecodeConfig,
    DecodeWorkspace,
    decode_attention,
    decode_attention_reference,
    is_long_context,
    shared_bytes,
)
from hasten.kernels.cuda.nvrtc import MAX_SHARED_BYTES, compile_cubin
from hasten.kernels.cuda.prefill_attention import plan_prefill, prefill_attention

BLOCK_SIZE = 16
MAX_CONTEXT = 256


@pytest.fixture(autouse=True)
def _loop_bounds_from_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter calls int() on arrays of one element, which NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)


def decode_case(
    positions: list[int], num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, has_norm: bool
) -> dict[str, Any]:
    """Random arguments; what a row must not read is NaN."""
    rows, blocks = len(positions), MAX_CONTEXT // BLOCK_SIZE
    shape = (2 * rows * blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    block_tables = torch.randperm(2 * rows * blocks)[: (rows + 1) * blocks].view(rows + 1, blocks).int()
    slots = torch.randperm(rows + 1)[:rows].int()
    for slot, position in zip(slots.tolist(), positions, strict=True):
        where = torch.arange(max(position, 0))
        cells = block_tables[slot, where // BLOCK_SIZE].long() * BLOCK_SIZE + where % BLOCK_SIZE
        for cache in (keys, values):
            cache.flatten(0, 1)[cells] = torch.randn(len(cells), num_kv_heads, head_dim).to(dtype)
    angles = torch.randn(MAX_CONTEXT, head_dim // 2)
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


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(
    ("heads", "head_dim", "has_norm", "num_splits"),
    [((2, 2), 64, False, 1), ((8, 2), 80, True, 3), ((7, 1), 96, False, 8), ((8, 1), 128, True, 20)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_equals_reference(
    *,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    has_norm: bool,
    num_splits: int,
    window: int | None,
    is_early: bool,
) -> None:
    torch.manual_seed(0)
    positions = [0, 15, 16, -1, 17, 100, 255]
    case = decode_case(positions, *heads, head_dim, dtype, has_norm)
    expected_cache = {name: case[name].clone() for name in ("keys", "values")}
    expected = decode_attention_reference(**case | expected_cache, window=window)
    workspace = DecodeWorkspace(len(positions), heads[0], head_dim, "cpu")
    out = torch.full((len(positions), heads[0] * head_dim), float("nan"), dtype=dtype)
    actual = decode_attention(
        **case,
        window=window,
        workspace=workspace,
        out=out,
        is_early=is_early,
        config=DecodeConfig(16, 1, num_splits, num_warps=4, num_stages=2),
    )
    assert actual is out
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    for name, cache in expected_cache.items():
        torch.testing.assert_close(case[name], cache, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert not workspace.counters.any()


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(
    "chunks",
    [[(1, 1)], [(37, 37)], [(64, 1), (1, 1)], [(50, 12), (1, 1), (20, 20)], [(5, 5), (90, 1), (16, 16), (33, 1)]],
)
def test_prefill_equals_reference(chunks: list[tuple[int, int]], window: int | None) -> None:
    """chunks: each sequence's context length and the number of its last tokens in the step."""
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = 6, 2, 64
    blocks_each = 6
    keys, values = (
        torch.full((20 + blocks_each * len(chunks), BLOCK_SIZE, num_kv_heads, head_dim), float("nan")) for _ in range(2)
    )
    tables = torch.randperm(len(keys))[: blocks_each * len(chunks)].view(len(chunks), blocks_each).tolist()
    inputs, expected, starts = [], [], [0]
    for table, (context_len, num_queries) in zip(tables, chunks, strict=True):
        q = torch.randn(num_queries, num_heads, head_dim)
        k, v = (torch.randn(context_len, num_kv_heads, head_dim) for _ in range(2))
        slots = torch.tensor([table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(context_len)])
        keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots] = k, v
        inputs.append((q, k[-num_queries:], v[-num_queries:]))
        expected.append(attention_reference(q, k, v, head_dim**-0.5, window).flatten(1))
        starts.append(starts[-1] + num_queries)
    workspace = DecodeWorkspace(len(chunks), num_heads, head_dim, "cpu")
    context_lens = [context_len for context_len, _ in chunks]
    plan = plan_prefill(starts, context_lens, tables, block_size=BLOCK_SIZE, workspace=workspace)
    q, k, v = (torch.cat(each) for each in zip(*inputs, strict=True))
    actual = prefill_attention(q, k, v, keys, values, plan, head_dim**-0.5, window)
    torch.testing.assert_close(actual, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_every_division_fits_in_shared_memory() -> None:
    """For the largest group and heads; divisions are looked up by the number of pairs in order."""
    limits = [limit for limit, _, _ in CLUSTERS]
    assert limits == sorted(set(limits))
    assert all(shared_bytes(8, 128, config) <= MAX_SHARED_BYTES for _, _, config in CLUSTERS)


@pytest.mark.parametrize(
    ("group", "head_dim", "has_norm"), [(4, 128, False), (7, 96, True), (8, 80, False), (1, 64, True)]
)
def test_cluster_kernel_compiles(group: int, head_dim: int, has_norm: bool) -> None:
    definitions = {"IS_HALF": int(has_norm), "NUM_KV_HEADS": 2, "GROUP": group, "HEAD_DIM": head_dim, "CLUSTER": 2}
    definitions |= {"WARPS": 4, "STAGES": 3, "HAS_NORM": int(has_norm), "EARLY": 1}
    assert compile_cubin(SOURCE.read_text(), "sm_90a", definitions)


def test_long_contexts_begin_where_the_table_says() -> None:
    for limit, longest, _ in CLUSTERS:
        assert not is_long_context(limit, longest)
        assert is_long_context(limit, longest + 1)
    assert not is_long_context(CLUSTERS[-1][0] + 1, 1 << 20)  # one kernel serves them all
