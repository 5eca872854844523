"""Applying rotary positions to q and k: each pair of dimensions is turned by the position's angle.

Published weights pair dimension i with i + dim/2. The decoder reorders the rows of its q and
k projections once, at load (`interleave_rows`), so that each pair is adjacent; a rotation is
then one complex multiplication. Scores are unchanged, because q and k are reordered alike.
The angles are `models.rotary`.
"""

import torch


def rotate_reference(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """The published form: x [num_tokens, heads, dim] with pairs (i, i + dim/2).

    Args:
        rotations: [num_tokens, 1, dim / 2] complex64.
    """
    cos, sin = rotations.real, rotations.imag
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def interleave_rows(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders [heads * head_dim, ...] so that rows i and i + head_dim/2 of a head are adjacent."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(rows.shape)


def rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotates x [num_tokens, heads, dim] with adjacent pairs; computed in float32, returned in x's dtype.

    Args:
        rotations: [num_tokens, 1, dim / 2] complex64.
    """
    return x.float().view(torch.complex64).mul(rotations).view(torch.float32).to(x.dtype)
