"""A runtime without a model: the next token is a fixed function of the last one.

It ships because everything above a runtime can be tried and tested with it, without weights and
without waiting. It does not sample; its speed and quality mean nothing.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from hasten.config import SCHEMES
from hasten.errors import RequestError
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import (
    Capabilities,
    EngineFacts,
    EngineStats,
    InFlightRuntime,
    OnLoading,
    OperatorSample,
    RuntimeConfig,
)
from hasten.runtimes.continuation import Continuation, ModelLimits, eos_token_ids, refusal

NEXT_TOKEN_LOGIT = 8.0


class FakeRuntime(InFlightRuntime):
    """Token t is followed by (31 t + 7) mod vocab_size; the folder needs no more than a config.json."""

    name: ClassVar[str] = "fake"
    capabilities: ClassVar[Capabilities] = Capabilities(
        schemes=tuple(SCHEMES), samples=False, in_flight=True, cancels=True, loads_source=True
    )

    def __init__(self, config: RuntimeConfig, on_loading: OnLoading | None = None) -> None:
        super().__init__(config)
        path = config.model / "config.json"
        model = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._limits = ModelLimits(
            vocab_size=model.get("vocab_size", 256),
            max_model_tokens=config.max_model_tokens,
            eos_token_ids=eos_token_ids(config.model),
            samples=False,
        )
        self.facts = EngineFacts(
            model=config.model.name,
            runtime=self.name,
            scheme=config.scheme,
            device=config.device,
            vocab_size=self._limits.vocab_size,
            max_model_tokens=config.max_model_tokens,
            max_num_seqs=config.max_num_seqs,
            num_kv_blocks=0,
            block_size=0,
            eos_token_ids=tuple(sorted(self._limits.eos_token_ids)),
        )
        self._continuations: list[Continuation] = []  # the first max_num_seqs run
        self._cancelled: list[TokenEvent] = []
        self._totals = EngineStats()

    @property
    def has_unfinished(self) -> bool:
        return bool(self._continuations or self._cancelled)

    def submit(self, request: Request) -> None:
        reason = refusal(request, self._limits)
        if any(each.request.request_id == request.request_id for each in self._continuations):
            reason = f"request {request.request_id}: a request with this id is running; give each its own id"
        if reason is not None:
            raise RequestError(reason)
        self._continuations += [Continuation(request, index, self._limits) for index in range(request.sampling.n)]
        num_prompt_tokens = self._totals.num_prompt_tokens + len(request.prompt_token_ids)
        self._totals = replace(self._totals, num_prompt_tokens=num_prompt_tokens)

    def step(self) -> list[TokenEvent]:
        events, self._cancelled = self._cancelled, []
        running = self._continuations[: self.config.max_num_seqs]
        for continuation in running:
            last = (continuation.token_ids or continuation.request.prompt_token_ids)[-1]
            events.append(continuation.accept(self._next_token(last), time.perf_counter()))
        self._continuations = [each for each in self._continuations if each.finish_reason is None]
        self._totals = replace(
            self._totals,
            num_generated_tokens=self._totals.num_generated_tokens + len(running),
            num_steps=self._totals.num_steps + bool(running),
        )
        return events

    def stats(self) -> EngineStats:
        num_running = min(len(self._continuations), self.config.max_num_seqs)
        return replace(self._totals, num_running=num_running, num_waiting=len(self._continuations) - num_running)

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
        cancelled = [each for each in self._continuations if each.request.request_id == request_id]
        self._cancelled += [each.cancel(time.perf_counter()) for each in cancelled]
        self._continuations = [each for each in self._continuations if each.finish_reason is None]

    def _next_token(self, token_id: int) -> int:
        return (31 * token_id + 7) % self._limits.vocab_size
