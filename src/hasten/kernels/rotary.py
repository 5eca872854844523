"""Applying rotary positions to q and k: each pair of dimensions is turned by the position's angle.

Published weights pair dimension i with i + dim/2. The decoder reorders the rows of its q and
k projections once, at load (`interleave_rows`), so that each pair is adjacent; a rotation is
then one complex multiplication. Scores are unchanged, because q and k are reordered alike.
The angles are `models.rotary`.
"""

import torch

from hasten.kernels.rms_norm import RMSNorm


def rotate_reference(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """The published form: x [num_tokens, heads, dim] with pairs (i, i + dim/2), rounded to x's dtype at every step.

    Args:
        rotations: [num_tokens, 1, dim / 2] complex64.
    """
    cos, sin = rotations.real.to(x.dtype), rotations.imag.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def interleave_rows(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders [heads * head_dim, ...] so that rows i and i + head_dim/2 of a head are adjacent."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(rows.shape)


class Heads:
    """q, k and v of one step, q and k rotated, in memory that all layers share.

    Its views are made once, not in every layer: a step of one token takes as long to describe as
    to compute.

    Args:
        dtype: of q, k and v.

    Attributes:
        q: [num_tokens, num_kv_heads, num_heads / num_kv_heads, head_dim].
        k, v: [num_tokens, num_kv_heads, head_dim].
    """

    __slots__ = ("_narrow", "_pairs", "_qk", "_wide", "k", "q", "v")

    def __init__(self, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        wide = torch.empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
        self._qk = wide[:, : num_heads + num_kv_heads]
        self._pairs = self._qk.view(torch.complex64)
        self._wide = wide.flatten(1)
        narrow = wide if dtype == torch.float32 else torch.empty_like(wide, dtype=dtype)
        self._narrow = None if narrow is wide else narrow.flatten(1)
        q, self.k, self.v = narrow.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
        self.q = q.unflatten(1, (num_kv_heads, -1))

    def rotate(self, qkv: torch.Tensor, rotations: torch.Tensor, norm: RMSNorm | None) -> None:
        """Takes over a layer's heads; adjacent pairs of q and k are rotated in float32.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
            rotations: [num_tokens, 1, head_dim / 2] complex64.
            norm: of q and k, before the rotation.
        """
        self._wide.copy_(qkv)
        if norm is not None:
            self._qk.copy_(norm(self._qk))
        self._pairs.mul_(rotations)
        if self._narrow is not None:
            self._narrow.copy_(self._wide)
