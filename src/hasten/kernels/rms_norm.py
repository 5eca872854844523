"""RMSNorm: x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv 1910.07467)."""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight broadcastable to x; as in published models, rounded to x's dtype before the weights too."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed.float() * weight.float()).to(x.dtype)


class RMSNorm:
    """torch's own norm, one call: written out as its fastest operators, the calls take longer than the norm.

    Args:
        weight: [n], or [heads, n] with a row for each head; the norm is over the last dimension.
        dtype: of x and of the result.
    """

    __slots__ = ("_eps", "_head_weights", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        weight = weight.to(dtype)
        self._shape, self._eps = weight.shape[-1:], eps
        self._weight = weight if weight.dim() == 1 else None
        self._head_weights = weight if weight.dim() > 1 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.rms_norm(x, self._shape, self._weight, self._eps)
        return y if self._head_weights is None else y.mul_(self._head_weights)
