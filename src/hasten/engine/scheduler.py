"""Which tokens of which sequences the next step computes.

In-flight batching: sequences join and leave between steps. A step first gives every decoding
sequence its token, then fills what is left of the token budget with chunks of prompts, and
admits waiting sequences as long as there are blocks. Sequences run and wait in their order:
by priority, those of equal priority by arrival.

The invariant: of one priority, every running sequence arrived before every waiting one. So
within a priority nothing is overtaken; and as admission always takes the first sequence and
preemption the last one, the first always advances: only a steady stream of more important
requests can starve another. What runs is never stopped for something more important that
waits, only for room that something more important needs to go on. A preempted sequence gives
up its blocks and computes them again later (preemption by recompute, arXiv 2309.06180,
section 4.5).

A step may be scheduled while the one before it still runs: a token that is being drawn counts
as there, and a sequence that then turns out to have ended is passed over when its superfluous
step is committed. Its blocks may have new owners by then: they are written to by later steps
only, and steps run in order. A sequence with a grammar is not scheduled before its last token is
known, because that decides which token may come next.

Not here: the tensors of the step (`model_runner`) and the choice of the token (`sampler`).
"""

import time
from bisect import insort
from collections.abc import Sequence as Items
from dataclasses import dataclass

from hasten.engine.block_manager import BlockManager
from hasten.engine.config import EngineConfig
from hasten.engine.sampler import SampledToken
from hasten.engine.sequence import Sequence
from hasten.errors import OutOfBlocksError
from hasten.request import FinishReason, TokenEvent


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens of one sequence that a step computes.

    Args:
        start: position of the first of them.
        samples: whether these are the last tokens there are, so that the next one is drawn.
        is_decode: whether its only token is the one that the sequence's last step drew.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    is_decode: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step.

    Args:
        too_long: sequences that ended because the whole cache cannot hold them.
    """

    chunks: Items[ScheduledChunk]
    too_long: Items[Sequence] = ()


class Scheduler:
    """Holds the sequences that wait and those that run.

    Args:
        config: resolved.
    """

    def __init__(self, config: EngineConfig, block_manager: BlockManager) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._config = config
        self._blocks = block_manager
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._unrecorded: list[Sequence] = []  # scheduled, but their blocks are not known yet
        self._unrecorded_begins: set[tuple[int, ...]] = set()  # their first blocks

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def has_room(self) -> bool:
        """Whether a sequence that came now could join the next step, as far as its tokens and places go."""
        sequences = (*self.running, *self.waiting)
        num_tokens = sum(sequence.num_uncomputed_tokens for sequence in sequences)
        return len(sequences) < self._config.max_num_seqs and num_tokens < self._config.max_num_batched_tokens

    def add(self, sequences: Items[Sequence]) -> None:
        """Queues the sequences of one request."""
        self.num_prompt_tokens += sequences[0].num_prompt_tokens
        for sequence in sequences:
            insort(self.waiting, sequence, key=_order)

    def abort(self, request_id: str) -> tuple[Sequence, ...]:
        """Removes a request's sequences and frees their blocks; returns them."""
        aborted = tuple(each for each in (*self.running, *self.waiting) if each.request.request_id == request_id)
        if aborted:
            for sequence in aborted:
                self._give_back(sequence)
                sequence.is_finished = True
            self.running = [each for each in self.running if not each.is_finished]
            self.waiting = [each for each in self.waiting if not each.is_finished]
        return aborted

    def schedule(self) -> Schedule:
        """Chooses the next step and allocates the blocks that it writes to.

        Its tokens count as computed from now on: the step must run, before any later one.
        """
        self.record_blocks()
        if self._should_wait_for_masks():
            return Schedule(())
        chunks: list[ScheduledChunk] = []
        too_long: list[Sequence] = []
        num_preemptions = self.num_preemptions
        for sequence in tuple(self.running):
            is_due = sequence.num_uncomputed_tokens == 1 and not sequence.is_complete and not sequence.awaits_mask
            if is_due and self._grow(sequence, too_long):
                chunks.append(self._chunk(sequence, 1))
        budget = self._config.max_num_batched_tokens - len(chunks)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1 and budget > 0:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].num_tokens
        if self.num_preemptions == num_preemptions:
            while self.waiting and budget > 0 and self._admit(self.waiting[0]):
                sequence = self.waiting.pop(0)
                insort(self.running, sequence, key=_order)
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].num_tokens
        self.num_steps += bool(chunks)
        return Schedule(chunks, too_long)

    def record_blocks(self) -> None:
        """Makes known what the blocks of the scheduled tokens hold.

        Hashing them takes 3 us a block: better done once the step is launched.
        """
        for sequence in self._unrecorded:
            self._record_blocks(sequence)
        self._unrecorded.clear()
        self._unrecorded_begins.clear()

    def commit(self, schedule: Schedule, sampled: Items[SampledToken], time_s: float) -> list[TokenEvent]:
        """Takes over a computed step: appends the drawn tokens and ends what has ended.

        Args:
            sampled: one for each chunk that samples, in their order.
            time_s: when the tokens were known.
        """
        events: list[TokenEvent] = []
        reason: FinishReason | None
        tokens = iter(sampled)
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if not chunk.samples:
                continue
            token = next(tokens)
            if sequence.is_finished:
                continue
            error = _append(sequence, token)
            self.num_generated_tokens += error is None
            reason = "error" if error else _finish_reason(sequence)
            matcher = sequence.matcher
            is_first = sequence.num_output_tokens == 1
            has_own_end = reason in (None, "length") and matcher is not None and matcher.is_complete
            events.append(
                TokenEvent(
                    request_id=sequence.request.request_id,
                    token_id=None if error else token.token_id,
                    time_s=time_s,
                    index=sequence.index,
                    finish_reason=None if has_own_end else reason,
                    logprob=token.logprob,
                    top_logprobs=token.top_logprobs,
                    error=error,
                    started_s=sequence.started_s if is_first else None,
                    num_cached_tokens=sequence.num_cached_tokens if is_first else None,
                )
            )
            if has_own_end:  # the token is text, which that of an event with "stop" is not
                events.append(TokenEvent(sequence.request.request_id, None, time_s, sequence.index, "stop"))
            self._record_blocks(sequence)
            if reason is not None or has_own_end:
                self._end(sequence)
        return events

    def fail(self, schedule: Schedule) -> tuple[Sequence, ...]:
        """Ends the sequences of a step that could not run; returns them."""
        failed = tuple(chunk.sequence for chunk in schedule.chunks if not chunk.sequence.is_finished)
        for sequence in failed:
            self._blocks.forget(sequence.table)  # what they were to hold was never written
            self._end(sequence)
        return failed

    def check_integrity(self) -> None:
        """Fails if a block has leaked or was freed while held, or if a sequence was overtaken by its equal."""
        sequences = (*self.running, *self.waiting)
        self._blocks.check_integrity(sequence.table for sequence in sequences)
        assert self.running == sorted(self.running, key=_order), f"{[_order(each) for each in self.running]}"
        assert self.waiting == sorted(self.waiting, key=_order), f"{[_order(each) for each in self.waiting]}"
        for priority in {each.request.priority for each in sequences}:
            arrivals = [each.arrival for each in sequences if each.request.priority == priority]
            assert arrivals == sorted(set(arrivals)), f"priority {priority}: not in the order of arrival: {arrivals}"
        assert len(self.running) <= self._config.max_num_seqs
        assert all(not each.table.block_ids and each.num_computed_tokens == 0 for each in self.waiting)
        slots = [each.slot for each in self.running if each.slot is not None]
        assert sorted(self._free_slots + slots) == list(range(self._config.max_num_seqs)), f"slots {slots}"
        assert all(each.slot is None for each in self.waiting)

    def _should_wait_for_masks(self) -> bool:
        """Whether to wait for the step that runs, so that those with a grammar go on together.

        Scheduled beside it, sequences with a grammar would take turns, each in every other step. Where they
        are few, that is better than to let the device wait for all.
        """
        with_grammar = [each for each in self.running if each.matcher is not None]
        return 2 * len(with_grammar) >= len(self.running) and any(each.awaits_mask for each in with_grammar)

    def _grow(self, sequence: Sequence, too_long: list[Sequence]) -> bool:
        """Makes room for a running sequence's tokens; False if it had to leave.

        Takes the blocks of the last in order if no other is free.
        """
        while sequence.slot is not None:
            try:
                self._blocks.grow(sequence.table, sequence.num_tokens, sequence.max_total_tokens)
                return True
            except OutOfBlocksError:
                if self._blocks.num_blocks_for(sequence.num_tokens) > self._blocks.num_blocks:
                    self._end(sequence)
                    too_long.append(sequence)
                else:
                    self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        insort(self.waiting, sequence, key=_order)
        self.num_preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        """Removes a sequence for good; it may wait, if it was preempted while its last token was drawn."""
        (self.waiting if sequence.slot is None else self.running).remove(sequence)
        self._give_back(sequence)
        sequence.is_finished = True

    def _give_back(self, sequence: Sequence) -> None:
        """Takes from a sequence what only running ones have; nothing in it is computed any more."""
        self._blocks.release(sequence.table)
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.num_computed_tokens = sequence.num_recorded_blocks = 0
        sequence.is_decoding = False

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a slot and blocks for all its tokens; False if it has to wait."""
        if len(self.running) == self._config.max_num_seqs or self._prompt_is_being_computed(sequence):
            return False
        num_shared_tokens = self._share_prefix(sequence)
        # Beyond its own it leaves a block for each running sequence, or the next step might preempt it.
        num_missing = self._blocks.num_blocks_for(len(sequence.token_ids)) - len(sequence.table.block_ids)
        if num_missing + len(self.running) > self._blocks.num_free_blocks:
            self._blocks.release(sequence.table)
            return False
        self._blocks.grow(sequence.table, len(sequence.token_ids), sequence.max_total_tokens)
        sequence.num_computed_tokens = num_shared_tokens
        sequence.slot = self._free_slots.pop()
        if sequence.started_s is None:
            sequence.started_s, sequence.num_cached_tokens = time.perf_counter(), num_shared_tokens
        self.num_prefix_hit_tokens += num_shared_tokens
        return True

    def _prompt_is_being_computed(self, sequence: Sequence) -> bool:
        """Whether another continuation of the same request is about to fill blocks that it can share."""
        return any(
            each.request is sequence.request and each.num_computed_tokens < self._num_shareable_tokens(each)
            for each in self.running
        )

    def _num_shareable_tokens(self, sequence: Sequence) -> int:
        """Tokens of the prompt in blocks that can be shared: full, and not with the last token.

        The last token is always computed, because its logits are needed.
        """
        block_size = self._config.block_size
        return (sequence.num_prompt_tokens - 1) // block_size * block_size

    def _share_prefix(self, sequence: Sequence) -> int:
        """Gives a sequence the known blocks that it starts with; returns the number of their tokens."""
        if not self._config.enable_prefix_cache and sequence.index == 0:
            return 0
        block_size = self._config.block_size
        if tuple(sequence.token_ids[:block_size]) in self._unrecorded_begins:
            self.record_blocks()
        for index in range((len(sequence.token_ids) - 1) // block_size):
            block = self._blocks.find(sequence.cached_block(index, block_size))
            if block is None:
                break
            self._blocks.share(sequence.table, block)
        return len(sequence.table.block_ids) * block_size

    def _chunk(self, sequence: Sequence, budget: int) -> ScheduledChunk:
        """Schedules as many of a sequence's tokens as the budget allows."""
        start, num_tokens = sequence.num_computed_tokens, min(sequence.num_uncomputed_tokens, budget)
        samples = num_tokens == sequence.num_uncomputed_tokens
        chunk = ScheduledChunk(sequence, start, num_tokens, samples, sequence.is_decoding)
        sequence.num_computed_tokens += num_tokens
        self._unrecorded.append(sequence)
        if not sequence.is_decoding:
            self._unrecorded_begins.add(tuple(sequence.token_ids[: self._config.block_size]))
        sequence.num_pending_tokens += samples
        sequence.is_decoding = samples
        return chunk

    def _record_blocks(self, sequence: Sequence) -> None:
        """Makes known which tokens its full blocks hold, as far as they are computed and known."""
        if sequence.slot is None or not (self._config.enable_prefix_cache or sequence.sampling.n > 1):
            return
        block_size = self._config.block_size
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // block_size
        for index in range(sequence.num_recorded_blocks, num_full):
            self._blocks.record(sequence.table.block_ids[index], sequence.cached_block(index, block_size))
        sequence.num_recorded_blocks = max(sequence.num_recorded_blocks, num_full)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


def _append(sequence: Sequence, token: SampledToken) -> str | None:
    """Adds a drawn token; returns why the sequence cannot go on, None if it can."""
    sequence.token_ids.append(token.token_id)
    sequence.num_pending_tokens -= 1
    if sequence.matcher is None:
        return token.error
    if token.error is None:
        sequence.matcher.accept(token.token_id)
    return sequence.matcher.error or token.error


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    if sequence.token_ids[-1] in sequence.stop_token_ids:
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_total_tokens else None
