"""The int8 product for many rows equals its reference, for shapes that no tile divides too."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


@pytest.mark.parametrize("rows", [1, 17, 33, 64, 100, 128, 129, 700])
@pytest.mark.parametrize(("n", "k"), [(256, 128), (1000, 200), (37, 4096), (6144, 4096), (300, 72)])
def test_equals_its_reference(rows: int, n: int, k: int) -> None:
    from hasten.kernels.cuda.int8_matmul import int8_matmul, int8_matmul_reference

    x = torch.randn(rows, k, device="cuda").bfloat16()
    codes = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
    scale = torch.rand(n, device="cuda") * 0.01
    bias, residual = torch.randn(n, device="cuda").bfloat16(), torch.randn(rows, n, device="cuda").bfloat16()
    for parts in ((None, None), (bias, None), (bias, residual)):
        expected = int8_matmul_reference(x, codes, scale, *parts)
        for out_dtype, bound in ((torch.bfloat16, 4e-3), (torch.float32, 1e-5)):
            actual = int8_matmul(x, codes, scale, *parts, out_dtype).float()
            assert ((actual - expected).norm() / expected.norm()).item() < bound
