"""The mutable state of one continuation of a request.

A request with `n` continuations becomes n sequences; they share the blocks of the prompt.
Tokens whose keys and values are in the cache are `token_ids[:num_computed_tokens]`; the rest
is still to be computed. Preemption sets that number back to what a shared prefix holds and
loses nothing else, so a sequence continues with the tokens and the random state it had.

Not here: which step computes what (`scheduler`), and which block holds what (`block_manager`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hasten.engine.block_manager import BlockTable, CachedBlock, chain_digest
from hasten.request import Request, SamplingParams

# Odd, with its bits well mixed (2^64 / golden ratio): continuations of one seed, and of seeds
# that are close together, start far apart.
_SEED_STEP = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 63) - 1


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of a request.

    Args:
        index: which of the request's continuations, from 0.
        arrival: number in the order in which sequences were added.
        token_ids: prompt and output.
        max_total_tokens: it ends with "length" when token_ids is this long.
        known_blocks: the hash chain of its full blocks, as far as it was needed.
        generator: draws its tokens; None for a greedy sequence.
    """

    request: Request
    index: int
    arrival: int
    token_ids: list[int]
    max_total_tokens: int
    stop_token_ids: frozenset[int]
    generator: torch.Generator | None
    num_computed_tokens: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    known_blocks: list[CachedBlock] = field(default_factory=list)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def cached_block(self, index: int, block_size: int) -> CachedBlock:
        """What its full block number `index` holds."""
        while len(self.known_blocks) <= index:
            parent = self.known_blocks[-1].digest if self.known_blocks else b""
            start = len(self.known_blocks) * block_size
            tokens = tuple(self.token_ids[start : start + block_size])
            self.known_blocks.append(CachedBlock(chain_digest(parent, tokens), parent, tokens))
        return self.known_blocks[index]


def make_sequences(
    request: Request, first_arrival: int, eos_token_ids: Iterable[int], max_model_tokens: int
) -> tuple[Sequence, ...]:
    """The request's `n` sequences, each with a random state of its own."""
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
            generator=None if sampling.is_greedy else _generator(sampling.seed, index),
        )
        for index in range(sampling.n)
    )


def _generator(seed: int | None, index: int) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + index * _SEED_STEP) & _SEED_MASK)
    return generator
