"""Text that quality is measured on, cut into windows of tokens.

All candidates of a run see the same windows. The text is the model's own `heldout.txt` where its
folder has one, which its training did not see; else Python's own help texts, which every
machine has, so that no network is needed. Those may have been in a model's training data: they
show how far a candidate is from the baseline, not how good the model is.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Protocol

from hasten.errors import ModelError

FILE_NAME = "heldout.txt"
MAX_WINDOW_TOKENS = 256
MIN_WINDOW_TOKENS = 8
MAX_TOKENS = 4096
MIN_TOKENS = 512
MAX_SCORE_BYTES = 512 * 2**20  # of the baseline's log-probabilities, kept on disk
NUM_PROMPTS = 4
PROMPT_TOKENS = 32
GREEDY_TOKENS = 64


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class HeldOutText:
    """A text and where it came from, for the report."""

    text: str
    origin: str


@dataclass(frozen=True)
class EvaluationSet:
    """What every candidate is asked.

    Args:
        windows: token ids, all of one length: what the tokenizer puts before a text (BOS or
            nothing), then consecutive tokens of the text. No token of the text is in two.
        num_unscored: leading tokens of a window whose probability does not count: what the
            tokenizer put there and the first token of the text.
        window_bytes: UTF-8 bytes of the scored tokens of each window.
        prompts: beginnings to continue greedily, all of one length.
        greedy_tokens: length of each continuation.
    """

    windows: tuple[tuple[int, ...], ...]
    num_unscored: int
    window_bytes: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    greedy_tokens: int
    origin: str

    @property
    def tokens_per_window(self) -> int:
        """Scored tokens of one window."""
        return len(self.windows[0]) - self.num_unscored


def held_out_text(model: Path | None) -> HeldOutText:
    """The text of a model's folder; the help texts where there is none, or no folder.

    Raises:
        ModelError: the model's held-out text is not UTF-8.
    """
    path = None if model is None else model / FILE_NAME
    if path is not None and path.is_file():
        try:
            return HeldOutText(path.read_text(encoding="utf-8"), f"{FILE_NAME} of the model")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is not UTF-8 text: {error}; convert it or remove it") from error
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return HeldOutText(text, "pydoc_data.topics, the help texts that come with Python")


def sample_windows(text: HeldOutText, tokenizer: Tokenizer, vocab_size: int, max_context_tokens: int) -> EvaluationSet:
    """Windows spread evenly over the text: as many as the vocabulary allows, see MAX_SCORE_BYTES.

    Args:
        max_context_tokens: the least of what the model and the runtimes allow.

    Raises:
        ModelError: the text or the context is too short.
    """
    token_ids = tokenizer.encode(text.text, add_special_tokens=False)
    prefix = _prefix(tokenizer)
    window_tokens = min(MAX_WINDOW_TOKENS, max_context_tokens // 2 - len(prefix), len(token_ids))
    if window_tokens < MIN_WINDOW_TOKENS:
        raise ModelError(
            f"quality needs windows of {MIN_WINDOW_TOKENS} tokens or more; the held-out text has {len(token_ids)} "
            f"and half the context is {max_context_tokens // 2}"
        )
    max_tokens = min(MAX_TOKENS, max(MIN_TOKENS, MAX_SCORE_BYTES // (4 * vocab_size)))
    starts = _spread_starts(len(token_ids), window_tokens, max(1, max_tokens // window_tokens))
    windows = tuple((*prefix, *token_ids[start : start + window_tokens]) for start in starts)
    prompt_tokens = min(PROMPT_TOKENS, window_tokens)
    prompts = tuple(
        (*prefix, *token_ids[start : start + prompt_tokens])
        for start in _spread_starts(len(token_ids), prompt_tokens, NUM_PROMPTS)
    )
    return EvaluationSet(
        windows=windows,
        num_unscored=len(prefix) + 1,
        window_bytes=tuple(_scored_bytes(tokenizer, window[len(prefix) :]) for window in windows),
        prompts=prompts,
        greedy_tokens=min(GREEDY_TOKENS, max_context_tokens - len(prefix) - prompt_tokens),
        origin=text.origin,
    )


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    starts = range(len(whole) - len(plain) + 1)
    return next((tuple(whole[:start]) for start in starts if whole[start : start + len(plain)] == plain), ())


def _spread_starts(num_tokens: int, window_tokens: int, max_windows: int) -> list[int]:
    """Starts of non-overlapping windows at equal distances, shuffled: any first few cover the whole text."""
    num_fitting = num_tokens // window_tokens
    num_windows = min(num_fitting, max_windows)
    starts = [index * num_fitting // num_windows * window_tokens for index in range(num_windows)]
    random.Random(0).shuffle(starts)
    return starts


def _scored_bytes(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Bytes of the text of all tokens but the first; both are decoded from the start of a text."""
    return max(1, len(tokenizer.decode(tokens).encode()) - len(tokenizer.decode(tokens[:1]).encode()))
