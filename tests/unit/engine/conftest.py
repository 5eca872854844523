"""A model without weights whose next token depends on every token that the cache holds.

It writes token ids as keys and reads its context back through the block tables. A wrong slot,
block or length therefore gives another token than `expected_tokens`, which needs no cache.
"""

import zlib
from array import array
from collections.abc import Callable, Iterable

import pytest
import torch

from hasten.engine.config import EngineConfig
from hasten.engine.engine import Engine
from hasten.engine.grammar import GrammarCompiler
from hasten.engine.model_runner import Collect, Model, ModelRunner
from hasten.engine.scheduler import Schedule
from hasten.kernels.kv_cache import KVCache, allocate_kv_cache
from hasten.models.batch import Batch
from hasten.request import Request, TokenEvent

VOCAB_SIZE = 50


class ContextModel:
    """The logits of a context are random numbers seeded by its hash."""

    def __init__(self) -> None:
        self.num_computed_tokens = 0
        self.num_steps = 0
        self.most_tokens = 0

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        self.num_steps += 1
        self.num_computed_tokens += len(batch.token_ids)
        self.most_tokens = max(self.most_tokens, len(batch.token_ids))
        slots = kv_cache.keys[0].view(-1)
        slots[batch.slot_mapping] = batch.token_ids
        rows = []
        for index, table in enumerate(batch.block_tables):
            start, end = batch.cu_seqlens_q[index : index + 2]
            length = batch.context_lens[index]
            assert batch.positions[start:end].tolist() == list(range(length - (end - start), length))
            assert (len(table) - 1) * kv_cache.block_size < length <= len(table) * kv_cache.block_size
            context = kv_cache.keys[0][list(table)].flatten()[:length].tolist()
            rows += [logits_of(context[: length - (end - 1 - token)]) for token in range(start, end)]
        return torch.stack(rows)[batch.logits_indices]


def logits_of(context: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(array("q", context).tobytes()))
    return torch.randn(VOCAB_SIZE, generator=generator) * 2


class OverlappingRunner(ModelRunner):
    """Gives tokens a step late, as a GPU does, and knows those that it drew before the host does."""

    is_asynchronous = True

    def __init__(self, model: Model, kv_cache: KVCache) -> None:
        super().__init__(model, kv_cache)
        self.drawn: dict[int, int] = {}

    def launch(self, schedule: Schedule) -> Collect:
        decoding = [chunk.sequence for chunk in schedule.chunks if chunk.is_decode]
        unknown = [each for each in decoding if each.num_pending_tokens == 2]
        for sequence in unknown:
            sequence.token_ids.append(self.drawn[id(sequence)])
        collect = super().launch(schedule)
        for sequence in unknown:
            sequence.token_ids.pop()
        sampling = [chunk.sequence for chunk in schedule.chunks if chunk.samples]
        self.drawn = {id(each): token.token_id for each, token in zip(sampling, collect(), strict=True)}
        return collect


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Makes an engine over a ContextModel from the fields of an EngineConfig."""

    def make(
        eos_token_ids: Iterable[int] = (),
        overlaps: bool = False,
        grammars: GrammarCompiler | None = None,
        **limits: object,
    ) -> Engine:
        config = EngineConfig(**{"num_blocks": 64, "block_size": 4, "max_model_tokens": 128, **limits})
        assert config.num_blocks is not None
        kv_cache = allocate_kv_cache(1, config.num_blocks, config.block_size, 1, 1, torch.int64, "cpu")
        kv_cache.keys[0].fill_(-1)
        runner = OverlappingRunner if overlaps else ModelRunner
        return Engine(
            runner(ContextModel(), kv_cache),
            config,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=eos_token_ids,
            grammars=grammars,
        )

    return make


@pytest.fixture
def run() -> Callable[..., dict[tuple[str, int], list[TokenEvent]]]:
    """Runs an engine to the end, checking it after every step; returns events by continuation."""

    def run(engine: Engine, requests: Iterable[Request] = ()) -> dict[tuple[str, int], list[TokenEvent]]:
        for request in requests:
            engine.add_request(request)
        events: dict[tuple[str, int], list[TokenEvent]] = {}
        while engine.has_unfinished:
            for event in engine.step():
                events.setdefault((event.request_id, event.index), []).append(event)
            engine.scheduler.check_integrity()
        assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
        return events

    return run


@pytest.fixture
def context_logits() -> Callable[[list[int]], torch.Tensor]:
    """The logits of a ContextModel after a context."""
    return logits_of


@pytest.fixture
def expected_tokens() -> Callable[[list[int], int], list[int]]:
    """The greedy continuation, computed without an engine."""

    def expected(prompt: list[int], num_tokens: int) -> list[int]:
        context = list(prompt)
        for _ in range(num_tokens):
            context.append(int(logits_of(context).argmax()))
        return context[len(prompt) :]

    return expected
