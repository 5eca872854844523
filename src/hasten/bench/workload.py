"""Draws the requests of a measurement.

All of them are drawn at once from the seed, so every runtime gets the same requests in the same
run, also after an interruption. No two prompts of a measurement begin alike, so that no runtime
can answer one from its prefix cache. End tokens are ignored: every request asks for exactly
`new_tokens` tokens.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from hasten.bench.result import BenchConfig
from hasten.errors import UsageError
from hasten.request import Request, SamplingParams

# two prompts that differ within their first tokens share no block of a prefix cache
DISTINCT_TOKENS = 8
MAX_DRAWS = 100


@dataclass(frozen=True)
class PlannedRun:
    """Requests to hand over together.

    Args:
        round_index: counts from 0, warm-ups and measured runs each by themselves.
    """

    concurrency: int
    round_index: int
    is_warmup: bool
    requests: tuple[Request, ...]


def sample_requests(
    config: BenchConfig,
    vocab_size: int,
    text_token_ids: Sequence[int] = (),
    special_token_ids: Collection[int] = (),
) -> tuple[PlannedRun, ...]:
    """All runs that a measurement needs, warm-ups first, each round with every concurrency.

    Args:
        text_token_ids: a held-out text; prompts are windows of it. Where it is too short for
            distinct windows, and without a text, tokens are drawn at random.
        special_token_ids: are never drawn at random.

    Raises:
        UsageError: random tokens are needed and all tokens are special.
    """
    prompts = _prompts(config, vocab_size, text_token_ids, frozenset(special_token_ids))
    sampling = SamplingParams(max_tokens=config.new_tokens, ignore_eos=True)
    runs = []
    for is_warmup, num_rounds in ((True, config.num_warmup), (False, config.num_runs)):
        for round_index in range(num_rounds):
            for concurrency in config.concurrency:
                name = f"{'warmup' if is_warmup else 'round'}-{round_index}-concurrency-{concurrency}"
                requests = tuple(Request(f"{name}-{each}", next(prompts), sampling) for each in range(concurrency))
                runs.append(PlannedRun(concurrency, round_index, is_warmup, requests))
    return tuple(runs)


def _prompts(
    config: BenchConfig, vocab_size: int, text_token_ids: Sequence[int], special_token_ids: frozenset[int]
) -> Iterator[tuple[int, ...]]:
    """Endless prompts with distinct beginnings.

    Very short prompts repeat when their possible beginnings are used up; a cache has nothing to
    gain from those.
    """
    draw = random.Random(config.seed)
    seen: set[tuple[int, ...]] = set()

    def is_new(prompt: tuple[int, ...]) -> bool:
        beginning = prompt[:DISTINCT_TOKENS]
        return beginning not in seen and not seen.add(beginning)  # type: ignore[func-returns-value]

    starts = list(range(len(text_token_ids) - config.prompt_tokens + 1))
    draw.shuffle(starts)
    for start in starts:
        window = tuple(text_token_ids[start : start + config.prompt_tokens])
        if is_new(window):
            yield window
    ordinary = [token for token in range(vocab_size) if token not in special_token_ids]
    if not ordinary:
        raise UsageError(f"no prompt can be drawn: all {vocab_size} tokens of the vocabulary are special")
    while True:
        for _ in range(MAX_DRAWS):
            prompt = tuple(draw.choices(ordinary, k=config.prompt_tokens))
            if is_new(prompt):
                break
        yield prompt
