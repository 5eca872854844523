"""Attention of mixed steps on the GPU equals its float32 reference: chunks, fresh prompts and decode tokens."""

import pytest
import torch

from hasten.kernels.attention import attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BLOCK_SIZE = 16
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


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
    """chunks: each sequence's context length and the number of its last tokens in the step."""
    from hasten.kernels.cuda.decode_attention import DecodeWorkspace
    from hasten.kernels.cuda.prefill_attention import plan_prefill, prefill_attention

    torch.manual_seed(0)
    (num_heads, num_kv_heads), blocks_each = heads, 200
    shape = ((1 + len(chunks)) * blocks_each, BLOCK_SIZE, num_kv_heads, head_dim)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype, device="cuda") for _ in range(2))
    tables = torch.randperm(shape[0])[: len(chunks) * blocks_each].view(len(chunks), blocks_each)
    inputs, expected, starts = [], [], [0]
    for table, (context_len, num_queries) in zip(tables, chunks, strict=True):
        with torch.device("cuda"):
            q = torch.randn(num_queries, num_heads, head_dim).to(dtype)
            k, v = (torch.randn(context_len, num_kv_heads, head_dim).to(dtype) for _ in range(2))
        where = torch.arange(context_len)
        slots = table[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
        keys.flatten(0, 1)[slots.cuda()], values.flatten(0, 1)[slots.cuda()] = k, v
        inputs.append((q, k[-num_queries:], v[-num_queries:]))
        on_host = attention_reference(q.cpu(), k.cpu(), v.cpu(), head_dim**-0.5, window)
        expected.append(on_host.flatten(1))
        starts.append(starts[-1] + num_queries)
    workspace = DecodeWorkspace(len(chunks), num_heads, head_dim, "cuda")
    context_lens = [context_len for context_len, _ in chunks]
    plan = plan_prefill(starts, context_lens, tables.tolist(), block_size=BLOCK_SIZE, workspace=workspace)
    q, k, v = (torch.cat(each) for each in zip(*inputs, strict=True))
    actual = prefill_attention(q, k, v, keys, values, plan, head_dim**-0.5, window)
    reference = torch.cat(expected).double().cuda()
    error = (actual.double() - reference).norm(dim=1)
    assert bool((error <= TOLERANCES[dtype] * reference.norm(dim=1)).all()), error


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
        expected = attention_reference(host[0], host[1], host[2], head_dim**-0.5, window).flatten(1).double().cuda()
        error = (actual.double() - expected).norm(dim=1)
        assert bool((error <= 1e-2 * expected.norm(dim=1)).all()), error
