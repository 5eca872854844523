"""compressed-tensors' int4 layout."""

import pytest
import torch

from hasten.quantization.packing import pack_int4, unpack_int4


@pytest.mark.parametrize("shape", [(1, 8), (3, 32), (5, 13)])
def test_unpacking_restores_the_codes(shape: tuple[int, int]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(unpack_int4(packed, shape[1]), codes)


def test_the_first_code_has_the_lowest_bits() -> None:
    codes = torch.tensor([[-8, -7, 0, 7, -8, -8, -8, 7]], dtype=torch.int8)  # stored as 0 1 8 15 0 0 0 15
    assert pack_int4(codes).item() & 0xFFFFFFFF == 0xF000F810
