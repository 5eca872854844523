"""The mutable state of one continuation of a request.

A request with `n` continuations becomes n sequences; they share the blocks of the prompt.
Tokens whose keys and values are in the cache, or on their way there in a step that runs, are the
first `num_computed_tokens`. A step that runs may also be about to give the next token: until it
is known it counts in `num_pending_tokens`. Preemption sets the computed tokens back to what a
shared prefix holds and loses nothing else, so a sequence continues with the tokens it had.

The random number of a sequence's i-th generated token is a pure function of its seed and i
(SplitMix64, Steele, Lea and Flood 2014, with i as the counter): it needs no state, it is known
before the logits are, and it is the same on every device.

Not here: which step computes what (`scheduler`), and which block holds what (`block_manager`).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from hasten.engine.block_manager import BlockTable, CachedBlock, chain_digest
from hasten.engine.grammar import CompiledGrammar, Matcher
from hasten.request import Request, SamplingParams

_STEP = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio
_MASK = (1 << 64) - 1


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of a request.

    Args:
        index: which of the request's continuations, from 0.
        arrival: number in the order in which sequences were added.
        token_ids: prompt and output.
        max_total_tokens: it ends with "length" when token_ids is this long.
        num_pending_tokens: how many steps run that each draw a token of it.
        num_recorded_blocks: its full blocks that the block manager knows by content.
        started_s: `time.perf_counter()` when it was scheduled for the first time.
        num_cached_tokens: of the prompt, which the prefix cache had then.
        slot: its number among the running sequences, below max_num_seqs, while it runs.
        is_decoding: whether the token to compute next is the one that its last step drew.
        known_blocks: the hash chain of its full blocks, as far as it was needed.
        random_seed: 64 bits that give its random numbers; None for a greedy sequence.
        matcher: where its output, as far as it is known, is in the request's grammar; None without one.
    """

    request: Request
    index: int
    arrival: int
    token_ids: list[int]
    max_total_tokens: int
    stop_token_ids: frozenset[int]
    random_seed: int | None
    matcher: Matcher | None = None
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_recorded_blocks: int = 0
    started_s: float | None = None
    num_cached_tokens: int | None = None
    slot: int | None = None
    is_decoding: bool = False
    is_finished: bool = False
    table: BlockTable = field(default_factory=BlockTable)
    known_blocks: list[CachedBlock] = field(default_factory=list)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with the tokens that are still being drawn."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_complete(self) -> bool:
        """Whether its last token is known or being drawn."""
        return self.num_tokens >= self.max_total_tokens

    @property
    def awaits_mask(self) -> bool:
        """Whether its next step cannot be launched yet: what may follow depends on a token that is being drawn."""
        return self.matcher is not None and self.num_pending_tokens > 0 and not self.is_complete

    def cached_block(self, index: int, block_size: int) -> CachedBlock:
        """What its full block number `index` holds."""
        while len(self.known_blocks) <= index:
            parent = self.known_blocks[-1].digest if self.known_blocks else b""
            start = len(self.known_blocks) * block_size
            tokens = tuple(self.token_ids[start : start + block_size])
            self.known_blocks.append(CachedBlock(chain_digest(parent, tokens), parent, tokens))
        return self.known_blocks[index]


def make_sequences(
    request: Request,
    first_arrival: int,
    eos_token_ids: Iterable[int],
    max_model_tokens: int,
    grammar: CompiledGrammar | None = None,
) -> tuple[Sequence, ...]:
    """The request's `n` sequences, each with a random state and a matcher of its own.

    Args:
        grammar: the request's, if it has one.
    """
    sampling = request.sampling
    stop_token_ids = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stop_token_ids |= frozenset(eos_token_ids)
    return tuple(
        Sequence(
            request=request,
            index=index,
            arrival=first_arrival + index,
            token_ids=list(request.prompt_token_ids),
            max_total_tokens=min(len(request.prompt_token_ids) + sampling.max_tokens, max_model_tokens),
            stop_token_ids=stop_token_ids,
            random_seed=None if sampling.is_greedy else _random_seed(sampling.seed, index),
            matcher=None
            if grammar is None
            else grammar.matcher(
                ignore_eos=sampling.ignore_eos,
                early_token_ids=tuple(stop_token_ids),
                min_tokens=sampling.min_tokens,
            ),
        )
        for index in range(sampling.n)
    )


def uniform(random_seed: int, index: int) -> float:
    """The random number in [0, 1), a multiple of 2^-53, of a sequence's generated token number `index`."""
    return (_mixed(random_seed + (index + 1) * _STEP) >> 11) * 2.0**-53


def _random_seed(seed: int | None, index: int) -> int:
    if seed is None:
        return int.from_bytes(os.urandom(8))
    # Mixed: the numbers of two continuations, or of two close seeds, are not each other's, shifted.
    return _mixed(_mixed(seed) + index)


def _mixed(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
