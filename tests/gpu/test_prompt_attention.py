"""Attention of prompts on the GPU equals its float32 reference: whole ones, chunks, beside decode tokens."""

import pytest
import torch

from attention_checks import TOLERANCES, check_ragged, check_rows
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
    check_ragged("cuda", heads, head_dim, dtype, chunks, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_largest_heads(dtype: torch.dtype) -> None:
    check_ragged("cuda", (4, 2), 256, dtype, [(300, 300), (1000, 70), (33, 1)], None)


@pytest.mark.parametrize("num_tokens", [1, 77, 128])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((7, 1), 96), ((8, 8), 80), ((14, 2), 64)])
def test_whole_prompt(heads: tuple[int, int], head_dim: int, num_tokens: int) -> None:
    """Of any length, filled up to 128 tokens."""
    from hasten.kernels.cuda.prompt_attention import prompt_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(128, count, head_dim, device="cuda").bfloat16() for count in (heads[0], heads[1], heads[1]))
    actual = prompt_attention(q, k, v, head_dim**-0.5)[:num_tokens]
    host = [each[:num_tokens].cpu() for each in (q, k, v)]
    expected = attention_reference(host[0], host[1], host[2], head_dim**-0.5, None).flatten(1).cuda()
    check_rows(actual, expected, TOLERANCES[torch.bfloat16])
