"""Token events of one continuation into pieces of text, as they are streamed.

The pieces of a continuation, joined, are the text that `runtimes.text` makes of the same tokens: no
half characters, nothing of a stop string or after one, special tokens left out. Tokens whose text is
held back belong to the next piece, so the pieces' token ids, joined, are all that were generated.
Events that come together are one piece: a reader that is slower than the engine gets longer pieces.

Not here: which requests run (`service`), and what a protocol writes on the wire.
"""

import math
from itertools import islice
from typing import TYPE_CHECKING

import msgspec
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from hasten.request import FinishReason, SamplingParams, TokenEvent
from hasten.runtimes.stop_strings import StopMatcher

if TYPE_CHECKING:  # it needs transformers, which Triton's Python backend is without
    from hasten.runtimes.text import Detokenizer

# of the tokens before the held ones, how many decide how those are joined to the text before
CONTEXT_TOKENS = 4


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token's log-probability, None of a prompt's first, and the most probable tokens in its place, best first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Piece(msgspec.Struct, frozen=True):
    """What became certain of one continuation.

    Args:
        index: which of the request's n continuations, from 0.
        token_ids: of the text, and of what has none (an end-of-sequence token).
        logprobs: one a token, if the request asked for them.
        finish_reason: "stop" or "length" on the continuation's last piece, None before.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class RustDetokenizer:
    """As `runtimes.text.Detokenizer`, in Rust. Its calls take a microsecond."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._num_out = 0  # of them, those whose text is out

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._token_ids.append(token_id)
        text: str | None = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._num_out = len(self._token_ids)
        return text

    def flush(self) -> str:
        """What was held back: bytes that never became a character."""
        start, end = max(0, self._num_out - CONTEXT_TOKENS), self._num_out
        before = self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=True)
        text: str = self._tokenizer.decode(self._token_ids[start:], skip_special_tokens=True)
        self._num_out = len(self._token_ids)
        return text[len(before) :]


class Echo(msgspec.Struct, frozen=True):
    """A prompt that goes before its continuations: its text and its tokens."""

    text: str
    token_ids: tuple[int, ...]


class ContinuationText:
    """One continuation while it grows. It is over once `finish_reason` is set.

    Attributes:
        num_tokens: generated so far.
        last_token_s: `time_s` of the last one.
    """

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        detokenizer: "Detokenizer | RustDetokenizer",
        echo: Echo | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self.last_token_s = math.nan
        self._index = index
        self._wants_logprobs = sampling.logprobs is not None
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        self._text = echo.text if echo is not None else ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._echoed = iter(echo.token_ids if echo is not None else ())
        if sampling.prompt_logprobs is not None:
            self._logprobs += [TokenLogprob(first, None, ()) for first in islice(self._echoed, 1)]

    def add(self, event: TokenEvent) -> None:
        """Takes the next event; after the end of the continuation there must be none."""
        token_id = event.token_id
        if event.prompt_logprobs is not None:
            scored = zip(event.prompt_logprobs, self._echoed, strict=False)
            self._logprobs += [TokenLogprob(echoed, *found) for found, echoed in scored]
        if token_id is not None:
            self.num_tokens += 1
            self.last_token_s = event.time_s
            self._token_ids.append(token_id)
            if self._wants_logprobs and event.logprob is not None:
                self._logprobs.append(TokenLogprob(token_id, event.logprob, event.top_logprobs))
            if event.finish_reason != "stop":  # an end-of-sequence or stop token is no text
                self._write(self._detokenizer.add(token_id))
        if event.finish_reason is not None and self.finish_reason is None:
            self._write(self._detokenizer.flush())
            self.finish_reason = self.finish_reason or event.finish_reason
            if self._matcher is not None:
                self._text += self._matcher.flush()

    def take(self) -> Piece | None:
        """What has become certain since the last call, None if it is nothing that a reader would see."""
        if not (self._text or self._logprobs or self.finish_reason):
            return None
        piece = Piece(self._index, self._text, tuple(self._token_ids), tuple(self._logprobs), self.finish_reason)
        self._text = ""
        self._token_ids = []
        self._logprobs = []
        return piece

    def _write(self, text: str) -> None:
        if self._matcher is not None and self.num_tokens > self._min_tokens:
            text = self._matcher.add(text)
            if self._matcher.is_stopped:
                self.finish_reason = "stop"
        self._text += text
