"""hasten's own engine as a runtime: paged cache, in-flight batching, prefix reuse.

All work is the engine's; here requests are handed to it, refused ones become error events,
and its memory is planned from what is free once the weights are loaded.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from hasten.engine.build import build
from hasten.engine.config import EngineConfig, resolve
from hasten.engine.engine import Engine
from hasten.engine.model_runner import ModelRunner
from hasten.engine.folder import is_engine_folder, read_engine_manifest
from hasten.errors import RequestError
from hasten.hardware import memory
from hasten.kernels.kv_cache import allocate_kv_cache
from hasten.models.load import load_decoder
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import Capabilities, OperatorSample, Runtime, RuntimeConfig
from hasten.runtimes.continuation import eos_token_ids, error_events

# Logits of this many positions are in memory at a time while scoring.
SCORE_CHUNK_TOKENS = 128


class NativeRuntime(Runtime):
    """The native engine with one model in one scheme."""

    name: ClassVar[str] = "native"
    capabilities: ClassVar[Capabilities] = Capabilities(
        schemes=("fp32", "bf16", "fp16", "w8a16", "w4a16"),
        samples=True,
        in_flight=True,
        cancels=True,
        loads_source=True,
    )

    def __init__(self, config: RuntimeConfig) -> None:
        super().__init__(config)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if is_engine_folder(config.model):
            read_engine_manifest(config.model)  # refuses a damaged folder before its weights are read
        decoder = load_decoder(config.model, config.scheme, config.device)
        self.weight_bytes_per_token = decoder.weight_bytes_per_token
        shape = decoder.config
        self._vocab_size = shape.vocab_size
        token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * decoder.dtype.itemsize
        limits = EngineConfig(
            max_num_seqs=config.max_num_seqs,
            max_model_tokens=config.max_model_tokens,
            max_num_batched_tokens=max(EngineConfig.max_num_batched_tokens, config.max_num_seqs),
        )
        limits = resolve(limits, shape.max_context_tokens, token_bytes, _free_bytes(config.device))
        assert limits.num_blocks is not None, "resolve fills it in"
        kv_cache = allocate_kv_cache(
            shape.num_layers,
            limits.num_blocks,
            limits.block_size,
            shape.num_kv_heads,
            shape.head_dim,
            decoder.dtype,
            config.device,
        )
        self._engine = Engine(
            ModelRunner(decoder, kv_cache),
            limits,
            vocab_size=shape.vocab_size,
            eos_token_ids=eos_token_ids(config.model),
        )

    @classmethod
    def prepare(cls, model: Path, scheme: str, out: Path) -> Path:
        """Writes an engine folder: weights quantized and packed once instead of at every load."""
        return build(model, scheme, out)

    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        accepted: list[Request] = []
        refused: list[tuple[Request, str]] = []
        try:
            for request in requests:
                try:
                    self._engine.add_request(request)
                    accepted.append(request)
                except RequestError as error:
                    refused.append((request, str(error)))
            yield from error_events(refused, time.perf_counter())
            while self._engine.has_unfinished:
                yield from self._engine.step()
        finally:  # the caller may have stopped listening
            for request in accepted:
                self._engine.abort(request.request_id)
            self._engine.step()  # nothing runs any more; it only takes what nobody will hear

    def score(self, token_ids: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        for sequence in token_ids:
            logprobs = np.empty((len(sequence), self._vocab_size), dtype=np.float32)
            start = 0
            for logits in self._engine.prompt_logits(sequence, SCORE_CHUNK_TOKENS):
                end = start + logits.shape[0]
                torch.log_softmax(logits, dim=-1, out=torch.from_numpy(logprobs[start:end]))
                start = end
            yield logprobs

    def trace(self, requests: Sequence[Request]) -> tuple[OperatorSample, ...]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in self.generate(requests):
                pass
        return tuple(
            OperatorSample(row.key, row.self_cpu_time_total * 1e-6, row.count)
            for row in profiler.key_averages()
            if row.self_cpu_time_total > 0
        )

    def cancel(self, request_id: str) -> None:
        self._engine.abort(request_id)


def _free_bytes(device: str) -> int:
    if device == "cpu":
        return memory()[1]
    return torch.cuda.mem_get_info(device)[0]
