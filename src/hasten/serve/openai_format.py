"""What the OpenAI API's answers look like: whole ones, and the chunks of a stream.

A chunk's constant parts are encoded once for each choice, so that a token costs the encoding of its
text. Chunks with log-probabilities, and answers that are not streamed, are encoded from dictionaries.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec

from hasten.request import FinishReason
from hasten.serve.pieces import Piece, TokenLogprob
from hasten.serve.service import Service

encode = msgspec.json.encode


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    """Tokens that a request took."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


class Choice:
    """One choice of an answer that is not streamed, put together from its pieces."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason

    @property
    def text(self) -> str:
        return "".join(self._texts)


class AnswerFormat(ABC):
    """The form of one request's answer.

    Args:
        request_id: the HTTP request's.
        include_usage: whether chunks have a "usage", null but in the last one.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, request_id: str, service: Service, *, include_usage: bool) -> None:
        self._id = self.id_prefix + request_id
        self._model = service.model_name
        self._created = int(time.time())
        self._tokenizer = service.tokenizer
        self._include_usage = include_usage
        self._plain: dict[int, tuple[bytes, bytes]] = {}  # of each choice, what is around a chunk's text
        head = encode(self._head(self.chunk_kind))[:-1]
        self._before_choice = b"data: " + head + b',"choices":['
        self._after_choice = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def chunk(self, piece: Piece) -> bytes:
        """The event, or events, of a piece, whose index is the choice's."""
        index = piece.index
        parts = self._plain.get(index)
        if parts is None:
            text_mark = encode(self._delta_choice(index, "\0", None, None)).partition(encode("\0"))
            parts = self._plain[index] = (self._before_choice + text_mark[0], text_mark[2] + self._after_choice)
            return self._first_event(index) + self.chunk(piece)
        if piece.finish_reason is None and not piece.logprobs:
            return parts[0] + encode(piece.text) + parts[1]
        logprobs = self._logprobs(index, piece.logprobs) if piece.logprobs else None
        return self._event(self._delta_choice(index, piece.text, logprobs, piece.finish_reason))

    def usage_event(self, num_prompt_tokens: int, num_tokens: int) -> bytes:
        """The last event of a stream with include_usage; nothing without."""
        if not self._include_usage:
            return b""
        body = self._head(self.chunk_kind) | {"choices": [], "usage": usage(num_prompt_tokens, num_tokens)}
        return b"data: " + encode(body) + b"\n\n"

    def answer(self, choices: Iterable[Choice], num_prompt_tokens: int, num_tokens: int) -> bytes:
        """The whole answer."""
        made = [
            self._whole_choice(
                index,
                choice.text,
                self._logprobs(index, choice.logprobs) if choice.logprobs else None,
                choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ]
        return encode(self._head(self.kind) | {"choices": made, "usage": usage(num_prompt_tokens, num_tokens)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _event(self, choice: dict[str, Any]) -> bytes:
        return self._before_choice + encode(choice) + self._after_choice

    def _first_event(self, index: int) -> bytes:
        """What comes before the first piece of a choice."""
        return b""

    @abstractmethod
    def _delta_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """A choice in a chunk."""

    @abstractmethod
    def _whole_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """A choice in a whole answer."""

    @abstractmethod
    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities of the next tokens of a choice."""


class CompletionFormat(AnswerFormat):
    """Of /v1/completions."""

    id_prefix = "cmpl-"
    kind = chunk_kind = "text_completion"

    def __init__(self, request_id: str, service: Service, *, include_usage: bool) -> None:
        super().__init__(request_id, service, include_usage=include_usage)
        self._offsets: dict[int, int] = {}  # of each choice, characters of the tokens so far

    def _delta_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    _whole_choice = _delta_choice

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        text_of = self._tokenizer.text_of
        tokens = [text_of(each.token_id) for each in logprobs]
        offset = self._offsets.get(index, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [{text_of(token_id): logprob for token_id, logprob in each.top} for each in logprobs],
            "text_offset": offsets,
        }


class ChatFormat(AnswerFormat):
    """Of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def _first_event(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _delta_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish_reason}

    def _whole_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            text = self._tokenizer.text_of(token_id)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]}
            for each in logprobs
        ]
        return {"content": content, "refusal": None}
