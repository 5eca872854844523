"""A product with what stands before and behind it in a decoder: its norm and its activation.

On a CPU the parts run one after the other; on a GPU (`kernels.cuda.product`) they are one kernel.
"""

from typing import Protocol

import torch

from hasten.kernels.linear import Linear
from hasten.kernels.rms_norm import RMSNorm
from hasten.kernels.silu_mul import silu_mul


class Product(Protocol):
    """y = activation(W @ norm(x)) + residual, with those parts that it was made with.

    `__call__(x, residual)`: x [num_tokens, in_features] gives [num_tokens, out_features]; a
    residual of the result's shape is added to it and may be overwritten.
    """

    weight_bytes: int

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


class CpuProduct:
    """The parts one after the other.

    Args:
        is_gated: the rows are gate and up, and the result is silu(gate) * up.
    """

    __slots__ = ("_is_gated", "_linear", "_norm", "weight_bytes")

    def __init__(self, linear: Linear, norm: RMSNorm | None = None, *, is_gated: bool = False) -> None:
        self._linear, self._norm, self._is_gated = linear, norm, is_gated
        self.weight_bytes = linear.weight_bytes

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = self._linear(x if self._norm is None else self._norm(x), residual)
        return silu_mul(y) if self._is_gated else y
