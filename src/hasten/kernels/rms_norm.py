"""RMSNorm: x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv 1910.07467).

On a CPU torch's own rms_norm is a chain of six operators. The fast form takes the 2-norm in
one operator (in float32) and folds the mean's 1/n and eps into constants:
x / hypot(‖x‖, sqrt(n * eps)) * (weight * sqrt(n)) is the same number.
"""

import math

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight broadcastable to x; computed in float32, returned in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class RMSNorm:
    """The norm with its constants prepared.

    Args:
        weight: [n] or [heads, n]; the norm is over the last dimension.
        dtype: what x has and the result gets.
    """

    __slots__ = ("dtype", "floor", "scaled_weight")

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        n = weight.shape[-1]
        self.scaled_weight = weight.float() * math.sqrt(n)
        self.floor = torch.tensor(math.sqrt(n * eps))
        self.dtype = dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()  # once, instead of inside each of the operators below
        norm = torch.linalg.vector_norm(wide, 2, -1, True).hypot_(self.floor)
        return torch.div(wide, norm).mul_(self.scaled_weight).to(self.dtype)
