"""The gated MLP's activation: silu(gate) * up on the two halves of one fused product."""

import torch


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [num_tokens, 2 * intermediate] → [num_tokens, intermediate]; silu(gate) is rounded to its dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (torch.sigmoid(wide) * wide).to(gate.dtype) * up


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in two operators; gate_up is left as it is."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
