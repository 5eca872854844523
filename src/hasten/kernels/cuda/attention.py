"""Attention of all layers on a GPU: what lies between the qkv product and the output projection.

A step of decode tokens goes through `decode_attention`, which rotates, writes the cache and attends in one
kernel. In any other step `rotate_and_write` comes first, and then `prompt_attention` for one whole prompt,
`ragged_attention` for whatever else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hasten.kernels.attention import Attend, Step
from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention, is_long_context
from hasten.kernels.cuda.prompt_attention import (
    MIN_TOKENS,
    has_prompt_attention,
    prompt_attention,
    recurring_length,
)
from hasten.kernels.cuda.ragged_attention import attention_tiles, ragged_attention
from hasten.kernels.cuda.rotary import rotate_and_write
from hasten.kernels.kv_cache import KVCache

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k and v of some tokens, [num_tokens, heads, head_dim] each."""


@dataclass(frozen=True)
class DecodeRows:
    """Sequences that compute one token each; everything is on the GPU, int32.

    Args:
        slots: [rows], which row of block_tables is the sequence's.
        positions: [rows], the token's; -1 in rows that pad a batch.
        block_tables: [max_num_seqs, max_blocks_per_seq].
    """

    slots: torch.Tensor
    positions: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True)
class StepTokens:
    """Tokens of a step with prompts; everything is on the GPU, of integers.

    Args:
        positions, slot_mapping: [num_tokens]; tokens that fill up a step have slot -1.
        tiles: of the sequences to attend, see `ragged_attention.attention_tiles`.
        block_tables: [max_num_seqs, max_blocks_per_seq] int32.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    tiles: torch.Tensor
    block_tables: torch.Tensor


class CudaAttention:
    """Attention of all layers.

    Args:
        windows: one a layer; tokens that a query sees, itself included, or None for all.
        qk_norms: one pair a layer, weights [head_dim] of the norms of q and k; () without norms.
        rotation: positions [num_tokens] to rotations [num_tokens, 1, head_dim / 2] complex64.
        dtype: of q, k and v; rotations are rounded to it, as in transformers.

    Attributes:
        group: query heads of a key head.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        windows: tuple[int | None, ...],
        qk_norms: tuple[tuple[torch.Tensor, ...], ...],
        eps: float,
        rotation: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self.group = num_heads // num_kv_heads
        self._windows, self._qk_norms, self._eps = windows, qk_norms, eps
        self._rotation, self._dtype = rotation, dtype
        self._scale = head_dim**-0.5
        self._has_prompt_attention = has_prompt_attention(dtype, head_dim)

    def prepare(self, max_num_seqs: int, max_model_tokens: int) -> None:
        """Allocates what does not depend on the step; needed once, before any."""
        rotations = self._rotation(torch.arange(max_model_tokens, device="cuda")).squeeze(1)
        self._cos, self._sin = (part.to(self._dtype).float().contiguous() for part in (rotations.real, rotations.imag))
        self._workspace = DecodeWorkspace(max_num_seqs, self._num_heads, self._head_dim, "cuda")

    def prepare_prompts(self, max_tokens: int, kv_cache: KVCache) -> None:
        """Has the kernels built for long prompts of up to so many tokens, for each length that recurs."""
        if not self._has_prompt_attention:
            return
        for length in sorted({recurring_length(count) for count in range(MIN_TOKENS + 1, max_tokens + 1)}):
            q, k, v = self._new_heads(length, 0, kv_cache)
            prompt_attention(q, k, v, self._scale)

    def begin(self, step: Step, kv_cache: KVCache) -> Attend:
        """A step as the CPU's attention takes it."""
        starts, ends = np.array(step.cu_seqlens_q), np.array(step.context_lens)
        counts = np.diff(starts)
        tables = np.zeros((len(counts), max(map(len, step.block_tables))), dtype=np.int32)
        for row, blocks in zip(tables, step.block_tables, strict=True):
            row[: len(blocks)] = blocks
        tiles = attention_tiles(starts[:-1], counts, np.arange(len(counts)), ends - counts, self.group)
        tokens = StepTokens(
            step.positions,
            step.slot_mapping,
            torch.tensor(tiles, device="cuda"),
            torch.tensor(tables, device="cuda"),
        )
        is_whole_prompt = len(counts) == 1 and counts[0] == ends[0]
        return self.prompt(tokens, kv_cache) if is_whole_prompt else self.ragged(tokens, kv_cache)

    def is_long(self, num_rows: int, num_tokens: int) -> bool:
        """Whether decode tokens of which one sees this many tokens are a long step, which runs otherwise."""
        return is_long_context(num_rows * self._num_kv_heads, num_tokens)

    def decode(self, rows: DecodeRows, kv_cache: KVCache, *, is_long: bool = False) -> Attend:
        """A step of decode tokens alone; may be captured in a CUDA graph.

        Args:
            is_long: see `is_long`; any step runs either way, one of them is faster.
        """
        return lambda qkv, layer: self._decode(qkv, layer, rows, kv_cache, is_long=is_long)

    def _decode(
        self,
        qkv: torch.Tensor,
        layer: int,
        rows: DecodeRows,
        kv_cache: KVCache,
        *,
        is_long: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return decode_attention(
            qkv,
            self._cos,
            self._sin,
            kv_cache.keys[layer],
            kv_cache.values[layer],
            rows.block_tables,
            rows.slots,
            rows.positions,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            scale=self._scale,
            window=self._windows[layer],
            workspace=self._workspace,
            out=out,
            is_long=is_long,
            is_early=True,  # the embedding, a kernel without dependent launch, is behind what writes the rows
            **self._norms(layer),
        )

    def prompt(self, tokens: StepTokens, kv_cache: KVCache) -> Attend:
        """A step of one prompt from its first token on."""
        ragged, num_tokens = self.ragged(tokens, kv_cache), len(tokens.positions)
        if not self._has_prompt_attention or num_tokens <= MIN_TOKENS:
            return ragged
        length = recurring_length(num_tokens)
        out = self._new_heads(length, num_tokens, kv_cache)

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            window = self._windows[layer]
            if window is not None and window < length:
                return ragged(qkv, layer)
            q, k, v = self._rotated(qkv, tokens, kv_cache, layer, out)
            return prompt_attention(q, k, v, self._scale)[:num_tokens]

        return attend

    def ragged(self, tokens: StepTokens, kv_cache: KVCache) -> Attend:
        """A step of any tokens; may be captured in a CUDA graph."""

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            q, _, _ = self._rotated(qkv, tokens, kv_cache, layer)
            keys, values, window = kv_cache.keys[layer], kv_cache.values[layer], self._windows[layer]
            return ragged_attention(q, keys, values, tokens.block_tables, tokens.tiles, self._scale, window)

        return attend

    def mixed(self, rows: DecodeRows, tokens: StepTokens, kv_cache: KVCache) -> Attend:
        """A step of decode tokens, whose contexts may be long, and of others behind them, which alone have tiles."""
        ragged, num_decodes = self.ragged(tokens, kv_cache), len(rows.slots)

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            attended = ragged(qkv, layer)
            self._decode(qkv[:num_decodes], layer, rows, kv_cache, out=attended[:num_decodes])
            return attended

        return attend

    def _new_heads(self, length: int, first: int, kv_cache: KVCache) -> Heads:
        """q, k and v of so many tokens; from the first-th on k and v are 0: what a weight of 0 meets must be finite."""
        counts = (self._num_heads, self._num_kv_heads, self._num_kv_heads)
        q, k, v = (kv_cache.keys[0].new_empty(length, count, self._head_dim) for count in counts)
        k[first:], v[first:] = 0, 0
        return q, k, v

    def _rotated(
        self,
        qkv: torch.Tensor,
        tokens: StepTokens,
        kv_cache: KVCache,
        layer: int,
        out: Heads | None = None,
    ) -> Heads:
        """q, k and v of a step's tokens, k and v also in the cache."""
        return rotate_and_write(
            qkv,
            self._cos,
            self._sin,
            tokens.positions,
            tokens.slot_mapping,
            kv_cache.keys[layer],
            kv_cache.values[layer],
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            out=out,
            **self._norms(layer),
        )

    def _norms(self, layer: int) -> dict:
        if not self._qk_norms:
            return {}
        q_norm, k_norm = self._qk_norms[layer]
        return {"q_norm": q_norm, "k_norm": k_norm, "eps": self._eps}
