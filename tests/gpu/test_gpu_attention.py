"""Attention of all layers on the GPU: long prompts and long contexts run otherwise, and give the same."""

import pytest
import torch

from hasten.kernels.attention import attention_reference
from hasten.kernels.kv_cache import KVCache
from hasten.kernels.rotary import rotate_reference
from hasten.models.batch import Batch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

if torch.cuda.is_available():
    from hasten.kernels.cuda.attention import CudaAttention, DecodeRows
    from hasten.kernels.cuda.prompt_attention import MIN_TOKENS, recurring_length

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 8, 2, 64, 16
WINDOWS = (None, 300)


def rotations(positions: torch.Tensor) -> torch.Tensor:
    angles = positions.unsqueeze(1) * torch.linspace(1.0, 1e-4, DIM // 2, device="cuda")
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def attention(max_tokens: int, num_blocks: int) -> tuple["CudaAttention", KVCache]:
    made = CudaAttention(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        windows=WINDOWS,
        qk_norms=(),
        eps=1e-5,
        rotation=rotations,
        dtype=torch.bfloat16,
    )
    made.prepare(4, max_tokens)
    shape = (num_blocks, BLOCK_SIZE, KV_HEADS, DIM)
    keys, values = ([torch.randn(shape, device="cuda").bfloat16() for _ in WINDOWS] for _ in range(2))
    return made, KVCache(tuple(keys), tuple(values))


@pytest.mark.parametrize("num_tokens", [1, 100, 512, 513, 700, 1024, 1030])
def test_whole_prompt_of_any_length(num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    made, cache = attention(2048, 80)
    blocks = torch.randperm(80, device="cuda")[: -(-num_tokens // BLOCK_SIZE)]
    positions = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
    slots = blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    batch = Batch(positions, positions, slots, (0, num_tokens), (num_tokens,), (tuple(blocks.tolist()),), positions)
    garbage = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    del garbage  # what is allocated next is not finite
    attend = made.begin(batch, cache)
    for layer, window in enumerate(WINDOWS):
        qkv = torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * DIM, device="cuda").bfloat16()
        q, k, v = qkv.unflatten(1, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), 1)
        q, k = (rotate_reference(each, rotations(positions)) for each in (q, k))
        with torch.device("cuda"):
            expected = attention_reference(q, k, v, DIM**-0.5, window).flatten(1)
        torch.testing.assert_close(attend(qkv, layer).float(), expected.float(), atol=2e-2, rtol=2e-2)
        assert torch.equal(cache.values[layer].flatten(0, 1)[slots], v)


def test_long_contexts() -> None:
    torch.manual_seed(0)
    num_tokens = 15000
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    made, cache = attention(num_tokens, 2 * num_blocks)
    assert made.is_long(2, num_tokens) and not made.is_long(2, 1000) and not made.is_long(4096, num_tokens)
    tables = torch.randperm(2 * num_blocks, device="cuda").view(2, num_blocks).int()
    slots = torch.tensor([1, 0], device="cuda", dtype=torch.int32)
    qkv = torch.randn(2, (HEADS + 2 * KV_HEADS) * DIM, device="cuda").bfloat16()
    for position in (100, num_tokens - 1):
        positions = torch.tensor([position, 40], device="cuda", dtype=torch.int32)
        rows = DecodeRows(slots, positions, tables)
        for layer in range(len(WINDOWS)):
            short, long = (made.decode(rows, cache, is_long=is_long)(qkv, layer) for is_long in (False, True))
            torch.testing.assert_close(short, long, atol=2e-3, rtol=2e-2)


def test_prompt_lengths_that_recur() -> None:
    assert len({recurring_length(count) for count in range(MIN_TOKENS + 1, 8193)}) == 14
    for count in range(MIN_TOKENS + 1, 70000, 7):
        length = recurring_length(count)
        assert recurring_length(length) == length
        assert count <= length < 1.5 * count
