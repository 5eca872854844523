"""When each token of a streamed answer came, as far as a client can see.

A chunk that carries k tokens counts as k tokens at one time. How many it carries is taken from
what the server says, the most exact first:

1. token ids beside the text: their number;
2. the number of all tokens at the end of the stream (usage), spread over the chunks: one for each, what is
   left in proportion to their characters;
3. nothing: a chunk is a token, so merged chunks are counted too low, never too high.

Text is not tokenized again: its tokens need not be those that were generated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer that has text or tokens.

    Args:
        num_tokens: None where the server does not say.
    """

    time_s: float
    num_characters: int
    num_tokens: int | None = None


def token_times_s(chunks: Sequence[Chunk], num_tokens: int | None) -> tuple[float, ...]:
    """One time a token, in order.

    Args:
        num_tokens: of the whole answer, None where the server does not say.
    """
    counts = [chunk.num_tokens for chunk in chunks if chunk.num_tokens is not None]
    if len(counts) < len(chunks) or sum(counts) != (num_tokens or sum(counts)):
        counts = [1] * len(chunks) if num_tokens is None else _spread(num_tokens, chunks)
    return tuple(chunk.time_s for chunk, count in zip(chunks, counts, strict=True) for _ in range(count))


def _spread(num_tokens: int, chunks: Sequence[Chunk]) -> list[int]:
    """Whole numbers that add up to num_tokens, at least one a chunk while there are enough; the first has one."""
    if num_tokens < len(chunks):
        reached = [math.ceil(index * num_tokens / len(chunks)) for index in range(len(chunks) + 1)]
        return [after - before for before, after in pairwise(reached)]
    characters = list(accumulate((chunk.num_characters for chunk in chunks), initial=0))
    spare, total = num_tokens - len(chunks), max(1, characters[-1])
    if not characters[-1]:
        characters = list(range(len(chunks) + 1))
        total = len(chunks)
    reached = [round(spare * each / total) for each in characters]
    return [1 + after - before for before, after in pairwise(reached)]
