"""Round-to-nearest: the error's bound, the choice of bits, and weights that are hard to scale."""

import pytest
import torch

from hasten.config import scheme_named
from hasten.kernels.linear import dequantize
from hasten.quantization import rtn
from hasten.quantization.rtn import FP8_MAX, group_size_for, quantize, quantize_fp8, weight_bits


def restored(weight: torch.Tensor, bits: int) -> torch.Tensor:
    quantized = quantize(weight, bits)
    return dequantize(quantized.codes, quantized.scale)


def test_int8_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(37, 90)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    # the scale is rounded to bf16: a step is up to 2^-9 longer, and the largest code may clip as much
    assert ((restored(weight, 8) - weight).abs() <= step * (0.5 + 127 * 2**-8)).all()
    assert (restored(weight, 8) - weight).norm() / weight.norm() < 0.01


@pytest.mark.parametrize(("columns", "group_size"), [(256, 128), (192, 64), (96, 32)])
def test_int4_has_one_scale_a_group_and_clipping_helps(
    columns: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, columns)
    quantized = quantize(weight, 4)
    assert quantized.scale.shape == (64, columns // group_size)
    assert quantized.codes.amin() >= -8
    assert quantized.codes.amax() <= 7
    clipped = (restored(weight, 4) - weight).norm()
    monkeypatch.setattr(rtn, "CLIPS", (1.0,))
    assert clipped < (restored(weight, 4) - weight).norm()
    assert clipped / weight.norm() < 0.12


def test_fp8_error_is_at_most_half_a_step_of_e4m3() -> None:
    weight = torch.randn(37, 90)
    quantized = quantize_fp8(weight)
    assert quantized.codes.dtype == torch.float8_e4m3fn
    assert quantized.scale.dtype == torch.float32
    assert quantized.scale.shape == (37, 1)
    assert (quantized.codes.float().abs().amax(dim=1) == FP8_MAX).all()
    error = (dequantize(quantized.codes, quantized.scale) - weight).abs()
    # three bits behind the point: half a step is 2^-4 of the value; below 2^-6 steps are 2^-9
    assert (error <= torch.maximum(weight.abs() * 2**-4, quantized.scale * 2**-10) * 1.0001).all()


def test_fp8_takes_zeros_and_does_not_depend_on_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 64)
    weight[3] = 0.0
    whole = quantize_fp8(weight)
    assert torch.equal(whole.codes[3].float(), torch.zeros(64))
    assert whole.scale[3] == 1.0
    monkeypatch.setattr(rtn, "SLICE_WEIGHTS", 5 * 64)
    sliced = quantize_fp8(weight)
    assert torch.equal(whole.codes.view(torch.uint8), sliced.codes.view(torch.uint8))
    assert torch.equal(whole.scale, sliced.scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_slices_do_not_change_the_result(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 64)
    whole = quantize(weight, bits)
    monkeypatch.setattr(rtn, "SLICE_WEIGHTS", 5 * 64)
    sliced = quantize(weight, bits)
    assert torch.equal(whole.codes, sliced.codes)
    assert torch.equal(whole.scale, sliced.scale)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e30])
def test_extreme_rows_stay_finite(bits: int, value: float) -> None:
    weight = torch.full((2, 32), value)
    assert torch.isfinite(restored(weight, bits)).all()
    torch.testing.assert_close(restored(weight, bits), weight, rtol=0.15, atol=1e-30)


def test_bits_of_a_scheme() -> None:
    w4a16, w8a16 = scheme_named("w4a16"), scheme_named("w8a16")
    assert weight_bits(w4a16, "model.layers.0.mlp.up_proj", 896) == 4
    assert weight_bits(w4a16, "model.layers.0.mlp.up_proj", 77) == 8  # no group size divides 77
    assert weight_bits(w4a16, "lm_head", 896) == 8
    assert weight_bits(w8a16, "lm_head", 77) == 8


def test_group_sizes() -> None:
    assert [group_size_for(columns) for columns in (896, 64, 96, 100)] == [128, 64, 32, None]
