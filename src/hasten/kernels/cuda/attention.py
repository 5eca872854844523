"""Attention of all layers on a GPU: what lies between the qkv product and the output projection.

Decode tokens go through `decode_attention`, which rotates, writes the cache and attends in one
kernel; tokens of prompts through `rotate_and_write` and `prefill_attention`. In a step that has
both, the decode tokens come first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from hasten.kernels.attention import Attend, Step
from hasten.kernels.cuda.decode_attention import DecodeWorkspace, decode_attention, is_long_context
from hasten.kernels.cuda.prefill_attention import (
    PrefillPlan,
    PromptPlan,
    fixed_length,
    plan_prefill,
    prefill_attention,
)
from hasten.kernels.cuda.rotary import rotate_and_write
from hasten.kernels.kv_cache import KVCache

MIN_FIXED_TOKENS = 512
"""A prompt of more tokens that has a step of its own is filled up to a length that recurs, for attention alone."""


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
class Prompts:
    """Sequences that compute several tokens each, as in `models.batch.Batch`; tensors are on the GPU."""

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cu_seqlens_q: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]


class CudaAttention:
    """Attention of all layers.

    Args:
        windows: one a layer; tokens that a query sees, itself included, or None for all.
        qk_norms: one pair a layer, weights [head_dim] of the norms of q and k; () without norms.
        rotation: positions [num_tokens] to rotations [num_tokens, 1, head_dim / 2] complex64.
        dtype: of q, k and v; rotations are rounded to it, as in transformers.
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
        self._windows, self._qk_norms, self._eps = windows, qk_norms, eps
        self._rotation, self._dtype = rotation, dtype
        self._scale = head_dim**-0.5

    def prepare(self, max_num_seqs: int, max_model_tokens: int) -> None:
        """Allocates what does not depend on the step; needed once, before any."""
        rotations = self._rotation(torch.arange(max_model_tokens, device="cuda")).squeeze(1)
        self._cos, self._sin = (part.to(self._dtype).float().contiguous() for part in (rotations.real, rotations.imag))
        self._workspace = DecodeWorkspace(max_num_seqs, self._num_heads, self._head_dim, "cuda")

    def prepare_prompts(self, max_tokens: int, kv_cache: KVCache) -> None:
        """Has the kernels built for long prompts of up to so many tokens, for each length that recurs."""
        for length in sorted({fixed_length(count) for count in range(MIN_FIXED_TOKENS + 1, max_tokens + 1)}):
            heads = (self._num_heads, self._num_kv_heads, self._num_kv_heads)
            q, k, v = (kv_cache.keys[0].new_zeros(length, count, self._head_dim) for count in heads)
            starts, bounds = torch.tensor([0, length], dtype=torch.int32, device="cuda"), (0, length)
            plan = PrefillPlan(PromptPlan(None, starts, starts, bounds, bounds, None, has_fixed_length=True), None)
            for window in {*self._windows}:
                prefill_attention(q, k, v, kv_cache.keys[0], kv_cache.values[0], plan, self._scale, window)

    def begin(self, step: Step, kv_cache: KVCache) -> Attend:
        """A step of prompts alone."""
        prompts = Prompts(step.positions, step.slot_mapping, step.cu_seqlens_q, step.context_lens, step.block_tables)
        return self.mixed(None, prompts, kv_cache)

    def is_long(self, num_rows: int, num_tokens: int) -> bool:
        """Whether decode tokens of which one sees this many tokens are a long step, which runs otherwise."""
        return is_long_context(num_rows * self._num_kv_heads, num_tokens)

    def decode(self, rows: DecodeRows, kv_cache: KVCache, *, is_long: bool = False) -> Attend:
        """A step of decode tokens alone; may be captured in a CUDA graph.

        Args:
            is_long: see `is_long`; any step runs either way, one of them is faster.
        """

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
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
                is_long=is_long,
                is_early=True,  # the embedding, a kernel without dependent launch, is behind what writes the rows
                **self._norms(layer),
            )

        return attend

    def prompt(
        self, positions: torch.Tensor, slot_mapping: torch.Tensor, cu_seqlens: torch.Tensor, kv_cache: KVCache
    ) -> Attend:
        """A step of one prompt from its first token on; may be captured in a CUDA graph.

        Args:
            positions, slot_mapping: [num_tokens] int32; tokens past the prompt's have slot -1.
            cu_seqlens: [2] int32, 0 and the prompt's length.
        """
        bounds = (0, len(positions))
        plan = PrefillPlan(PromptPlan(None, cu_seqlens, cu_seqlens, bounds, bounds, None, has_fixed_length=True), None)
        return self._prefill(positions, slot_mapping, plan, kv_cache)

    def mixed(self, rows: DecodeRows | None, prompts: Prompts, kv_cache: KVCache) -> Attend:
        """A step of decode tokens, if any, followed by tokens of prompts."""
        num_decodes = 0 if rows is None else len(rows.slots)
        plan = plan_prefill(
            prompts.cu_seqlens_q,
            prompts.context_lens,
            prompts.block_tables,
            block_size=kv_cache.block_size,
            workspace=self._workspace,
        )

        is_whole = tuple(prompts.cu_seqlens_q) == (0, *prompts.context_lens)
        if rows is None and is_whole and prompts.context_lens[0] > MIN_FIXED_TOKENS:
            return self._fixed_length(prompts, plan, kv_cache)
        prefill = self._prefill(prompts.positions, prompts.slot_mapping, plan, kv_cache)
        if rows is None:
            return prefill
        decode = self.decode(rows, kv_cache)

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            return torch.cat((decode(qkv[:num_decodes], layer), prefill(qkv[num_decodes:], layer)))

        return attend

    def _fixed_length(self, prompts: Prompts, plan: PrefillPlan, kv_cache: KVCache) -> Attend:
        """A step of one long prompt from its first token on."""
        assert plan.prompts is not None
        plan = replace(plan, prompts=replace(plan.prompts, has_fixed_length=True))
        num_tokens = len(prompts.positions)
        length, like = fixed_length(num_tokens), kv_cache.keys[0]
        heads = (self._num_heads, self._num_kv_heads, self._num_kv_heads)
        q, k, v = (like.new_empty(length, count, self._head_dim) for count in heads)
        k[num_tokens:], v[num_tokens:] = 0, 0  # what is multiplied by a weight of 0 must be finite
        attend = self._prefill(prompts.positions, prompts.slot_mapping, plan, kv_cache, (q, k, v))
        return lambda qkv, layer: attend(qkv, layer)[:num_tokens]

    def _prefill(
        self,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        plan: PrefillPlan,
        kv_cache: KVCache,
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> Attend:
        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            keys, values = kv_cache.keys[layer], kv_cache.values[layer]
            q, k, v = rotate_and_write(
                qkv,
                self._cos,
                self._sin,
                positions,
                slot_mapping,
                keys,
                values,
                num_heads=self._num_heads,
                num_kv_heads=self._num_kv_heads,
                out=out,
                **self._norms(layer),
            )
            return prefill_attention(q, k, v, keys, values, plan, self._scale, self._windows[layer])

        return attend

    def _norms(self, layer: int) -> dict:
        if not self._qk_norms:
            return {}
        q_norm, k_norm = self._qk_norms[layer]
        return {"q_norm": q_norm, "k_norm": k_norm, "eps": self._eps}
