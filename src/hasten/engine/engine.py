"""The native engine: add a request, make a step, abort a request.

Where the device works beside Python, a step is launched before the tokens of the last one are
collected, so that the device never waits for Python (overlap scheduling). A request with a grammar
is queued when the grammar has been compiled, which the others do not wait for. One that wants its prompt's
log-probabilities is queued when they are computed, a chunk between two steps.

Every request that `add_request` accepted ends in one event with a finish_reason for each of
its continuations. Its blocks are free as soon as it ends.

Not here: text and stop strings (`runtimes.text`), and whatever calls `step` in a loop.
"""

import time
from collections.abc import Generator, Iterable
from collections.abc import Sequence as Items
from concurrent import futures

import torch

from hasten.engine.block_manager import BlockManager, BlockTable
from hasten.engine.config import EngineConfig
from hasten.engine.grammar import CompiledGrammar, GrammarCompiler
from hasten.engine.model_runner import Collect, Runner
from hasten.engine.prompt_scorer import CHUNK_TOKENS, PromptScorer
from hasten.engine.scheduler import Schedule, Scheduler
from hasten.engine.sequence import Sequence, make_sequences
from hasten.errors import OutOfBlocksError, RequestError
from hasten.request import FinishReason, Request, TokenEvent

OUT_OF_MEMORY = (
    "the device ran out of memory while it computed a step: lower max_num_batched_tokens or max_num_seqs, "
    "or end other programs on it"
)


COMPILE_WAIT_S = 0.01
"""How long a step waits for a grammar if there is nothing else to do."""


