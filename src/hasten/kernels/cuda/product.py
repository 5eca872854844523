"""A product on a GPU with its norm, activation and residual: one kernel, or a library's.

Up to `stream_linear.MAX_ROWS` rows a product is bound by reading its weights, and one kernel
does all of it. Above, the matrix product is the library's, with small kernels around it: dense
weights through cuBLAS, fp8 through its scaled product with activations quantized per token. int8
goes through cuBLAS too where there was room for a 16-bit copy of the weights: many rows are bound
by arithmetic, which int8 weights do not make less. Without the copy it has a slower kernel.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

from hasten.kernels.cuda.elementwise import quantize_fp8, rms_norm, rms_norm_fp8, scale_rows, silu_mul, silu_mul_fp8
from hasten.kernels.cuda.hidden_rows import HiddenRows, take_addend, whole
from hasten.kernels.cuda.int8_matmul import int8_matmul
from hasten.kernels.cuda.stream_linear import StreamConfig, stream_linear, supports
from hasten.kernels.product_shape import ROW_BUCKETS

DEQUANTIZED_ROWS = 8192
"""Rows that are dequantized at a time."""

MAX_UNSCALED_ROWS = 512
"""Up to so many rows an fp8 product leaves its scales to the kernel behind it: cuBLAS has kernels for
few rows, but only one, made for many, that applies a scale to each row and column."""


class Fp8Rows(torch.Tensor):
    """float8_e4m3fn codes [rows, width] with their `scale`, float32 [rows, 1]: what a gated product hands on."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    scale: torch.Tensor

    @staticmethod
    def of(codes: torch.Tensor, scale: torch.Tensor) -> "Fp8Rows":
        rows = codes.as_subclass(Fp8Rows)
        rows.scale = scale
        return rows


class CudaProduct:
    """See `kernels.product.Product`. A gated fp8 product of many rows gives Fp8Rows, which the next one takes.
    One with a residual may give HiddenRows: a product with a norm reads them first, or else `whole`.

    Args:
        weight: [out_features, in_features] row-major: float32, float16, bfloat16, int8 or float8_e4m3fn.
        scale: [out_features] float32 for the 8-bit ones.
        norm_weight: [in_features] of the norm before it.
        is_gated: the rows are gate and up, and the result is silu(gate) * up.
        out_dtype: of the result; None is that of x.
        has_copy: whether int8 weights also get a 16-bit copy, of bfloat16.
        configs: how the streaming kernel runs, for up to so many rows; its own choice for others.
    """

    __slots__ = (
        "_bias",
        "_configs",
        "_dense",
        "_eps",
        "_is_gated",
        "_norm_weight",
        "_one",
        "_out_dtype",
        "scale",
        "weight",
        "weight_bytes",
    )

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
        is_gated: bool,
        out_dtype: torch.dtype | None,
        has_copy: bool,
        configs: Mapping[int, StreamConfig],
    ) -> None:
        self.weight, self.scale = weight, scale
        self._dense = _dequantized(weight, scale) if has_copy or _is_odd(weight, is_gated) else weight
        self.weight_bytes = weight.nbytes + (0 if scale is None else scale.nbytes)
        self._bias, self._norm_weight, self._eps = bias, norm_weight, eps
        self._is_gated, self._out_dtype, self._configs = is_gated, out_dtype, configs
        self._one = torch.ones((), device=weight.device)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(x, Fp8Rows) and supports(self.weight, x.shape[0]):
            return self._stream(x, residual)
        return self._library(x, None if residual is None else whole(residual))

    def _stream(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        num_columns = self.weight.shape[0] // (2 if self._is_gated else 1)
        if isinstance(x, HiddenRows) and x.addend is not None:
            x = whole(x)
        return stream_linear(
            x,
            self.weight,
            scale=self.scale,
            bias=self._bias,
            norm_weight=self._norm_weight,
            eps=self._eps,
            residual=residual,
            gated=self._is_gated,
            out=torch.empty(x.shape[0], num_columns, dtype=self._out_dtype or x.dtype, device=x.device),
            config=self._configs.get(next((most for most in ROW_BUCKETS if x.shape[0] <= most), 0)),
        )

    def _library(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if self._dense.dtype == torch.float8_e4m3fn:
            return self._fp8(x, residual)
        if self._norm_weight is not None:
            x = rms_norm(x, self._norm_weight, self._eps, addend=take_addend(x))
        if self._dense.dtype == torch.int8:
            assert self.scale is not None
            y = int8_matmul(x, self.weight, self.scale, self._bias, residual, self._out_dtype)
            return silu_mul(y) if self._is_gated else y
        if self._out_dtype not in (None, x.dtype):
            y = torch.mm(x, self._dense.T, out_dtype=self._out_dtype)
        else:
            y = functional.linear(x, self._dense, self._bias)
        if residual is not None:
            return HiddenRows.of(residual, addend=y)
        return silu_mul(y) if self._is_gated else y

    def _fp8(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Summed by the tensor cores alone (fast accumulation): their error is far below that of the codes."""
        assert self.scale is not None
        codes, scale = self._codes(x)
        if len(codes) > MAX_UNSCALED_ROWS or (self._is_gated and self._bias is not None):
            y = self._scaled_mm(codes, scale, self.scale.unsqueeze(0), self._bias)
            if self._is_gated:
                return Fp8Rows.of(*silu_mul_fp8(y))
            if residual is not None:
                return residual.add_(y)
            return y if self._out_dtype is None else y.to(self._out_dtype)
        y = self._scaled_mm(codes, self._one, self._one, None)
        if self._is_gated:
            return Fp8Rows.of(*silu_mul_fp8(y, scale, self.scale))
        out = y if residual is None else residual
        if self._out_dtype not in (None, y.dtype):
            out = torch.empty_like(y, dtype=self._out_dtype)
        return scale_rows(y, scale, self.scale, bias=self._bias, residual=residual, out=out)

    def _codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(x, Fp8Rows):
            return x.as_subclass(torch.Tensor), x.scale
        if self._norm_weight is None:
            return quantize_fp8(x)
        return rms_norm_fp8(x, self._norm_weight, self._eps, addend=take_addend(x))

    def _scaled_mm(
        self, codes: torch.Tensor, scale: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return torch._scaled_mm(
            codes, self._dense.T, scale, weight_scale, bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


def _is_odd(weight: torch.Tensor, is_gated: bool) -> bool:
    """Whether the library has no product of these weights or of their result: its fp8 products go by blocks of 16."""
    rows_out, rows_in = weight.shape
    is_even = rows_out % (32 if is_gated else 16) == 0 and rows_in % 16 == 0
    return weight.dtype == torch.float8_e4m3fn and not is_even


def _dequantized(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """codes * scale in bfloat16, slice by slice: the float32 in between is as large as four of codes."""
    assert scale is not None
    dense = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    for start in range(0, codes.shape[0], DEQUANTIZED_ROWS):
        rows = slice(start, start + DEQUANTIZED_ROWS)
        dense[rows] = codes[rows].float() * scale[rows].unsqueeze(1)
    return dense
