"""Text in and text out over one engine, for every protocol alike.

A request is checked against the model's limits and the queue's, submitted, and its tokens are turned
into pieces of text. Every request that was admitted ends in a piece with a finish_reason for each of
its continuations, or in one error; whoever stops reading ends it, and its blocks are free at once.

The engine never waits for a reader. What a slow one has not taken is kept as the engine's events, at
most max_model_tokens for each continuation, and comes in one long piece.

Not here: HTTP, gRPC and their forms of requests and errors.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from hasten.errors import (
    DrainingError,
    EngineUnavailableError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    RuntimeFailedError,
)
from hasten.request import Request, SamplingParams, TokenEvent
from hasten.serve.engine_client import EngineClient
from hasten.serve.pieces import ContinuationText, Echo, Piece
from hasten.serve.prometheus import FINISHED_REASONS, ServeMetrics
from hasten.serve.tokenizer import ServeTokenizer

MAX_RETRY_AFTER_S = 60

# of the mean time that requests take, the newest one's share
NEWEST_SHARE = 0.1


@dataclass(frozen=True)
class ServiceLimits:
    """What a server takes on.

    Args:
        max_queue: most sequences that wait while max_num_seqs others run.
        request_timeout_s: longest time from a request's arrival to its last token.
    """

    max_queue: int = 1024
    request_timeout_s: float = 600.0


class Work(Protocol):
    """What is told of a request, whatever it asked for.

    Attributes:
        num_prompt_tokens, num_tokens: taken, and generated so far.
        first_token_s: from arrival to the first token; None before it.
        finish_reason: how it ended; None before.
    """

    num_prompt_tokens: int
    first_token_s: float | None
    finish_reason: str | None

    @property
    def num_tokens(self) -> int: ...


class Service:
    """One model behind one engine client.

    Attributes:
        model_name: the name that clients use.
        start_time_s: seconds since the epoch.
        idle: set while no request runs or waits.
        num_sequences: continuations and inputs of the requests that were taken and have not ended.
    """

    def __init__(
        self, client: EngineClient, tokenizer: ServeTokenizer, model_name: str, limits: ServiceLimits | None = None
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.start_time_s = time.time()
        self.metrics = ServeMetrics(model_name, client)
        self.idle = asyncio.Event()
        self.idle.set()
        self.num_sequences = 0
        self._limits = limits or ServiceLimits()
        self._is_draining = False
        self._mean_request_s = 1.0

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now, if the queue has room."""
        return self.client.is_ready and not self._is_draining

    def drain(self) -> None:
        """Takes no new requests from now on; `idle` tells when those that were taken have ended."""
        self._is_draining = True

    def check_ready(self) -> None:
        """Raises DrainingError or EngineUnavailableError if no request would be taken now."""
        if self._is_draining:
            raise DrainingError("the server is shutting down: send the request to another one")
        if not self.client.is_ready:
            reason = self.client.failure or "the model is being loaded: try again when /ready says 200"
            raise EngineUnavailableError(str(reason))

    def lost_engine_error(self) -> EngineUnavailableError:
        """What a request is told that the engine cannot end any more."""
        if self._is_draining:
            return EngineUnavailableError("the server shut down before this request was done: try again")
        return EngineUnavailableError("the engine process ended while it ran this request: try again")

    @property
    def max_model_tokens(self) -> int:
        """Most tokens of one request, prompt and output together."""
        facts = self.client.facts
        cache_tokens = facts.num_kv_blocks * facts.block_size
        return min(facts.max_model_tokens, cache_tokens) if cache_tokens else facts.max_model_tokens

    def output_room(self, prompt_token_ids: Sequence[int]) -> int:
        """Most tokens that can follow a prompt.

        Raises:
            RequestError: none, or the prompt is empty or not of this model's vocabulary.
        """
        if not prompt_token_ids:
            raise RequestError("the prompt is empty")
        room = self.max_model_tokens - len(prompt_token_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens and prompt and output together at most "
                f"{self.max_model_tokens}: shorten the prompt"
            )
        self.check_vocabulary(prompt_token_ids)
        return room

    def check_vocabulary(self, token_ids: Sequence[int], field: str = "") -> None:
        """Raises RequestError if a token of a request's field is outside the model's vocabulary."""
        vocab_size = self.client.facts.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise RequestError(f"{field and f'{field}: '}token ids must be between 0 and {vocab_size - 1}")

    async def open(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        echo: str | None = None,
    ) -> "Generation":
        """Admits a request; it runs once the generation is read.

        Args:
            prompt: text, or its token ids.
            priority: lower goes first where requests wait.
            timeout_s: shorter than the server's own limit.
            echo: the prompt's text, if it goes before each continuation.

        Raises:
            RequestError: the prompt, or how much is to follow it, is beyond the model's limits.
            QueueFullError: as many sequences wait as may.
            DrainingError, EngineUnavailableError: no request is taken now.
        """
        arrival_s = time.perf_counter()
        self.check_ready()
        token_ids = await self.tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        room = self.output_room(token_ids)
        if sampling.max_tokens > room:
            raise RequestError(
                f"max_tokens is {sampling.max_tokens}, the prompt has {len(token_ids)} tokens, and both together "
                f"must be at most {self.max_model_tokens}: lower max_tokens to {room} or shorten the prompt"
            )
        self.admit(sampling.n)
        request = Request(uuid.uuid4().hex, token_ids, sampling, priority)
        limit_s = min(timeout_s or math.inf, self.request_timeout_s)
        return Generation(self, request, arrival_s, limit_s, None if echo is None else Echo(echo, token_ids))

    def check_places(self, num_sequences: int) -> None:
        """Raises RequestError if so many sequences could never run or wait together."""
        if num_sequences > self._num_places:
            raise RequestError(
                f"the request has {num_sequences} sequences, and the server holds at most {self._num_places}"
            )

    @property
    def request_timeout_s(self) -> float:
        """Longest time from a request's arrival to its end."""
        return self._limits.request_timeout_s

    @property
    def _num_places(self) -> int:
        return self.client.facts.max_num_seqs + self._limits.max_queue

    def admit(self, num_sequences: int) -> None:
        """Gives a request its places, which `release` gives back. Raises RequestError and QueueFullError."""
        self.check_places(num_sequences)
        places = self._num_places
        if self.num_sequences + num_sequences > places:
            retry_after_s = min(max(1, math.ceil(self._mean_request_s)), MAX_RETRY_AFTER_S)
            raise QueueFullError(
                f"{self.num_sequences} sequences run or wait, and at most {places} may: try again in {retry_after_s} s",
                retry_after_s,
            )
        self.num_sequences += num_sequences
        self.idle.clear()

    def release(self, num_sequences: int, request_s: float) -> None:
        """A request says that it has ended, after this time."""
        self._mean_request_s += NEWEST_SHARE * (request_s - self._mean_request_s)
        self.num_sequences -= num_sequences
        if self.num_sequences == 0:
            self.idle.set()


