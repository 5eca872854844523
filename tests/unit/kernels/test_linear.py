"""Every product equals its reference, over shapes that no block size divides.

Tolerances: a bf16 result is rounded to 8 bits, so it differs from the float32 one by up to
2^-8 of its size; the int8 product with many rows rounds once more before the scale, and a
bias or residual once more after it. The int4 operator may round its dequantized weights.
Errors are measured against the result's root mean square, since a sum may cancel to near zero.
"""

import pytest
import torch

from hasten.kernels.linear import (
    MANY_ROWS,
    MANY_ROWS_INT4,
    Int8Linear,
    Scratch,
    TorchLinear,
    dense_linear,
    dequantize,
    linear_reference,
    quantized_linear,
)
from hasten.quantization.rtn import quantize

SHAPES = [(64, 64), (1, 32), (7, 32), (50, 96), (131, 160), (320, 224), (897, 128), (33, 896)]
ROWS = [1, 2, 5, MANY_ROWS, MANY_ROWS + 1, MANY_ROWS_INT4 + 3]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.float() - expected.float()).abs().max()
    return float(difference / expected.float().square().mean().sqrt())


@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 13), (77, 61)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_dense_equals_reference(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float, with_extras: bool
) -> None:
    weight = random(*shape, dtype=dtype)
    bias = random(shape[0], dtype=dtype) if with_extras else None
    linear = dense_linear(weight, bias)
    for num_rows in ROWS:
        x = random(num_rows, shape[1], dtype=dtype)
        expected = linear_reference(x.float(), weight, bias)
        residual = random(num_rows, shape[0], dtype=dtype) if with_extras else None
        actual = linear(x, None if residual is None else residual.clone())
        assert actual.dtype == dtype
        assert relative_error(actual, expected if residual is None else expected + residual.float()) < tolerance


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_equals_reference(shape: tuple[int, int], bits: int, with_extras: bool) -> None:
    quantized = quantize(random(*shape), bits)
    weight = dequantize(quantized.codes, quantized.scale)
    bias = random(shape[0], dtype=torch.bfloat16) if with_extras else None
    linear = quantized_linear(quantized.codes, quantized.scale, bits, bias, Scratch())
    for num_rows in ROWS:
        x = random(num_rows, shape[1], dtype=torch.bfloat16)
        expected = linear_reference(x.float(), weight, bias)
        residual = random(num_rows, shape[0], dtype=torch.bfloat16) if with_extras else None
        actual = linear(x, None if residual is None else residual.clone())
        assert actual.shape == expected.shape
        assert relative_error(actual, expected if residual is None else expected + residual.float()) < 0.06


def test_int8_rows_are_the_dequantized_rows() -> None:
    quantized = quantize(random(40, 64), 8)
    linear = Int8Linear(quantized.codes, quantized.scale, None, Scratch())
    rows = linear.rows(torch.tensor([3, 0, 39, 3]))
    expected = dequantize(quantized.codes, quantized.scale)[[3, 0, 39, 3]]
    torch.testing.assert_close(rows.float(), expected, rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_bytes_are_about_bits_times_weights(bits: int) -> None:
    quantized = quantize(random(256, 512), bits)
    packed_bytes = quantized_linear(quantized.codes, quantized.scale, bits, None, Scratch()).weight_bytes
    assert 256 * 512 * bits / 8 <= packed_bytes < 256 * 512 * bits / 8 * 1.1


def test_int4_with_many_rows_where_the_layout_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize(random(70, 64), 4)
    linear = quantized_linear(quantized.codes, quantized.scale, 4, None, Scratch())
    x = random(MANY_ROWS_INT4 + 1, 64, dtype=torch.bfloat16)
    known = linear(x)
    monkeypatch.setattr("hasten.kernels.linear.has_known_int4_layout", lambda: False)
    assert relative_error(linear(x), known) < 0.06


def test_a_dtype_that_onednn_refuses_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr("hasten.kernels.linear.OneDnnLinear", refuse)
    weight, x = random(8, 16), random(3, 16)
    linear = dense_linear(weight)
    assert isinstance(linear, TorchLinear)
    torch.testing.assert_close(linear(x), linear_reference(x, weight))
