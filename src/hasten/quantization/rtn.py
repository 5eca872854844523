"""Round-to-nearest quantization of weights: 8 bits a row, 4 bits a group, or fp8 a row.

weight ≈ code * scale. Integer scales are rounded to bf16 before the codes are chosen, since
that is how the operators read them, so a scale's rounding costs nothing; fp8 scales are
float32. For 4 bits each group's scale is the best of a few by squared error: clipping the
largest weight a little buys finer steps for all the others. No calibration data is used.

Results lie on the weight's device. 8-bit codes, fp8's too, do not depend on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hasten.config import Scheme

GROUP_SIZES = (128, 64, 32)
"""Group sizes that the int4 operator takes, preferred first."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a group's largest weight that are tried as the largest code."""

SLICE_WEIGHTS = 1 << 19
"""Weights quantized at a time, so that what is computed on the way stays in the cache."""

GPU_SLICE_WEIGHTS = 1 << 27
"""The same on a GPU: a few GB on the way, for the largest of heads."""

FP8_MAX = 448.0
"""The largest e4m3 number."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as codes of at most 8 bits.

    Args:
        codes: int8 or float8_e4m3fn [out_features, in_features]; 4-bit codes are -8 to 7, not packed.
        scale: [out_features, groups], bf16 for integers, float32 for float8.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int


def weight_bits(scheme: Scheme, module: str, in_features: int) -> int:
    """Bits that a scheme gives a linear layer.

    4 bits need a row that a group size divides, and the head, where errors reach the logits
    directly, has 8 bits in every quantized scheme.
    """
    if scheme.weight_bits == 4 and (module == "lm_head" or group_size_for(in_features) is None):
        return 8
    return scheme.weight_bits


def group_size_for(in_features: int) -> int | None:
    """The largest group size that divides a row, None if none does."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


def quantize(weight: torch.Tensor, bits: int) -> QuantizedWeight:
    """Quantizes [out_features, in_features] to 8 bits a row, or 4 bits a group."""
    group_size = weight.shape[1] if bits == 8 else group_size_for(weight.shape[1])
    assert group_size is not None, "weight_bits gives such a row 8 bits"
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    groups_per_row = weight.shape[1] // group_size
    scale = torch.empty(weight.shape[0], groups_per_row, dtype=torch.bfloat16, device=weight.device)
    for rows in _slices(weight):
        groups = weight[rows].float().unflatten(1, (-1, group_size))
        slice_codes, slice_scale = _quantize_8(groups) if bits == 8 else _quantize_4(groups)
        codes[rows], scale[rows] = slice_codes.flatten(1), slice_scale.squeeze(2)
    return QuantizedWeight(codes, scale, bits)


def quantize_fp8(weight: torch.Tensor) -> QuantizedWeight:
    """Quantizes [out_features, in_features] to float8_e4m3fn, with one scale a row."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for rows in _slices(weight):
        values = weight[rows].float()
        slice_scale = _divided(values.abs().amax(dim=1, keepdim=True), FP8_MAX)
        scale[rows] = torch.where(slice_scale > 0, slice_scale, torch.ones_like(slice_scale))
        codes[rows] = (values / scale[rows]).clamp_(-FP8_MAX, FP8_MAX).to(codes.dtype)
    return QuantizedWeight(codes, scale, 8)


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    slice_weights = SLICE_WEIGHTS if weight.device.type == "cpu" else GPU_SLICE_WEIGHTS
    num_rows = max(1, slice_weights // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        yield slice(start, start + num_rows)


def _quantize_8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _scale(groups.abs().amax(dim=2, keepdim=True), 127.0)
    return _codes(groups, scale, 127), scale


def _quantize_4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = groups.abs().amax(dim=2, keepdim=True)
    best_scale = _scale(largest, 7.5)
    best_error = torch.full_like(largest, float("inf"))
    for clip in CLIPS:
        scale = _scale(largest * clip, 7.5)
        error = _codes(groups, scale, 7).mul_(scale).sub_(groups).square_().sum(dim=2, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return _codes(groups, best_scale, 7), best_scale


def _scale(largest: torch.Tensor, steps: float) -> torch.Tensor:
    scale = _divided(largest, steps).to(torch.bfloat16).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _divided(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """A rounded quotient on every device: by a Python number, a GPU would multiply with the reciprocal."""
    return values / torch.full_like(values, divisor)


def _codes(weight: torch.Tensor, scale: torch.Tensor, highest: int) -> torch.Tensor:
    return (weight * (1.0 / scale)).round_().clamp_(-highest - 1, highest)
