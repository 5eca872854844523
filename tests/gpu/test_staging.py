"""Reading files into a GPU's memory gives their bytes, and quantizing there the codes of a CPU."""

from pathlib import Path

import pytest
import torch

from hasten.models.staging import FilePart, FileStager
from hasten.quantization.rtn import quantize, quantize_fp8

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


@pytest.mark.parametrize("num_threads", [1, 5])
def test_parts_are_read_whole(tmp_path: Path, num_threads: int) -> None:
    expected = torch.randint(0, 256, (1_000_003,), dtype=torch.uint8)
    path = tmp_path / "bytes"
    path.write_bytes(expected.numpy().tobytes())
    stager = FileStager(torch.device("cuda"), num_threads, chunk_bytes=4096)
    whole = torch.empty(1_000_000, dtype=torch.uint8, device="cuda")
    words = torch.empty(10, 7, dtype=torch.int16, device="cuda")
    stager.read([FilePart(path, 3, whole), FilePart(path, 100, words)])
    assert torch.equal(whole.cpu(), expected[3:])
    assert torch.equal(words.view(-1).view(torch.uint8).cpu(), expected[100:240])
    with pytest.raises(OSError, match="ends before"):
        stager.read([FilePart(path, 4, whole)])
    stager.close()


def test_8_bit_codes_do_not_depend_on_the_device() -> None:
    weight = torch.randn(1000, 777).bfloat16()
    for here, there in (
        (quantize(weight, 8), quantize(weight.cuda(), 8)),
        (quantize_fp8(weight), quantize_fp8(weight.cuda())),
    ):
        assert torch.equal(here.codes.view(torch.uint8), there.codes.cpu().view(torch.uint8))
        assert torch.equal(here.scale, there.scale.cpu())
