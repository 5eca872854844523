"""Prompts for a server: windows of a text or random ones, of any length, no two beginning alike.

With the model's tokenizer, lengths are exact to a token or two (a window of a text may be tokenized
otherwise than within it). Without it, prompts are made of words, and `tokens_per_unit`, measured at the
server, says how many tokens a word is. What the server counts is what a record has.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.bench.workload import PromptDraw

_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class PromptSource:
    """A text as units (tokens or words), and how units become text again.

    Args:
        unit_ids: the text. num_units: unit ids are below this.
        special_ids: are never drawn at random.
        is_tokens: whether units are the model's tokens.
    """

    unit_ids: Sequence[int]
    num_units: int
    decode: Callable[[Sequence[int]], str]
    special_ids: Collection[int] = ()
    is_tokens: bool = False
    tokens_per_unit: float = 1.0

    @classmethod
    def of_words(cls, text: str) -> "PromptSource":
        words = _WORD.findall(text)
        known = list(dict.fromkeys(words))
        number = {word: index for index, word in enumerate(known)}
        return cls(
            [number[word] for word in words], len(known), lambda ids: "".join(known[index] for index in ids).lstrip()
        )

    @classmethod
    def of_tokens(cls, text: str, tokenizer: Any, vocab_size: int) -> "PromptSource":
        """Of a Hugging Face tokenizer."""
        unit_ids = tokenizer.encode(text, add_special_tokens=False)
        return cls(unit_ids, vocab_size, tokenizer.decode, frozenset(tokenizer.all_special_ids), is_tokens=True)

    def measured(self, num_units: int, num_tokens: int) -> "PromptSource":
        """The same, now that the server counts num_tokens in a prompt of num_units."""
        return replace(self, tokens_per_unit=num_tokens / num_units)

    def prompts(
        self, longest: int, seed: int, *, is_random: bool, as_ids: bool
    ) -> Callable[[int], str | tuple[int, ...]]:
        """A function from a length in tokens to the next prompt.

        Args:
            longest: no length will be above this.
            as_ids: token ids instead of text.
        """
        assert self.is_tokens or not as_ids, "words have no token ids"

        def num_units(length: int) -> int:
            return max(1, round(length / self.tokens_per_unit))

        text = () if is_random else self.unit_ids
        draw = PromptDraw(self.num_units, text, self.special_ids, num_units(longest), seed)

        def prompt(length: int) -> str | tuple[int, ...]:
            ids = draw.draw(num_units(length))
            return ids if as_ids else self.decode(ids)

        return prompt
