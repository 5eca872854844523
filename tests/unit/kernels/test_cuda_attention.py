"""Attention kernels in Triton's interpreter equal their references: split, window, norm, padding rows."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU is there: tests/gpu runs the kernels natively", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

from attention_checks import check_decode, check_ragged, decode_case
from hasten.kernels.cuda.decode_attention import (
    CLUSTERS,
    SOURCE,
    DecodeConfig,
    is_long_context,
    shared_bytes,
)
from hasten.kernels.cuda.nvrtc import MAX_SHARED_BYTES, compile_cubin

pytestmark = pytest.mark.usefixtures("scalars_from_arrays")


@pytest.mark.parametrize(
    ("heads", "head_dim", "has_norm", "num_splits"),
    [((2, 2), 64, False, 1), ((8, 2), 80, True, 3), ((7, 1), 96, False, 8), ((8, 1), 128, True, 20)],
)
@pytest.mark.parametrize(
    ("dtype", "window", "is_early"),
    [
        (torch.float32, None, False),
        (torch.float32, None, True),
        (torch.float32, 1, True),
        (torch.float32, 20, False),
        (torch.float16, 20, True),  # interpreted, its arithmetic takes many times as long
    ],
)
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
    positions = (0, 15, 16, -1, 17, 100, 255)
    case = decode_case("cpu", positions, heads, head_dim, dtype, has_norm=has_norm, max_context=256)
    config = DecodeConfig(16, 1, num_splits, num_warps=4, num_stages=2)
    check_decode(case, window, is_early=is_early, num_launches=1, config=config)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(
    "chunks",
    [[(1, 1)], [(37, 37)], [(64, 1), (1, 1)], [(50, 12), (1, 1), (20, 20)], [(5, 5), (90, 1), (16, 16), (33, 1)]],
)
def test_ragged_equals_reference(chunks: list[tuple[int, int]], window: int | None) -> None:
    check_ragged("cpu", (6, 2), 64, torch.float32, chunks, window)


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
