"""compressed-tensors' layout of int4 weights: eight codes in an int32, the first in the lowest bits.

A code is stored as code + 8, and a row whose length is no multiple of eight is filled up with
zeros, as the format's "pack-quantized" compressor does.
"""

import torch

PER_WORD = 8


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes from -8 to 7, [n, k] → int32 [n, ceil(k / 8)]."""
    padded = torch.nn.functional.pad(codes.to(torch.int32) + 8, (0, -codes.shape[1] % PER_WORD))
    words = padded.unflatten(1, (-1, PER_WORD)) << _shifts(codes.device)
    return words.sum(dim=2, dtype=torch.int64).to(torch.int32)


def unpack_int4(packed: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The codes of `pack_int4`, int8 [n, num_columns]."""
    codes = (packed.unsqueeze(2) >> _shifts(packed.device)).bitwise_and_(15).to(torch.int8).sub_(8)
    return codes.flatten(1)[:, :num_columns].contiguous()


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32, device=device)
