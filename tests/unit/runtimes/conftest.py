"""A tiny random model of two layers, without a tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """write_model(family, **config) writes a model with random weights and returns its folder."""

    def write(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
        torch.manual_seed(0)
        config = FAMILIES[family](**(SIZES | changes))
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.5)  # a bias of zero would hide a wrong order
        folder = tmp_path / f"source-{family}"
        model.to(dtype).save_pretrained(folder)
        return folder

    return write
