"""Decode attention on the GPU equals its float32 reference, launched and replayed from a CUDA graph."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BLOCK_SIZE = 16
MAX_CONTEXT = 5120
POSITIONS = (0, 1, 15, 16, 17, 31, 32, -1, 63, 64, 127, 128, 500, 511, 512, 1000, 2047, 2048, 4999, -1)


def decode_case(
    positions: Sequence[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, has_norm: bool
) -> dict[str, Any]:
    """Random arguments; what a row must not read is NaN."""
    (num_heads, num_kv_heads), rows, blocks = heads, len(positions), MAX_CONTEXT // BLOCK_SIZE
    with torch.device("cuda"):
        shape = ((rows + 2) * blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        block_tables = torch.randperm(shape[0])[: (rows + 1) * blocks].view(rows + 1, blocks).int()
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


def check_rows(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Each row's error, relative to its norm; NaN does not pass. A row of zeros is zeros."""
    error = (actual.double() - expected.double()).norm(dim=1)
    assert bool((error <= tolerance * expected.double().norm(dim=1)).all()), error


TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


@pytest.mark.parametrize("rows", [1, 3, len(POSITIONS)])
@pytest.mark.parametrize("window", [None, 1, 100, 4096])
@pytest.mark.parametrize(
    ("heads", "head_dim", "has_norm"),
    [
        ((32, 8), 128, False),
        ((28, 4), 128, False),
        ((16, 8), 128, True),
        ((8, 8), 64, False),
        ((8, 1), 80, True),
        ((14, 2), 96, False),
        ((9, 1), 128, False),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "is_early"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_equals_reference(
    *,
    dtype: torch.dtype,
    is_early: bool,
    heads: tuple[int, int],
    head_dim: int,
    has_norm: bool,
    window: int | None,
    rows: int,
) -> None:
    from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention, decode_attention_reference

    torch.manual_seed(0)
    positions = POSITIONS[-2 : -2 - rows : -1] if rows < len(POSITIONS) else POSITIONS
    case = decode_case(positions, heads, head_dim, dtype, has_norm)
    expected_cache = {name: case[name].clone() for name in ("keys", "values")}
    expected = decode_attention_reference(**case | expected_cache, window=window)
    workspace = DecodeWorkspace(rows, heads[0], head_dim, "cuda")
    for _ in range(3):  # what the first launch leaves behind must not disturb the next
        out = torch.full_like(expected, float("nan"))
        decode_attention(**case, window=window, workspace=workspace, out=out, is_early=is_early)
        check_rows(out, expected, TOLERANCES[dtype])
    for name, cache in expected_cache.items():
        difference = torch.finfo(dtype).eps
        torch.testing.assert_close(case[name], cache, atol=difference, rtol=difference, equal_nan=True)
    assert not workspace.counters.any()


@pytest.mark.parametrize("num_splits", [1, 2, 7, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_split_in_triton(dtype: torch.dtype, num_splits: int) -> None:
    from hasten.kernels.cuda.decode_attention import (
        DecodeConfig,
        DecodeWorkspace,
        decode_attention,
        decode_attention_reference,
    )

    torch.manual_seed(0)
    case = decode_case(POSITIONS, (8, 2), 128, dtype, True)
    expected = decode_attention_reference(**case)
    workspace = DecodeWorkspace(len(POSITIONS), 8, 128, "cuda")
    config = DecodeConfig(16, 1, num_splits, num_warps=4, num_stages=2)
    check_rows(decode_attention(**case, workspace=workspace, config=config), expected, TOLERANCES[dtype])


def test_one_graph_serves_all_lengths() -> None:
    """A captured launch follows positions, slots and tables that change between replays."""
    from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention, decode_attention_reference

    torch.manual_seed(0)
    case = decode_case(POSITIONS, (32, 8), 128, torch.bfloat16, False)
    workspace = DecodeWorkspace(len(POSITIONS), 32, 128, "cuda")
    out = decode_attention(**case, workspace=workspace, is_early=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            decode_attention(**case, workspace=workspace, out=out, is_early=True)
    for _ in range(4):
        order = torch.randperm(len(POSITIONS), device="cuda")
        case["positions"].copy_(case["positions"][order])
        case["slots"].copy_(case["slots"][order])
        case["qkv"].normal_()
        expected_cache = {name: case[name].clone() for name in ("keys", "values")}
        expected = decode_attention_reference(**case | expected_cache)
        out.fill_(float("nan"))
        graph.replay()
        check_rows(out, expected, TOLERANCES[torch.bfloat16])


def test_cache_of_more_than_two_billion_elements() -> None:
    """Offsets do not wrap at 2³¹."""
    from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention, decode_attention_reference

    torch.manual_seed(0)
    case = decode_case((100, 300), (8, 8), 128, torch.bfloat16, False)
    per_block = BLOCK_SIZE * 8 * 128
    num_blocks, used = 2**31 // per_block + 4 * MAX_CONTEXT // BLOCK_SIZE, len(case["keys"])
    for name in ("keys", "values"):
        large = torch.empty(num_blocks, BLOCK_SIZE, 8, 128, dtype=torch.bfloat16, device="cuda")
        large[-used:] = case[name]
        case[name] = large
    case["block_tables"] = case["block_tables"] + (num_blocks - used)
    expected = decode_attention_reference(**case)
    workspace = DecodeWorkspace(2, 8, 128, "cuda")
    check_rows(decode_attention(**case, workspace=workspace), expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize(("warps", "stages"), [(1, 1), (2, 2), (4, 3), (8, 3)])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
def test_any_cluster(cluster: int, warps: int, stages: int) -> None:
    from hasten.kernels.cuda.decode_attention import (
        ClusterConfig,
        DecodeWorkspace,
        decode_attention,
        decode_attention_reference,
    )

    torch.manual_seed(0)
    case = decode_case(POSITIONS, (28, 4), 128, torch.float16, True)
    for window in (None, 300):
        expected = decode_attention_reference(**case, window=window)
        workspace = DecodeWorkspace(len(POSITIONS), 28, 128, "cuda")
        out = torch.full_like(expected, float("nan"))
        config = ClusterConfig(cluster, warps, stages)
        decode_attention(**case, window=window, workspace=workspace, out=out, config=config, is_early=True)
        check_rows(out, expected, TOLERANCES[torch.float16])
