"""Attention of one prompt from its first token on, by torch: cuDNN's kernel, twice as fast as others for long prompts.

cuDNN makes a plan for each number of tokens (0.03 s), so it should be one that recurs.
"""

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

MIN_TOKENS = 512
"""Prompts of no more tokens are as fast in `ragged_attention`."""


def recurring_length(num_tokens: int) -> int:
    """What a prompt is filled up to: a quarter of a power of two, at least 256."""
    step = max(256, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    return -(-num_tokens // step) * step


def has_prompt_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `prompt_attention` takes such heads."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0


def prompt_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of tokens that see all before them.

    Args:
        q: [num_tokens, heads, dim], rotated.
        k, v: [num_tokens, kv_heads, dim]. Tokens past the prompt's end may follow, of finite k and v; what is
            returned for them means nothing.

    Returns:
        [num_tokens, heads * dim].
    """
    heads = [each.transpose(0, 1).unsqueeze(0) for each in (q, k, v)]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        attended = functional.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], is_causal=True, scale=scale, enable_gqa=True
        )
    return attended.squeeze(0).transpose(0, 1).flatten(1)
