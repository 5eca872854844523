"""y = x @ W.T + bias in each precision: a torch reference and the fastest CPU operator for it.

Weights arrive in their canonical form (dense, or integer codes with scales) and are packed
once into the layout that the operator reads. Which operator is fastest depends on the number
of rows: a decode step is bound by reading the weights, a prefill by arithmetic, so the
quantized products turn their weights into bf16, slice by slice, when there are many rows.

Activations of the quantized products are bf16: the operators are slow with any other dtype.
Quantizing (choosing codes and scales) is `quantization`; this file only computes.
"""

import functools
import logging
import math
from typing import Protocol

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

MANY_ROWS = 16
"""Above this many rows the quantized products dequantize; measured, see docs/experiments.md."""

SLICE_BYTES = 32 << 20
"""bf16 bytes of weights that are dequantized at a time; bounds what a head of 150,000 rows takes."""

MANY_ROWS_INT4 = 64
"""The same for int4, whose own operator holds out longer."""

INT4_ROWS = 64
"""The int4 layout's height: matrices are padded with zero rows to a multiple."""


class Linear(Protocol):
    """A packed product.

    `__call__(x, residual)`: x [num_tokens, in_features] → [num_tokens, out_features]; a
    residual of the result's shape is added to it and may be overwritten.
    """

    weight_bytes: int

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float32, in x's dtype."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes int8 [n, k] times scale [n, groups], in float32."""
    groups = scale.shape[1]
    return (codes.float().unflatten(1, (groups, -1)) * scale.float().unsqueeze(-1)).flatten(1)


class Scratch:
    """Memory for dequantized weights that products share, since fresh pages cost more than the arithmetic."""

    __slots__ = ("_memory",)

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.bfloat16)

    def take(self, *shape: int) -> torch.Tensor:
        """Uninitialized bf16 of a shape, valid until the next call."""
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.bfloat16)
        return self._memory[:size].view(shape)


class TorchLinear:
    """torch's own product, for dtypes and machines without oneDNN's packed one."""

    __slots__ = ("bias", "weight", "weight_bytes")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight.clone(), bias
        self.weight_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = functional.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)


class OneDnnLinear:
    """oneDNN's product with weights in its blocked layout; the residual is added inside it."""

    __slots__ = ("bias", "packed", "product", "weight_bytes")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, MANY_ROWS)
        self.bias = bias
        self.weight_bytes = weight.nbytes
        self.product = torch.ops.mkldnn._linear_pointwise.default
        self(torch.zeros(1, weight.shape[1], dtype=weight.dtype))  # refuses here what it would refuse later

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return self.product(x, self.packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")


class Int8Linear:
    """int8 codes with one scale a row; codes stay row-major, so rows can be looked up as well."""

    __slots__ = ("bias", "codes", "scale", "scratch", "slice_rows", "weight_bytes")

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        self.scratch = scratch
        self.codes = codes.contiguous()
        self.scale = scale.flatten().to(torch.bfloat16)
        self.bias = bias
        self.weight_bytes = codes.nbytes + self.scale.nbytes
        self.slice_rows = max(64, SLICE_BYTES // (2 * codes.shape[1]))

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        few_rows = x.size(0) <= MANY_ROWS
        y = torch._weight_int8pack_mm(x, self.codes, self.scale) if few_rows else self._many_rows(x)
        if self.bias is not None:
            y += self.bias
        return y if residual is None else y.add_(residual)

    def _many_rows(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(x.shape[0], self.codes.shape[0])
        for start in range(0, self.codes.shape[0], self.slice_rows):
            codes = self.codes[start : start + self.slice_rows]
            weight = self.scratch.take(*codes.shape).copy_(codes)
            y[:, start : start + self.slice_rows] = functional.linear(x, weight)
        return y.mul_(self.scale)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, bf16 [num_indices, in_features]; serves a tied embedding."""
        return self.codes.index_select(0, indices) * self.scale.index_select(0, indices).unsqueeze(1)


class Int4Linear:
    """int4 codes with a scale for each group of a row, in the layout of torch's int4 operator."""

    __slots__ = ("bias", "group_size", "num_rows", "packed", "scales_and_zeros", "scratch", "weight_bytes")

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        self.scratch = scratch
        self.num_rows = codes.shape[0]
        self.group_size = codes.shape[1] // scale.shape[1]
        padding = -self.num_rows % INT4_ROWS
        padded = functional.pad(codes, (0, 0, 0, padding)).to(torch.int32).add_(8)
        self.packed = torch._convert_weight_to_int4pack_for_cpu(padded, 2)
        scales = functional.pad(scale.to(torch.bfloat16), (0, 0, 0, padding)).T
        self.scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
        self.bias = bias
        self.weight_bytes = self.packed.nbytes + self.scales_and_zeros.nbytes

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if x.size(0) > MANY_ROWS_INT4 and has_known_int4_layout():
            y = x @ self._dequantized()
        else:
            y = torch._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.scales_and_zeros)
        if y.size(1) != self.num_rows:
            y = y[:, : self.num_rows].contiguous()
        if self.bias is not None:
            y += self.bias
        return y if residual is None else y.add_(residual)

    def _dequantized(self) -> torch.Tensor:
        """The transposed matrix, bf16 [in_features, padded out_features]."""
        codes = unpack_operator_int4(self.packed, self.scratch)
        scale = self.scales_and_zeros[:, :, 0].contiguous().unsqueeze(1)
        return codes.unflatten(0, (-1, self.group_size)).mul_(scale).flatten(0, 1)


def unpack_operator_int4(packed: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The codes in the AVX-512 layout of torch's int4 operator, transposed: bf16 [k, n].

    64 rows of the matrix lie together, column by column: 32 bytes with row i in the low
    half of byte i and row i + 32 in the high half.
    """
    num_rows, num_columns = packed.shape[0], packed.shape[1] * 2
    columns = packed.view(torch.uint8).view(num_rows // INT4_ROWS, num_columns, 32).transpose(0, 1)
    codes = scratch.take(num_columns, num_rows // INT4_ROWS, 2, 32)
    codes[:, :, 0].copy_(columns & 15)
    codes[:, :, 1].copy_(columns >> 4)
    return codes.view(num_columns, num_rows).sub_(8)


@functools.cache
def has_known_int4_layout() -> bool:
    """Whether this machine's int4 operator has the layout of `unpack_operator_int4`, by trying it."""
    codes = torch.arange(INT4_ROWS * 32, dtype=torch.int32).mul_(7).remainder_(16).view(INT4_ROWS, 32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    if packed.nbytes != codes.numel() // 2:
        return False
    return torch.equal(unpack_operator_int4(packed, Scratch()).T, (codes - 8).to(torch.bfloat16))


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest product for a dense weight [out_features, in_features] on this machine."""
    if torch.backends.mkldnn.is_available() and weight.device.type == "cpu":
        try:
            return OneDnnLinear(weight, bias)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("oneDNN has no packed %s product here (%s): using torch's", weight.dtype, reason)
    return TorchLinear(weight, bias)


def quantized_linear(
    codes: torch.Tensor, scale: torch.Tensor, bits: int, bias: torch.Tensor | None, scratch: Scratch
) -> Linear:
    """The fastest product for integer weights.

    Args:
        codes: int8 [out_features, in_features], from -2^(bits-1) to 2^(bits-1) - 1.
        scale: [out_features, groups]; one group for 8 bits.
        bias: bf16 [out_features].
        scratch: one for all products of a model.
    """
    return (Int8Linear if bits == 8 else Int4Linear)(codes, scale, bias, scratch)