class Engine:
    """Runs requests in flight on one model and one cache. Not safe for use from several threads.

    Args:
        runner: has the model and the cache.
        config: resolved, with as many blocks as the cache.
        eos_token_ids: tokens that end a sequence unless its request says ignore_eos.
        grammars: compiles for this model; None where no request has a grammar.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        grammars: GrammarCompiler | None = None,
    ) -> None:
        assert config.num_blocks is not None, "the config is resolved"
        self.config = config
        self.block_manager = BlockManager(config.num_blocks, config.block_size, config.consecutive_blocks)
        self.scheduler = Scheduler(config, self.block_manager)
        self._runner = runner
        self._grammars = grammars
        self._compiling: dict[str, tuple[Request, futures.Future[CompiledGrammar]]] = {}
        self._scoring: dict[str, PromptScorer] = {}
        self._in_flight: tuple[Schedule, Collect] | None = None
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token_id for token_id in eos_token_ids if token_id < vocab_size)
        self._num_arrivals = 0
        self._active_ids: dict[str, int] = {}  # request id -> continuations that have not ended
        self._pending: list[TokenEvent] = []

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to report."""
        return self._is_busy or bool(self._compiling)

    @property
    def _is_busy(self) -> bool:
        return self.scheduler.has_unfinished or self._in_flight is not None or bool(self._pending or self._scoring)

    def add_request(self, request: Request) -> None:
        """Queues a request. One whose grammar turns out to be no good ends in an error.

        Raises:
            RequestError: it can never run; says which figure is beyond which limit.
        """
        self._check(request)
        self._active_ids[request.request_id] = request.sampling.n
        if request.sampling.prompt_logprobs is None:
            self._admit(request)
        else:
            self._scoring[request.request_id] = self._scorer(request)

    def _admit(self, request: Request) -> None:
        if request.sampling.grammar is None:
            self._queue(request)
        else:
            assert self._grammars is not None, "an engine whose requests have grammars has a compiler"
            self._compiling[request.request_id] = request, self._grammars.compile(request.sampling.grammar)

    def step(self) -> list[TokenEvent]:
        """Computes one step for the sequences that are due; returns their tokens and what has ended.

        With an asynchronous runner they are those of the step before, while the next one runs; behind a step of
        prompts alone the next one is only launched by the next call, so that requests can arrive. An exception
        that the runner raises ends the sequences of its step, in errors that the next call returns; the engine
        can go on if the device can.
        """
        if self._scoring:
            self._score()
        if self._compiling:
            self._queue_compiled()
        launched = None if self._awaits_arrivals() else self._launch()
        if self._runner.is_asynchronous:
            launched, self._in_flight = self._in_flight, launched
        if launched is not None:
            self._collect(*launched)
        events, self._pending = self._pending, []
        return events

    def _queue(self, request: Request, grammar: CompiledGrammar | None = None) -> None:
        sequences = self._sequences(request, grammar)
        self._num_arrivals += len(sequences)
        self.scheduler.add(sequences)

    def _sequences(self, request: Request, grammar: CompiledGrammar | None = None) -> tuple[Sequence, ...]:
        limit = self.config.max_model_tokens
        return make_sequences(request, self._num_arrivals, self._eos_token_ids, limit, grammar)

    def _queue_compiled(self) -> None:
        """Queues the requests whose grammars are compiled, ends those whose cannot be."""
        timeout_s = 0.0 if self._is_busy else COMPILE_WAIT_S
        wanted = [future for _, future in self._compiling.values()]
        done = futures.wait(wanted, timeout_s, futures.FIRST_COMPLETED).done
        for request, future in [each for each in self._compiling.values() if each[1] in done]:
            del self._compiling[request.request_id]
            error = future.exception()
            if error is None:
                self._queue(request, future.result())
            else:
                self._end(self._sequences(request), "error", str(error))

    def _scorer(self, request: Request) -> PromptScorer:
        return PromptScorer(request, self.prompt_logits(request.prompt_token_ids, CHUNK_TOKENS))

    def _score(self) -> None:
        """Computes the next chunk of the prompt whose log-probabilities were asked for first."""
        request_id, scorer = next(iter(self._scoring.items()))
        request = scorer.request
        try:
            logprobs = scorer.advance()
        except OutOfBlocksError as error:
            if self.scheduler.has_unfinished:
                self._scoring[request_id] = self._scorer(request)  # those that run will free blocks
                return
            self._end(self._sequences(request), "error", str(error))
        except torch.OutOfMemoryError:
            self._end(self._sequences(request), "error", OUT_OF_MEMORY)
        except Exception as error:
            self._end(self._sequences(request), "error", _step_failed(error))
        else:
            time_s, indices = time.perf_counter(), range(request.sampling.n)
            self._pending += [
                TokenEvent(request_id, None, time_s, index, prompt_logprobs=logprobs) for index in indices
            ]
            if not scorer.is_complete:
                return
            self._admit(request)
        scorer.close()
        del self._scoring[request_id]

    def _awaits_arrivals(self) -> bool:
        """Whether prompts alone are under way and the next step has room for more.

        They take several times as long as a decode step. Launched at once, the next step would have the few that are
        there, and the prompts that arrive meanwhile would wait for both.
        """
        if self._in_flight is None or any(chunk.is_decode for chunk in self._in_flight[0].chunks):
            return False
        return self.scheduler.has_room

    def _launch(self) -> tuple[Schedule, Collect] | None:
        """Starts the next step, if anything is due."""
        if not self.scheduler.has_unfinished:
            return None
        schedule = self.scheduler.schedule()
        for sequence in schedule.too_long:
            self._end([sequence], "error", self._too_long(sequence))
        if not schedule.chunks:
            return None
        try:
            launched = schedule, self._runner.launch(schedule)
        except torch.OutOfMemoryError:
            self._end(self.scheduler.fail(schedule), "error", OUT_OF_MEMORY)
            return None
        except Exception as error:
            self._end(self.scheduler.fail(schedule), "error", _step_failed(error))
            raise
        self.scheduler.record_blocks()
        return launched

    def _collect(self, schedule: Schedule, collect: Collect) -> None:
        """Waits for a step's tokens."""
        try:
            sampled = collect()
        except Exception as error:
            self._end(self.scheduler.fail(schedule), "error", _step_failed(error))
            raise
        computed = self.scheduler.commit(schedule, sampled, time.perf_counter())
        self._count_ends(computed)
        self._pending += computed

    def abort(self, request_id: str) -> None:
        """Ends a request, frees its blocks at once; the next step returns its "cancelled" events.

        An id that is unknown or has ended is ignored: it may end while the caller decides.
        """
        if request_id in self._scoring:
            scorer = self._scoring.pop(request_id)
            scorer.close()
            self._end(self._sequences(scorer.request), "cancelled")
        elif request_id in self._compiling:
            request, _ = self._compiling.pop(request_id)
            self._end(self._sequences(request), "cancelled")
        else:
            self._end(self.scheduler.abort(request_id), "cancelled")

    def prompt_logits(self, token_ids: Items[int], chunk_tokens: int) -> Generator[torch.Tensor, None, None]:
        """Logits after each token of a prompt, outside any request; see ModelRunner.prompt_logits.

        Raises:
            RequestError: the prompt is too long.
            OutOfBlocksError: running requests hold the blocks that it needs.
        """
        if len(token_ids) > self.config.max_model_tokens:
            raise RequestError(
                f"a sequence to score has {len(token_ids)} tokens and the most is {self.config.max_model_tokens}: "
                "score shorter ones, or raise max_model_tokens"
            )
        table = BlockTable()
        self.block_manager.grow(table, len(token_ids), len(token_ids))
        try:
            yield from self._runner.prompt_logits(token_ids, table, chunk_tokens)
        finally:
            self.block_manager.release(table)

    def _check(self, request: Request) -> None:
        name = f"request {request.request_id}"
        num_tokens = len(request.prompt_token_ids)
        num_cache_tokens = self.block_manager.num_blocks * self.block_manager.block_size
        if request.request_id in self._active_ids:
            raise RequestError(f"{name}: a request with this id is running; give each its own id")
        if num_tokens >= self.config.max_model_tokens:
            raise RequestError(
                f"{name}: the prompt has {num_tokens} tokens and a sequence, prompt and output together, at most "
                f"{self.config.max_model_tokens}: shorten the prompt to {self.config.max_model_tokens - 1} or less"
            )
        if num_tokens > num_cache_tokens:
            raise RequestError(
                f"{name}: the prompt has {num_tokens} tokens and the KV cache room for {num_cache_tokens}: "
                "shorten the prompt or raise num_blocks"
            )
        sampling = request.sampling
        biased = [token_id for token_id, _ in sampling.logit_bias]
        for what, token_ids in (
            ("", request.prompt_token_ids),
            ("logit_bias: ", biased),
            ("stop_token_ids: ", sampling.stop_token_ids),
        ):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
                wrong = next(each for each in token_ids if not 0 <= each < self._vocab_size)
                raise RequestError(f"{name}: {what}token id {wrong} is not between 0 and {self._vocab_size - 1}")

    def _too_long(self, sequence: Sequence) -> str:
        return (
            f"the sequence has {len(sequence.token_ids)} tokens and the KV cache room for "
            f"{self.block_manager.num_blocks * self.block_manager.block_size}: lower max_tokens or raise num_blocks"
        )

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason, error: str | None = None) -> None:
        """Lets `step` report the ends of sequences that have left the scheduler."""
        time_s = time.perf_counter()
        ends = [
            TokenEvent(each.request.request_id, None, time_s, each.index, reason, error=error) for each in sequences
        ]
        self._count_ends(ends)
        self._pending += ends

    def _count_ends(self, events: Iterable[TokenEvent]) -> None:
        for event in events:
            if event.finish_reason is not None:
                self._active_ids[event.request_id] -= 1
                if self._active_ids[event.request_id] == 0:
                    del self._active_ids[event.request_id]


def _step_failed(error: Exception) -> str:
    return f"the step that the request was in failed: {type(error).__name__}: {error}"
