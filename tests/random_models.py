"""A model of any family with random weights, for tests that compare with it."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def random_model(family: str, config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model in float32; norms and biases are random too, since ones and zeros would hide a wrong order."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:
                parameter.normal_(1.0, 0.2)
    return model
