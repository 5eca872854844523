"""An engine client without an encoder: made-up vectors, with the faults that a test asks for."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
from fake_engine import TOKENIZER, facts

from hasten.errors import EngineUnavailableError
from hasten.request import EmbeddingEvent, EmbeddingRequest
from hasten.runtimes.base import EmbeddingFacts, EngineStats
from hasten.serve.service import Service, ServiceLimits
from hasten.serve.tokenizer import ServeTokenizer

SIZE = 4


class FakeEncoderClient:
    """Gives each input the vector (number of tokens, first token, 0, 0)."""

    stats = EngineStats()

    def __init__(
        self, *, error: str | None = None, dies: bool = False, max_model_tokens: int = 256, **embedding: Any
    ) -> None:
        values = {"size": SIZE, "pooling": ("mean",), "is_normalized": False, "matryoshka_sizes": None} | embedding
        self.facts = replace(facts(2, max_model_tokens), embedding=EmbeddingFacts(**values))
        self.is_ready = True
        self.failure = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = 0
        self._error, self._dies = error, dies

    async def embed(self, request: EmbeddingRequest) -> EmbeddingEvent:
        if not self.is_ready:
            raise EngineUnavailableError("the engine is starting: try again in a few seconds")
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.is_ready = not self._dies
        vectors = np.array([(len(each), each[0], 0, 0) for each in request.inputs], dtype=np.float32)
        now_s = time.perf_counter()
        return EmbeddingEvent(request.request_id, b"" if self._error else vectors.tobytes(), now_s, now_s, self._error)


def encoder_service(client: FakeEncoderClient, **limits: Any) -> Service:
    return Service(client, ServeTokenizer(TOKENIZER), "tiny", ServiceLimits(**limits))  # type: ignore[arg-type]
