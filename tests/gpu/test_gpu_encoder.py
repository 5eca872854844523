"""An encoder's vectors on the GPU are those of a CPU, whichever attention computes them."""

from pathlib import Path

import pytest
import torch

from hasten.models.encoder import load_encoder
from tiny_encoders import make_encoder

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

INPUTS = [[*range(5, 5 + length)] for length in (7, 1, 64, 7, 3, 33)]


@pytest.mark.parametrize("num_heads", [6, 8])  # heads of 8 numbers are flash attention's, those of 6 are not
@pytest.mark.parametrize(("scheme", "least"), [("fp32", 0.99999), ("bf16", 0.999), ("fp16", 0.9999)])
def test_vectors_are_those_of_a_cpu(tmp_path: Path, scheme: str, least: float, num_heads: int) -> None:
    make_encoder(tmp_path, num_attention_heads=num_heads)
    expected = load_encoder(tmp_path, "fp32", "cpu").embed(INPUTS)
    vectors = load_encoder(tmp_path, scheme, "cuda").embed(INPUTS)
    assert torch.cosine_similarity(vectors, expected).min() > least
