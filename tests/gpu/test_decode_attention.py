"""Decode attention on the GPU equals its float32 reference, launched and replayed from a CUDA graph."""

from functools import partial

import pytest
import torch

from attention_checks import BLOCK_SIZE, TOLERANCES, check_decode, check_rows, decode_case

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

MAX_CONTEXT = 5120
POSITIONS = (0, 1, 15, 16, 17, 31, 32, -1, 63, 64, 127, 128, 500, 511, 512, 1000, 2047, 2048, 4999, -1)

case_of = partial(decode_case, "cuda", max_context=MAX_CONTEXT)


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
    torch.manual_seed(0)
    positions = POSITIONS[-2 : -2 - rows : -1] if rows < len(POSITIONS) else POSITIONS
    case = case_of(positions, heads, head_dim, dtype, has_norm=has_norm)
    check_decode(case, window, is_early=is_early, num_launches=3, config=None)


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
    case = case_of(POSITIONS, (8, 2), 128, dtype, has_norm=True)
    expected = decode_attention_reference(**case)
    workspace = DecodeWorkspace(len(POSITIONS), 8, 128, "cuda")
    config = DecodeConfig(16, 1, num_splits, num_warps=4, num_stages=2)
    check_rows(decode_attention(**case, workspace=workspace, config=config), expected, TOLERANCES[dtype])


def test_one_graph_serves_all_lengths() -> None:
    """A captured launch follows positions, slots and tables that change between replays."""
    from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention, decode_attention_reference

    torch.manual_seed(0)
    case = case_of(POSITIONS, (32, 8), 128, torch.bfloat16, has_norm=False)
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
    case = case_of((100, 300), (8, 8), 128, torch.bfloat16, has_norm=False)
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
    case = case_of(POSITIONS, (28, 4), 128, torch.float16, has_norm=True)
    for window in (None, 300):
        expected = decode_attention_reference(**case, window=window)
        workspace = DecodeWorkspace(len(POSITIONS), 28, 128, "cuda")
        out = torch.full_like(expected, float("nan"))
        config = ClusterConfig(cluster, warps, stages)
        decode_attention(**case, window=window, workspace=workspace, out=out, config=config, is_early=True)
        check_rows(out, expected, TOLERANCES[torch.float16])
