"""An engine client without an engine: made-up tokens, at the pace and with the faults that a test asks for."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from hasten.errors import EngineUnavailableError, HastenError
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import EngineFacts, EngineStats
from hasten.runtimes.text import load_tokenizer
from hasten.serve.service import Service, ServiceLimits
from hasten.serve.tokenizer import ServeTokenizer

MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"
TOKENIZER = load_tokenizer(MODEL)
TEXT = "The model reads this text aloud, token by token, and then it begins again. "
TEXT_IDS = TOKENIZER.encode(TEXT, add_special_tokens=False)


def facts(max_num_seqs: int = 4, max_model_tokens: int = 256) -> EngineFacts:
    return EngineFacts("tiny", "fake", "none", "cpu", len(TOKENIZER), max_model_tokens, max_num_seqs, 0, 16, (3,))


class FakeEngineClient:
    """Continues every prompt with TEXT.

    Args:
        step_s: time between tokens.
        script: token ids instead of TEXT's; the last one ends the continuation with "stop".
        fails_after: tokens after which a continuation ends in an error.
        tokens_at_once: how many come in one read.
    """

    def __init__(
        self,
        *,
        step_s: float = 0.0,
        script: Sequence[int] | None = None,
        fails_after: int | None = None,
        dies: bool = False,
        tokens_at_once: int = 1,
        max_num_seqs: int = 4,
        max_model_tokens: int = 256,
    ) -> None:
        self.facts = facts(max_num_seqs, max_model_tokens)
        self.stats = EngineStats(num_kv_blocks=8, num_used_kv_blocks=2, num_prompt_tokens=5, num_prefix_hit_tokens=4)
        self.is_ready = True
        self.failure: HastenError | None = None
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._step_s = step_s
        self._script = script
        self._fails_after = fails_after
        self._dies = dies
        self._tokens_at_once = tokens_at_once

    async def stream(self, request: Request) -> AsyncIterator[list[TokenEvent]]:
        if not self.is_ready:
            raise EngineUnavailableError("the engine is starting: try again in a few seconds")
        self.requests.append(request)
        self.running.add(request.request_id)
        ended = False
        try:
            waiting: list[TokenEvent] = []
            for position in range(request.sampling.max_tokens):
                await asyncio.sleep(self._step_s)
                await self.gate.wait()
                events = [self._event(request, index, position) for index in range(request.sampling.n)]
                waiting += events
                ended = events[0].finish_reason is not None
                if len(waiting) >= self._tokens_at_once * request.sampling.n or ended:
                    yield waiting
                    waiting = []
                if ended:
                    return
        finally:
            self.running.discard(request.request_id)
            if not ended:
                self.aborted.append(request.request_id)

    def _event(self, request: Request, index: int, position: int) -> TokenEvent:
        now_s = time.perf_counter()
        if position == self._fails_after:
            self.is_ready = not self._dies
            return TokenEvent(request.request_id, None, now_s, index, "error", error="the step failed")
        ids = self._script or TEXT_IDS
        token_id = ids[position % len(ids)]
        reason: Any = "length" if position + 1 == request.sampling.max_tokens else None
        if self._script is not None and position + 1 == len(self._script):
            reason = "stop"
        wanted = request.sampling.logprobs
        if wanted is None:
            num_cached_tokens = None if position else len(request.prompt_token_ids) - 1
            return TokenEvent(request.request_id, token_id, now_s, index, reason, num_cached_tokens=num_cached_tokens)
        top = tuple((other, -1.0 - other) for other in range(4, 4 + wanted))
        return TokenEvent(request.request_id, token_id, now_s, index, reason, -0.5, top)


def make_service(client: FakeEngineClient, **limits: Any) -> Service:
    return Service(client, ServeTokenizer(TOKENIZER), "tiny", ServiceLimits(**limits))  # type: ignore[arg-type]
