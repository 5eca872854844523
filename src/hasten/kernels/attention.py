"""Attention over the paged KV cache, for a step that mixes prefill chunks and decode tokens.

Everything that depends on the step but not on the layer (which slots a sequence reads, its
mask) is worked out once in an AttentionPlan. Grouped queries are handed to SDPA as rows or
heads that share a key head, so keys and values are never repeated in memory; a sequence whose
blocks are consecutive is read in place.

`paged_attention` reads the cache; `CpuAttention` is all that stands between the qkv product and
the output projection: norms of q and k, rotary positions, the cache, attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hasten.kernels.kv_cache import KVCache
from hasten.kernels.rms_norm import RMSNorm
from hasten.kernels.rotary import Heads

Attend = Callable[[torch.Tensor, int], torch.Tensor]
"""One step's attention: qkv [num_tokens, (heads + 2 * kv_heads) * dim] and the layer's index give
[num_tokens, heads * dim]. Rotates q and k, and writes keys and values into the cache."""

_flash = torch._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class SequencePlan:
    """What one sequence of the step reads.

    Args:
        num_queries: its tokens in the step, the last ones that it has.
        view: size, stride and offset by which its keys (and values) are seen in the cache as
            [kv_heads, 1, num_keys, dim], if its blocks are consecutive.
        slots: the slots that are read, [num_keys] int64, if they are not.
        mask: [num_queries, num_keys], 0 or -inf, where causality alone does not say it.
    """

    num_queries: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None
    slots: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """What a step reads, for all layers that have the same window."""

    sequences: tuple[SequencePlan, ...]
    query_lens: tuple[int, ...]


def plan_attention(
    cu_seqlens_q: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    *,
    rows: torch.Tensor,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> AttentionPlan:
    """Plans a step; the arguments are those of `models.batch.Batch`.

    Args:
        rows: one layer's keys by slot, [num_slots, kv_heads, dim]; all layers' lie in memory as they do.
        window: tokens that a query sees, itself included; None for all.
        dtype: of the queries.
    """
    _, num_kv_heads, dim = rows.shape
    slot_stride, head_stride, _ = rows.stride()
    sequences = []
    for index, context_len in enumerate(context_lens):
        num_queries = cu_seqlens_q[index + 1] - cu_seqlens_q[index]
        first_key = 0 if window is None else max(0, context_len - num_queries - window + 1)
        num_keys = context_len - first_key
        first_slot, slots = _slots(block_tables[index], first_key, context_len, block_size)
        view = mask = None
        if first_slot is not None:
            strides = (head_stride, 0, slot_stride, 1)
            view = (num_kv_heads, 1, num_keys, dim), strides, first_slot * slot_stride
        is_plain_causal = num_keys == num_queries and (window is None or num_keys <= window)
        if num_queries > 1 and not is_plain_causal:
            mask = _mask(num_queries, num_keys, window, dtype)
        sequences.append(SequencePlan(num_queries, view, slots, mask))
    return AttentionPlan(tuple(sequences), tuple(sequence.num_queries for sequence in sequences))


def _slots(
    blocks: Sequence[int], first_key: int, context_len: int, block_size: int
) -> tuple[int | None, torch.Tensor | None]:
    first_block, last_block = first_key // block_size, (context_len - 1) // block_size
    used = tuple(blocks[first_block : last_block + 1])
    offset = first_key - first_block * block_size
    if used == tuple(range(used[0], used[0] + len(used))):
        return used[0] * block_size + offset, None
    slots = (torch.tensor(used).unsqueeze(1) * block_size + torch.arange(block_size)).flatten()
    return None, slots[offset : offset + context_len - first_key]


def _mask(num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    query = torch.arange(num_keys - num_queries, num_keys).unsqueeze(1)
    key = torch.arange(num_keys).unsqueeze(0)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(hidden, float("-inf"))


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of one sequence in float32, softmax written out.

    Args:
        q: [num_queries, heads, dim], the last tokens of the sequence.
        k, v: [num_keys, kv_heads, dim], all of its tokens.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (each.float().repeat_interleave(group, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    scores = scores + _mask(q.shape[0], k.shape[0], window, torch.float32)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)


def paged_attention(
    q: torch.Tensor, key_rows: torch.Tensor, value_rows: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Attention of all sequences of a step.

    Args:
        q: [num_tokens, kv_heads, group, dim].
        key_rows, value_rows: one layer's cache by slot, [num_slots, kv_heads, dim].

    Returns:
        [num_tokens, heads * dim].
    """
    if plan.query_lens == (1,):  # one sequence decodes: what Python does between operators counts here
        return _decode(q, key_rows, value_rows, plan.sequences[0], scale)
    outputs = [
        _decode(queries, key_rows, value_rows, sequence, scale)
        if sequence.num_queries == 1
        else _prefill(queries, key_rows, value_rows, sequence, scale)
        for queries, sequence in zip(q.split_with_sizes(plan.query_lens), plan.sequences, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _read(key_rows: torch.Tensor, value_rows: torch.Tensor, plan: SequencePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence's keys and values, [kv_heads, 1, num_keys, dim] each: views where blocks are consecutive."""
    if plan.view is not None:
        return key_rows.as_strided(*plan.view), value_rows.as_strided(*plan.view)
    assert plan.slots is not None
    k, v = (rows.transpose(0, 1).index_select(1, plan.slots).unsqueeze(1) for rows in (key_rows, value_rows))
    return k, v


def _decode(
    q: torch.Tensor, key_rows: torch.Tensor, value_rows: torch.Tensor, plan: SequencePlan, scale: float
) -> torch.Tensor:
    """One token, [1, kv_heads, group, dim]: a group's queries are rows of the product with its key head."""
    k, v = _read(key_rows, value_rows, plan)
    return _flash(q.transpose(0, 1), k, v, 0.0, False, scale=scale)[0].view(1, -1)


def _prefill(
    q: torch.Tensor, key_rows: torch.Tensor, value_rows: torch.Tensor, plan: SequencePlan, scale: float
) -> torch.Tensor:
    """Several tokens, [num_queries, kv_heads, group, dim]: a group's queries are heads that share a key head."""
    shared = (-1, q.shape[2], -1, -1)
    k, v = (each.expand(shared) for each in _read(key_rows, value_rows, plan))
    attended = _flash(q.permute(1, 2, 0, 3), k, v, 0.0, plan.mask is None, attn_mask=plan.mask, scale=scale)[0]
    return attended.permute(2, 0, 1, 3).reshape(plan.num_queries, -1)


class Step(Protocol):
    """What attention reads of a `models.batch.Batch`."""

    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def slot_mapping(self) -> torch.Tensor: ...
    @property
    def cu_seqlens_q(self) -> Sequence[int]: ...
    @property
    def context_lens(self) -> Sequence[int]: ...
    @property
    def block_tables(self) -> Sequence[Sequence[int]]: ...


class CpuAttention:
    """Attention of all layers.

    Args:
        windows: one a layer; tokens that a query sees, itself included, or None for all.
        qk_norms: one a layer; over q's and k's heads together.
        rotation: positions [num_tokens] to rotations [num_tokens, 1, head_dim / 2] complex64.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        windows: tuple[int | None, ...],
        qk_norms: tuple[RMSNorm | None, ...],
        rotation: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._windows, self._qk_norms, self._rotation, self._dtype = windows, qk_norms, rotation, dtype
        self._scale = head_dim**-0.5

    def begin(self, step: Step, kv_cache: KVCache) -> Attend:
        """Plans a step."""
        rotations = self._rotation(step.positions)
        plans = {
            window: plan_attention(
                step.cu_seqlens_q,
                step.context_lens,
                step.block_tables,
                rows=kv_cache.key_rows[0],
                block_size=kv_cache.block_size,
                window=window,
                dtype=self._dtype,
            )
            for window in set(self._windows)
        }
        slots, key_rows, value_rows = step.slot_mapping, kv_cache.key_rows, kv_cache.value_rows
        heads = Heads(slots.shape[0], self._num_heads, self._num_kv_heads, self._head_dim, self._dtype)

        def attend(qkv: torch.Tensor, layer: int) -> torch.Tensor:
            heads.rotate(qkv, rotations, self._qk_norms[layer])
            keys = key_rows[layer].index_copy_(0, slots, heads.k)
            values = value_rows[layer].index_copy_(0, slots, heads.v)
            return paged_attention(heads.q, keys, values, plans[self._windows[layer]], self._scale)

        return attend
