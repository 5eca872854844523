"""Attention of mixed steps on the GPU equals its float32 reference: chunks, fresh prompts and decode tokens."""

import pytest
import torch

from attention_checks import BLOCK_SIZE, TOLERANCES, check_prefill, check_rows
from hasten.kernels.attention import attention_reference

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(
    "chunks",
    [
        [(1, 1)],
        [(128, 128)],
        [(700, 700), (3, 3), (64, 64)],
        [(2000, 500)],
        [(900, 1), (1, 1), (17, 1)],
        [(50, 12), (1, 1), (20, 20), (1500, 130)],
        [(5, 5), (3000, 1), (16, 16), (33, 1)],
    ],
)
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((7, 1), 96), ((8, 8), 80), ((14, 2), 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_reference(
    *,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    chunks: list[tuple[int, int]],
    window: int | None,
) -> None:
    check_prefill("cuda", heads, head_dim, dtype, chunks, window)


@pytest.mark.parametrize("num_tokens", [1, 77, 128])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((7, 1), 96), ((8, 8), 80), ((14, 2), 64)])
def test_fixed_length(heads: tuple[int, int], head_dim: int, num_tokens: int) -> None:
    """A prompt of any length in a step of 128 tokens."""
    from hasten.kernels.cuda.prefill_attention import PrefillPlan, PromptPlan, prefill_attention

    torch.manual_seed(0)
    with torch.device("cuda"):
        q, k, v = (torch.randn(128, count, head_dim).bfloat16() for count in (heads[0], heads[1], heads[1]))
        cache = torch.empty(8, BLOCK_SIZE, heads[1], head_dim, dtype=torch.bfloat16)
        starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    plan = PrefillPlan(PromptPlan(None, starts, starts, (0, 128), (0, 128), None, has_fixed_length=True), None)
    for window in (None, 50):
        actual = prefill_attention(q, k, v, cache, cache, plan, head_dim**-0.5, window)[:num_tokens]
        host = [each[:num_tokens].cpu() for each in (q, k, v)]
        expected = attention_reference(host[0], host[1], host[2], head_dim**-0.5, window).flatten(1).cuda()
        check_rows(actual, expected, TOLERANCES[torch.bfloat16])
