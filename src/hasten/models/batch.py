"""The tensors of one engine step: what the model reads, nothing about scheduling.

A step mixes prefill chunks and decode tokens of several sequences. Their tokens lie one
sequence after the other without padding: sequence i has the tokens
cu_seqlens_q[i] to cu_seqlens_q[i + 1].
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Args:
        token_ids: [num_tokens] int64.
        positions: [num_tokens] int64, position in the sequence, from 0.
        slot_mapping: [num_tokens] int64, where the token's K and V go:
            block * block_size + offset.
        cu_seqlens_q: num_seqs + 1 ints, first token of each sequence, then num_tokens.
        context_lens: num_seqs ints, tokens of the sequence in the cache after this step.
        block_tables: num_seqs lists of block ids, enough for context_len tokens each.
        logits_indices: [num_logits] int64, the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cu_seqlens_q: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    logits_indices: torch.Tensor
