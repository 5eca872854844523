"""Small random models and engines on the GPU, for the tests of the whole engine."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hasten.engine.config import EngineConfig
from hasten.engine.engine import Engine
from hasten.engine.runners import make_runner
from hasten.kernels.kv_cache import allocate_kv_cache
from hasten.models.decoder import Decoder
from hasten.models.load import load_decoder
from hasten.request import Request, SamplingParams, TokenEvent
from random_models import random_model

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Events = dict[tuple[str, int], list[TokenEvent]]
Tokens = dict[tuple[str, int], list[int | None]]


def write_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Writes a model with random weights, norms and biases, in bfloat16."""
    model = random_model(family, SIZES | changes, seed=len(family))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_engine(path: Path, scheme: str, device: str = "cuda", **limits: Any) -> Engine:
    return engine_of(load_decoder(path, scheme, device), **limits)


def engine_of(decoder: Decoder, **limits: Any) -> Engine:
    """An engine whose cache is full of NaN: a place that was never written must never count."""
    on_gpu = decoder.device == "cuda"
    config = EngineConfig(
        **{"num_blocks": 256, "max_model_tokens": 1024, "consecutive_blocks": not on_gpu, "max_num_seqs": 16, **limits}
    )
    shape = decoder.config
    assert config.num_blocks is not None
    kv_cache = allocate_kv_cache(
        shape.num_layers,
        config.num_blocks,
        config.block_size,
        shape.num_kv_heads,
        shape.head_dim,
        decoder.dtype,
        decoder.device,
    )
    for tensor in (*kv_cache.keys, *kv_cache.values):
        tensor.fill_(torch.nan)
    return Engine(make_runner(decoder, kv_cache, config), config, vocab_size=shape.vocab_size, eos_token_ids=(2,))


def run(engine: Engine, requests: Iterable[Request]) -> Events:
    """All events of requests that are handed over together; nothing may be left behind."""
    for request in requests:
        engine.add_request(request)
    events: Events = {}
    while engine.has_unfinished:
        for event in engine.step():
            events.setdefault((event.request_id, event.index), []).append(event)
    check_all_free(engine)
    return events


def tokens_of(events: Events) -> Tokens:
    for key, some in events.items():
        assert [event.error for event in some if event.error] == [], key
        assert [event.finish_reason is not None for event in some] == [False] * (len(some) - 1) + [True], key
    return {key: [event.token_id for event in some] for key, some in events.items()}


def check_all_free(engine: Engine) -> None:
    engine.scheduler.check_integrity()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting


def prompt(length: int, seed: int = 0, vocab_size: int = 500) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(4, min(vocab_size, 500), (length,), generator=generator).tolist())


def greedy(name: str, length: int, max_tokens: int = 32, **sampling: Any) -> Request:
    sampling = {"max_tokens": max_tokens, "ignore_eos": True} | sampling
    return Request(name, prompt(length, sum(map(ord, name))), SamplingParams(**sampling))
