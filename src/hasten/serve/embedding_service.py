"""Vectors out of texts over one engine, for every protocol alike: the counterpart of `service.Generation`.

Not here: HTTP, and what a request and an answer look like.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence

import numpy as np

from hasten.errors import EngineUnavailableError, RequestError, RequestTimeoutError, RuntimeFailedError
from hasten.request import EmbeddingEvent, EmbeddingRequest
from hasten.serve.prometheus import FINISHED_REASONS
from hasten.serve.service import Service


class Embedding:
    """One request for vectors, made by `of`. Call `vectors` once.

    Attributes:
        num_tokens, first_token_s: 0 and None, since nothing is generated.
        finish_reason: how it ended; None before.
    """

    num_tokens = 0
    first_token_s: float | None = None

    def __init__(self, service: Service, inputs: Sequence[Sequence[int]], arrival_s: float) -> None:
        self.num_prompt_tokens = sum(map(len, inputs))
        self.finish_reason: str | None = None
        self._service = service
        self._arrival_s = arrival_s
        self._request = EmbeddingRequest(uuid.uuid4().hex, tuple(map(tuple, inputs)))

    @classmethod
    async def of(cls, service: Service, inputs: Sequence[str | Sequence[int]]) -> "Embedding":
        """Tokenizes and checks inputs.

        Args:
            inputs: all texts, or all token ids, which are taken as they are.

        Raises:
            RequestError: an input is empty, too long, or not of this model's vocabulary.
        """
        arrival_s = time.perf_counter()
        service.check_places(len(inputs))
        texts = [each for each in inputs if isinstance(each, str)]
        token_ids = await service.tokenizer.encode_all(texts)
        token_ids += [tuple(each) for each in inputs if not isinstance(each, str)]
        limit = service.max_model_tokens
        for number, each in enumerate(token_ids):
            if not each:
                raise RequestError(f"input {number} has no token")
            if len(each) > limit:
                raise RequestError(
                    f"input {number} has {len(each)} tokens, and the model takes at most {limit}: shorten it, or cut "
                    "it into several inputs"
                )
            service.check_vocabulary(each)
        return cls(service, token_ids, arrival_s)

    async def vectors(self) -> np.ndarray:
        """The inputs' vectors, float32 [number of inputs, size].

        Raises:
            QueueFullError: as many inputs wait as may.
            DrainingError, EngineUnavailableError: no request is taken now, or the engine process ended.
            RuntimeFailedError: the engine gave up the request.
            RequestTimeoutError: it took too long.
        """
        service, num_inputs = self._service, len(self._request.inputs)
        service.check_ready()
        service.admit(num_inputs)
        self.finish_reason = "cancelled"
        try:
            event = await self._run()
            self.finish_reason = "stop"
        except (EngineUnavailableError, RuntimeFailedError):
            self.finish_reason = "error"
            raise
        finally:
            service.release(num_inputs, time.perf_counter() - self._arrival_s)
            service.metrics.finished[FINISHED_REASONS[self.finish_reason]] += num_inputs
            service.metrics.request_prompt_tokens.observe(self.num_prompt_tokens)
        service.metrics.e2e_latency_s.observe(event.time_s - self._arrival_s)
        if event.started_s is not None:
            service.metrics.queue_time_s.observe(event.started_s - self._arrival_s)
        return np.frombuffer(event.vectors, dtype=np.float32).reshape(num_inputs, -1)

    async def _run(self) -> EmbeddingEvent:
        client = self._service.client
        try:
            async with asyncio.timeout(self._service.request_timeout_s):
                event = await client.embed(self._request)
        except TimeoutError as error:
            raise RequestTimeoutError(
                "the request took longer than the server's limit: send fewer inputs, or try again"
            ) from error
        if event.error is None:
            return event
        if not client.is_ready:
            raise self._service.lost_engine_error()
        raise RuntimeFailedError(event.error)
