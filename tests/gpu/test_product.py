"""Products of a decoder on the GPU equal float64 ones, with few rows and many."""

import pytest
import torch
from torch.nn import functional

from hasten.kernels.rms_norm import rms_norm_reference
from hasten.quantization.rtn import quantize_fp8

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

if torch.cuda.is_available():
    from hasten.kernels.cuda.hidden_rows import HiddenRows, whole
    from hasten.kernels.cuda.product import MAX_UNSCALED_ROWS, CudaProduct, Fp8Rows

EPS = 1e-5
ROWS = (3, 17, 64, 300, 1000)


def product(
    shape: tuple[int, int],
    scheme: str,
    *,
    has_bias: bool = False,
    has_norm: bool = False,
    is_gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple["CudaProduct", torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A product, its weights as it has them, its bias and its norm's weights."""
    dense = torch.randn(shape, device="cuda").mul_(0.02)
    dense *= torch.rand(shape[0], 1, device="cuda") + 0.5  # so that rows have scales of their own
    weight, scale = dense.bfloat16(), None
    dense = weight.double()
    if scheme == "fp8":
        quantized = quantize_fp8(weight)
        weight, scale = quantized.codes, quantized.scale.flatten().float()
        dense = weight.double() * scale.double().unsqueeze(1)
    bias = torch.randn(shape[0], device="cuda").bfloat16() if has_bias else None
    norm = (torch.rand(shape[1], device="cuda") + 0.5).bfloat16() if has_norm else None
    made = CudaProduct(
        weight,
        scale=scale,
        bias=bias,
        norm_weight=norm,
        eps=EPS,
        is_gated=is_gated,
        out_dtype=out_dtype,
        has_copy=False,
        configs={},
    )
    return made, dense, bias, norm


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize(("scheme", "tolerance"), [("bf16", 6e-3), ("fp8", 4e-2)])
def test_product(
    *,
    scheme: str,
    tolerance: float,
    out_dtype: torch.dtype | None,
    has_norm: bool,
    has_bias: bool,
    has_residual: bool,
    rows: int,
) -> None:
    if out_dtype is not None and (has_residual or has_bias):
        pytest.skip("only the head's result is of another type, and it has neither")
    torch.manual_seed(rows)
    made, weight, bias, norm = product((1536, 2048), scheme, has_bias=has_bias, has_norm=has_norm, out_dtype=out_dtype)
    x = (torch.randn(rows, 2048, device="cuda") * torch.rand(rows, 1, device="cuda")).bfloat16()
    residual = torch.randn(rows, 1536, device="cuda").bfloat16() if has_residual else None
    wide = x.double() if norm is None else rms_norm_reference(x.double(), norm.double(), EPS)
    expected = wide @ weight.T
    expected = expected if bias is None else expected + bias.double()
    expected = expected if residual is None else expected + residual.double()
    with torch.inference_mode():
        y = whole(made(x, residual))
    assert y.dtype == (out_dtype or torch.bfloat16) and y.shape == (rows, 1536)
    assert distance(y, expected) < tolerance


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("width", [1536, 1544])
@pytest.mark.parametrize(("scheme", "tolerance"), [("bf16", 8e-3), ("fp8", 6e-2)])
def test_gated_and_the_one_behind(*, scheme: str, tolerance: float, width: int, has_bias: bool, rows: int) -> None:
    torch.manual_seed(rows)
    gate_up, up_weight, bias, norm = product((2 * width, 2048), scheme, has_bias=has_bias, has_norm=True, is_gated=True)
    down, down_weight, _, _ = product((1024, width), scheme)
    x, residual = (torch.randn(rows, size, device="cuda").bfloat16() for size in (2048, 1024))
    assert norm is not None
    wide = rms_norm_reference(x.double(), norm.double(), EPS) @ up_weight.T
    gate, up = (wide if bias is None else wide + bias.double()).chunk(2, 1)
    expected = (functional.silu(gate) * up) @ down_weight.T + residual.double()
    with torch.inference_mode():
        y = whole(down(gate_up(x), residual))
    assert y.dtype == torch.bfloat16
    assert distance(y, expected) < tolerance


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme", ["bf16", "fp8"])
def test_a_norm_takes_over_what_the_product_before_it_left(scheme: str, rows: int) -> None:
    torch.manual_seed(rows)
    down, _, _, _ = product((2048, 1536), scheme)
    qkv, _, _, _ = product((1024, 2048), scheme, has_norm=True)
    x, residual = (torch.randn(rows, size, device="cuda").bfloat16() for size in (1536, 2048))
    with torch.inference_mode():
        hidden = down(x, residual.clone())
        summed = whole(down(x, residual.clone()))
        y = qkv(hidden)
    assert not isinstance(hidden, HiddenRows) or hidden.addend is None
    assert torch.equal(whole(hidden), summed)
    assert distance(y, qkv(summed).double()) < 2e-3


def test_late_scales_change_nothing_but_rounding() -> None:
    """A batch computed at once and the same rows in parts small enough for late scales."""
    torch.manual_seed(0)
    made, _, _, _ = product((1536, 2048), "fp8")
    x = torch.randn(MAX_UNSCALED_ROWS + 1, 2048, device="cuda").bfloat16()
    with torch.inference_mode():
        whole, part = made(x), made(x[:MAX_UNSCALED_ROWS].contiguous())
    assert distance(part, whole[:MAX_UNSCALED_ROWS].double()) < 3e-3


def test_fp8_rows_are_tensors_without_overhead() -> None:
    codes, scale = torch.zeros(2, 16, device="cuda").to(torch.float8_e4m3fn), torch.ones(2, 1, device="cuda")
    rows = Fp8Rows.of(codes, scale)
    assert rows.data_ptr() == codes.data_ptr() and rows.scale is scale
    assert type(rows.view(torch.uint8) + 1) is torch.Tensor
