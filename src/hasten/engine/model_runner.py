"""Turns a schedule into tensors, runs the model, and hands the logits to the sampler.

Not here: any decision about what runs; `scheduler` has allocated every block that a step
writes to.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Protocol

import torch

from hasten.engine.block_manager import BlockTable
from hasten.engine.sampler import SampledToken, sample
from hasten.engine.scheduler import Schedule
from hasten.kernels.kv_cache import KVCache
from hasten.kernels.phase import phase
from hasten.models.batch import Batch

Collect = Callable[[], list[SampledToken]]
"""Waits for a step; gives a token for each chunk that samples, in their order."""

OnCaptured = Callable[[int, int], object]
"""Told how many steps are captured as graphs, of how many."""


class Runner(Protocol):
    """Computes steps, in the order in which they are launched.

    Attributes:
        is_asynchronous: whether `launch` returns before the step is computed. Then the next
            step is scheduled and launched before the tokens of this one are waited for.
    """

    is_asynchronous: bool

    def prepare(self, on_captured: OnCaptured | None = None) -> None:
        """Does now what the first steps would otherwise have to wait for."""

    def launch(self, schedule: Schedule) -> Collect:
        """Starts a step."""

    def prompt_logits(self, token_ids: Items[int], table: BlockTable, chunk_tokens: int) -> Iterator[torch.Tensor]:
        """Logits of all positions of one prompt, computed in chunks.

        Args:
            table: holds blocks for all the tokens; they are written.
            chunk_tokens: most tokens of a chunk; its logits are all that is in memory at a time.

        Returns:
            [at most chunk_tokens, vocab_size] float32 for each chunk, in order.
        """


class Model(Protocol):
    """What the engine needs of a model: models.decoder.Decoder has it."""

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Logits, [num_logits, vocab_size] float32, of the tokens batch.logits_indices."""


class ModelRunner:
    """Runs steps of one model on one cache, one at a time.

    Args:
        device: where the cache and the model are.
    """

    is_asynchronous = False

    def __init__(self, model: Model, kv_cache: KVCache, device: str = "cpu") -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.block_size
        self._device = device

    def prepare(self, on_captured: OnCaptured | None = None) -> None:
        """See Runner; nothing to do."""

    def launch(self, schedule: Schedule) -> Collect:
        """Computes a step."""
        is_decode = all(chunk.is_decode for chunk in schedule.chunks)
        with torch.inference_mode(), phase("decode" if is_decode else "prefill", on_gpu=False):
            logits = self._model.forward(self.build_batch(schedule), self._kv_cache)  # [num_logits, vocab_size]
            with phase("sampling", on_gpu=False):
                tokens = sample(logits, [chunk.sequence for chunk in schedule.chunks if chunk.samples])
        return lambda: tokens

    def build_batch(self, schedule: Schedule) -> Batch:
        """The tensors of a step."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        cu_seqlens_q = [0]
        context_lens: list[int] = []
        block_tables: list[tuple[int, ...]] = []
        logits_indices: list[int] = []
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            start, end = chunk.start, chunk.start + chunk.num_tokens
            block_ids = sequence.table.block_ids
            token_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            slots += self._slots(block_ids, start, end)
            cu_seqlens_q.append(len(token_ids))
            context_lens.append(end)
            block_tables.append(tuple(block_ids[: -(-end // self._block_size)]))
            if chunk.samples:
                logits_indices.append(len(token_ids) - 1)
        return Batch(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slots),
            cu_seqlens_q=tuple(cu_seqlens_q),
            context_lens=tuple(context_lens),
            block_tables=tuple(block_tables),
            logits_indices=self._tensor(logits_indices),
        )

    @torch.inference_mode()
    def prompt_logits(self, token_ids: Items[int], table: BlockTable, chunk_tokens: int) -> Iterator[torch.Tensor]:
        """See Runner."""
        for start in range(0, len(token_ids), chunk_tokens):
            end = min(start + chunk_tokens, len(token_ids))
            batch = Batch(
                token_ids=self._tensor(list(token_ids[start:end])),
                positions=torch.arange(start, end, device=self._device),
                slot_mapping=self._tensor(self._slots(table.block_ids, start, end)),
                cu_seqlens_q=(0, end - start),
                context_lens=(end,),
                block_tables=(tuple(table.block_ids[: -(-end // self._block_size)]),),
                logits_indices=torch.arange(end - start, device=self._device),
            )
            yield self._model.forward(batch, self._kv_cache)

    def _slots(self, block_ids: list[int], start: int, end: int) -> list[int]:
        size = self._block_size
        return [block_ids[position // size] * size + position % size for position in range(start, end)]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
