"""Draws the requests of a measurement.

All of them are drawn at once from the seed, so every runtime gets the same requests in the same
run, also after an interruption. No two prompts of a measurement begin alike, so that no runtime
can answer one from its prefix cache. End tokens are ignored: every request asks for exactly
`new_tokens` tokens.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

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
    prompts = PromptDraw(vocab_size, text_token_ids, special_token_ids, config.prompt_tokens, config.seed)
    sampling = SamplingParams(max_tokens=config.new_tokens, ignore_eos=True)
    runs = []
    for is_warmup, num_rounds in ((True, config.num_warmup), (False, config.num_runs)):
        for round_index in range(num_rounds):
            for concurrency in config.concurrency:
                name = f"{'warmup' if is_warmup else 'round'}-{round_index}-concurrency-{concurrency}"
                requests = tuple(
                    Request(f"{name}-{each}", prompts.draw(config.prompt_tokens), sampling)
                    for each in range(concurrency)
                )
                runs.append(PlannedRun(concurrency, round_index, is_warmup, requests))
    return tuple(runs)


class PromptDraw:
    """Prompts with distinct beginnings: windows of a text while there are any, then random tokens.

    Very short prompts repeat when their possible beginnings are used up; a cache has nothing to
    gain from those.

    Args:
        longest: no prompt will be longer; every window has room for it.
    """

    def __init__(
        self,
        vocab_size: int,
        text_token_ids: Sequence[int],
        special_token_ids: Collection[int],
        longest: int,
        seed: int,
    ) -> None:
        self._vocab_size, self._text, self._special = vocab_size, text_token_ids, frozenset(special_token_ids)
        self._random = random.Random(seed)
        self._seen: set[tuple[int, ...]] = set()
        self._starts = list(range(len(text_token_ids) - longest + 1))
        self._random.shuffle(self._starts)
        self._starts.reverse()

    def draw(self, length: int) -> tuple[int, ...]:
        """The next prompt, `length` tokens long.

        Raises:
            UsageError: random tokens are needed and all tokens are special.
        """
        while self._starts:
            start = self._starts.pop()
            window = tuple(self._text[start : start + length])
            if self._is_new(window):
                return window
        for _ in range(MAX_DRAWS):
            prompt = tuple(self._random.choices(self._ordinary, k=length))
            if self._is_new(prompt):
                break
        return prompt

    def _is_new(self, prompt: tuple[int, ...]) -> bool:
        beginning = prompt[:DISTINCT_TOKENS]
        if beginning in self._seen:
            return False
        self._seen.add(beginning)
        return True

    @cached_property
    def _ordinary(self) -> list[int]:
        ordinary = [token for token in range(self._vocab_size) if token not in self._special]
        if not ordinary:
            raise UsageError(f"no prompt can be drawn: all {self._vocab_size} tokens of the vocabulary are special")
        return ordinary
