"""Norm, activation, rotary and cache writes equal their references."""

import pytest
import torch

from hasten.kernels.kv_cache import allocate_kv_cache
from hasten.kernels.rms_norm import RMSNorm, rms_norm_reference
from hasten.kernels.rotary import Heads, interleave_rows, rotate_reference
from hasten.kernels.silu_mul import silu_mul, silu_mul_reference

PRECISIONS = [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)]  # bf16: one rounding, in another place


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 896), (5, 63), (3, 4, 10)])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, magnitude: float) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape) * magnitude).to(dtype), torch.randn(shape[1:])
    actual = RMSNorm(weight, 1e-6, dtype)(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, rms_norm_reference(x, weight, 1e-6), rtol=tolerance, atol=tolerance)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert not RMSNorm(torch.ones(8), 1e-6, torch.float32)(torch.zeros(2, 8)).any()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 192), (7, 26)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape).to(dtype)
    before = gate_up.clone()
    actual = silu_mul(gate_up)
    expected = silu_mul_reference(gate_up.float()).to(dtype)
    torch.testing.assert_close(actual, expected, rtol=2 * tolerance, atol=tolerance)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(3, 1, 16), (2, 2, 2), (6, 3, 10)])
def test_rotating_interleaved_rows_is_rotating_then_interleaving(
    *, num_heads: int, num_kv_heads: int, dim: int, has_norm: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    rotations = torch.polar(torch.tensor(1.3), torch.randn(4, 1, dim // 2))
    weight = torch.randn(num_heads + num_kv_heads, dim).to(dtype)
    norm = RMSNorm(weight, 1e-6, dtype) if has_norm else None
    heads = Heads(4, num_heads, num_kv_heads, dim, dtype)
    for _ in range(2):  # the second time over what the first left in its memory
        qkv = torch.randn(4, num_heads + 2 * num_kv_heads, dim).to(dtype)
        heads.rotate(qkv.flatten(1), rotations, norm)
        qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), 1)
        qk = _interleaved(qk.float(), inverse=True)
        if has_norm:
            qk = rms_norm_reference(qk, _interleaved(weight.float().unsqueeze(0), inverse=True), 1e-6)
        expected = _interleaved(rotate_reference(qk, rotations)).to(dtype)
        actual = torch.cat((heads.q.flatten(1, 2), heads.k), 1)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(heads.v, v)


def _interleaved(heads: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """heads [num_tokens, num_heads, dim] with the order of a head's dimensions changed."""
    order = interleave_rows(torch.arange(heads.shape[-1]), heads.shape[-1])
    return heads[..., order.argsort() if inverse else order]


def test_cache_rows_are_the_cache_by_slot() -> None:
    cache = allocate_kv_cache(1, 3, 4, 2, 8, torch.float32, "cpu")
    cache.keys[0].zero_()
    k = torch.randn(2, 2, 8)
    cache.key_rows[0].index_copy_(0, torch.tensor([9, 2]), k)
    assert torch.equal(cache.keys[0][2, 1], k[0])
    assert torch.equal(cache.keys[0][0, 2], k[1])
    assert int(cache.keys[0].flatten(0, 1).any(dim=(1, 2)).sum()) == 2
    assert cache.key_rows[0].transpose(0, 1).is_contiguous(), "a head's slots are together, which reads fastest"
