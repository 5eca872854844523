"""Norm, activation, rotary and cache writes equal their references."""

import pytest
import torch

from hasten.kernels.kv_cache import allocate_kv_cache, write_kv
from hasten.kernels.rms_norm import RMSNorm, rms_norm_reference
from hasten.kernels.rotary import interleave_rows, rotate, rotate_reference
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
@pytest.mark.parametrize(("num_heads", "dim"), [(3, 16), (1, 2), (5, 10)])
def test_rotating_interleaved_rows_is_rotating_then_interleaving(
    num_heads: int, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, num_heads, dim).to(dtype)
    rotations = torch.polar(torch.tensor(1.3), torch.randn(4, 1, dim // 2))

    def interleaved(heads: torch.Tensor) -> torch.Tensor:
        return interleave_rows(heads.flatten(1).T, dim).T.contiguous().view_as(heads)

    expected = interleaved(rotate_reference(x, rotations))
    torch.testing.assert_close(rotate(interleaved(x), rotations), expected, rtol=tolerance, atol=tolerance)


def test_write_kv_touches_only_its_slots() -> None:
    cache = allocate_kv_cache(1, 3, 4, 2, 8, torch.float32, "cpu")
    keys, values = cache.keys[0].zero_(), cache.values[0].zero_()
    k, v = torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    write_kv(keys, values, k, v, torch.tensor([9, 2]))
    assert torch.equal(keys[2, 1], k[0])
    assert torch.equal(values[0, 2], v[1])
    assert int(keys.flatten(0, 1).any(dim=(1, 2)).sum()) == 2
