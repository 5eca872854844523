"""Round-to-nearest quantization of weights: symmetric, 8 bits a row or 4 bits a group.

weight ≈ code * scale. Scales are rounded to bf16 before the codes are chosen, since that is
how the operators read them, so a scale's rounding costs nothing. For 4 bits each group's scale
is the best of a few by squared error: clipping the largest weight a little buys finer steps
for all the others. No calibration data is used.
"""

from dataclasses import dataclass

import torch

from hasten.config import Scheme

GROUP_SIZES = (128, 64, 32)
"""Group sizes that the int4 operator takes, preferred first."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a group's largest weight that are tried as the largest code."""

SLICE_WEIGHTS = 1 << 19
"""Weights quantized at a time, so that what is computed on the way stays in the cache."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as integers.

    Args:
        codes: int8 [out_features, in_features]; 4-bit codes are -8 to 7, not packed.
        scale: bf16 [out_features, groups].
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
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], weight.shape[1] // group_size, dtype=torch.bfloat16)
    num_rows = max(1, SLICE_WEIGHTS // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        groups = weight[rows].float().unflatten(1, (-1, group_size))
        slice_codes, slice_scale = _quantize_8(groups) if bits == 8 else _quantize_4(groups)
        codes[rows], scale[rows] = slice_codes.flatten(1), slice_scale.squeeze(2)
    return QuantizedWeight(codes, scale, bits)


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
    scale = (largest / steps).to(torch.bfloat16).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(weight: torch.Tensor, scale: torch.Tensor, highest: int) -> torch.Tensor:
    return (weight * (1.0 / scale)).round_().clamp_(-highest - 1, highest)
