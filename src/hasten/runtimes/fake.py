"""A runtime without a model: the next token is a fixed function of the last one.

It ships because everything above a runtime can be tried and tested with it, without weights and
without waiting. It does not sample; its speed and quality mean nothing.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from hasten.config import SCHEMES
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import Capabilities, OperatorSample, Runtime, RuntimeConfig
from hasten.runtimes.continuation import ModelLimits, admit, eos_token_ids, error_events

NEXT_TOKEN_LOGIT = 8.0


class FakeRuntime(Runtime):
    """Token t is followed by (31 t + 7) mod vocab_size; the folder needs no more than a config.json."""

    name: ClassVar[str] = "fake"
    capabilities: ClassVar[Capabilities] = Capabilities(
        schemes=tuple(SCHEMES), samples=False, in_flight=True, cancels=True, loads_source=True
    )

    def __init__(self, config: RuntimeConfig) -> None:
        super().__init__(config)
        path = config.model / "config.json"
        model = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._limits = ModelLimits(
            vocab_size=model.get("vocab_size", 256),
            max_model_tokens=config.max_model_tokens,
            eos_token_ids=eos_token_ids(config.model),
            samples=False,
        )
        self._cancelled: set[str] = set()

    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        self._cancelled.clear()
        running, refused = admit(requests, self._limits)
        yield from error_events(refused, time.perf_counter())
        while running:
            for continuation in running:
                if continuation.request.request_id in self._cancelled:
                    yield continuation.cancel(time.perf_counter())
                    continue
                last = (continuation.token_ids or continuation.request.prompt_token_ids)[-1]
                yield continuation.accept(self._next_token(last), time.perf_counter())
            running = [each for each in running if each.finish_reason is None]

    def score(self, token_ids: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        log_sum = np.log(np.exp(NEXT_TOKEN_LOGIT) + self._limits.vocab_size - 1)
        for sequence in token_ids:
            logprobs = np.full((len(sequence), self._limits.vocab_size), -log_sum, dtype=np.float32)
            logprobs[np.arange(len(sequence)), [self._next_token(token) for token in sequence]] += NEXT_TOKEN_LOGIT
            yield logprobs

    def trace(self, requests: Sequence[Request]) -> tuple[OperatorSample, ...]:
        start_s = time.perf_counter()
        calls = sum(event.token_id is not None for event in self.generate(requests))
        return (OperatorSample("fake::next_token", time.perf_counter() - start_s, calls),)

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def _next_token(self, token_id: int) -> int:
        return (31 * token_id + 7) % self._limits.vocab_size