class Generation:
    """One admitted request. Iterate over it once, in one task, and close it however that ended.

    Each item has at most one piece for each continuation. Iterating raises EngineUnavailableError if the
    engine process ended, RuntimeFailedError if the engine gave up the request, RequestError if its grammar
    is no good, and RequestTimeoutError.

    Attributes:
        first_token_s: from arrival to the first token; None before it.
        num_cached_tokens: of the prompt, which the engine's prefix cache had; None before the first token.
        finish_reason: how the continuation that ended last ended; None before.
    """

    def __init__(
        self, service: Service, request: Request, arrival_s: float, timeout_s: float, echo: Echo | None = None
    ) -> None:
        self.request_id = request.request_id
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.first_token_s: float | None = None
        self.num_cached_tokens: int | None = None
        self.finish_reason: str | None = None
        self._service = service
        self._metrics = service.metrics
        self._request = request
        self._arrival_s = arrival_s
        self._timeout_s = timeout_s
        self._is_closed = False
        self._texts = [
            ContinuationText(index, request.sampling, service.tokenizer.detokenizer(), echo)
            for index in range(request.sampling.n)
        ]
        self._num_unfinished = request.sampling.n
        self._pieces = self._read()

    @property
    def num_tokens(self) -> int:
        """Generated so far, all continuations together."""
        return sum(text.num_tokens for text in self._texts)

    def __aiter__(self) -> AsyncIterator[Sequence[Piece]]:
        return self._pieces

    async def aclose(self) -> None:
        """Ends the request if it still runs, and gives its place to another."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await self._pieces.aclose()
        finally:
            request_s = time.perf_counter() - self._arrival_s
            self._service.release(self._request.sampling.n, request_s)
            if self._num_unfinished:
                self.finish_reason = self.finish_reason or "cancelled"
                self._metrics.finished[FINISHED_REASONS[self.finish_reason]] += self._num_unfinished
            else:
                self._metrics.e2e_latency_s.observe(request_s)
            self._metrics.request_prompt_tokens.observe(self.num_prompt_tokens)
            self._metrics.request_generation_tokens.observe(self.num_tokens)

    async def _read(self) -> AsyncGenerator[Sequence[Piece], None]:
        deadline = _Deadline(self._arrival_s + self._timeout_s - time.perf_counter())
        try:
            async with aclosing(self._service.client.stream(self._request)) as stream:
                deadline.is_waiting = True
                async for events in stream:
                    deadline.is_waiting = False
                    for event in events:
                        self._take(event)
                    if pieces := [piece for text in self._texts if (piece := text.take()) is not None]:
                        yield pieces
                    if not self._num_unfinished:
                        return
                    deadline.check()
                    deadline.is_waiting = True
        except asyncio.CancelledError:
            deadline.check()
            raise
        finally:
            deadline.close()

    def _take(self, event: TokenEvent) -> None:
        text = self._texts[event.index]
        if text.finish_reason is not None:
            return  # it met a stop string while other continuations went on
        if event.finish_reason in ("error", "cancelled"):
            self.finish_reason = event.finish_reason
            if not self._service.client.is_ready:
                raise self._service.lost_engine_error()
            reason = event.error or "the engine ended this request"
            is_clients_fault = self._request.sampling.grammar is not None  # only the engine can tell whether it is good
            raise RequestError(reason) if is_clients_fault else RuntimeFailedError(reason)
        if event.prompt_logprobs is not None:
            text.add(event)
            return
        if text.num_tokens:
            self._metrics.inter_token_latency_s.observe(event.time_s - text.last_token_s)
        elif self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self._arrival_s
            self.num_cached_tokens = event.num_cached_tokens
            self._metrics.time_to_first_token_s.observe(self.first_token_s)
            if event.started_s is not None:
                self._metrics.queue_time_s.observe(event.started_s - self._arrival_s)
        text.add(event)
        if text.finish_reason is not None:
            self._num_unfinished -= 1
            self.finish_reason = text.finish_reason
            self._metrics.finished[FINISHED_REASONS[text.finish_reason]] += 1


class _Deadline:
    """Interrupts the current task's wait for the engine when the time is up, and nothing else that it does.

    `asyncio.timeout` would also interrupt whoever reads the generator, between two of its items.
    """

    def __init__(self, timeout_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.is_waiting = False
        self._task = task
        self._is_over = False
        self._timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), self._expire)

    def check(self) -> None:
        """Raises RequestTimeoutError if the time is up; the cancellation that it caused is then undone."""
        if not self._is_over:
            return
        if self.is_waiting and self._task.uncancel() > 0:
            return  # somebody else cancels the task as well
        raise RequestTimeoutError("the request took longer than the server's limit: ask for fewer tokens, or try again")

    def close(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self._is_over = True
        if self.is_waiting:
            self._task.cancel()
