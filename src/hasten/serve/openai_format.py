"""What the OpenAI API's answers look like: whole ones, and the chunks of a stream.

A chunk's constant parts are encoded once for each choice, so that a token costs the encoding of its
text. Chunks with log-probabilities, and answers that are not streamed, are encoded from dictionaries.
Token ids stand where vLLM has them.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec

from hasten.request import FinishReason
from hasten.serve.openai_chat_models import ChatCompletionRequest, ToolChoice
from hasten.serve.openai_models import SamplingFields
from hasten.serve.pieces import Piece, TokenLogprob
from hasten.serve.service import Generation, Service
from hasten.serve.tool_calls import ToolCall, ToolReader

encode = msgspec.json.encode
NO_USAGE = b',"usage":null}\n\n'  # no text has these bytes, since JSON escapes line breaks


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Tokens that a request took."""
    num_prompt_tokens = sum(each.num_prompt_tokens for each in generations)
    num_tokens = sum(each.num_tokens for each in generations)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(each.num_cached_tokens or 0 for each in generations)},
    }


class Choice:
    """One choice of an answer that is not streamed, put together from its pieces."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason

    @property
    def text(self) -> str:
        return "".join(self._texts)


class AnswerFormat(ABC):
    """The form of one request's answer.

    Args:
        request_id: the HTTP request's.
        body: says whether chunks have a "usage", null but in the last one or that so far, and whether there are
            token ids.
        prompts: their token ids.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self, request_id: str, service: Service, body: SamplingFields, prompts: Sequence[Sequence[int]]
    ) -> None:
        self._id = self.id_prefix + request_id
        self._model = service.model_name
        self._created = int(time.time())
        self._tokenizer = service.tokenizer
        self._include_usage = body.include_usage
        self._has_usage_so_far = body.stream_options is not None and body.stream_options.continuous_usage_stats
        self._has_token_ids = body.return_token_ids
        self._n = body.n
        self._prompts = prompts
        self._plain: dict[int, list[bytes]] = {}  # of each choice, what is around a chunk's text and token ids
        head = encode(self._head(self.chunk_kind))[:-1]
        self._before_choice = b"data: " + head + b',"choices":['
        self._after_choices = NO_USAGE if body.include_usage else b"}\n\n"

    def events(self, pieces: Sequence[Piece], generations: Sequence[Generation]) -> bytes:
        """Those of pieces that came together."""
        events = self.chunk(pieces[0]) if len(pieces) == 1 else b"".join(map(self.chunk, pieces))
        if self._has_usage_so_far:
            return events.replace(NO_USAGE, b',"usage":' + encode(usage(generations)) + b"}\n\n")
        return events

    def chunk(self, piece: Piece) -> bytes:
        """The event, or events, of a piece, whose index is the choice's."""
        parts = self._plain.get(piece.index)
        if parts is None:
            self._plain[piece.index] = self._parts(piece.index)
            return self._first_chunk(piece)
        if piece.finish_reason is not None or piece.logprobs:
            return self._event(self._piece_choice(piece))
        if self._has_token_ids:
            return parts[0] + encode(piece.text) + parts[1] + encode(piece.token_ids) + parts[2]
        return parts[0] + encode(piece.text) + parts[1]

    def usage_event(self, generations: Sequence[Generation]) -> bytes:
        """The last event of a stream with include_usage; nothing without."""
        if not self._include_usage:
            return b""
        body = self._head(self.chunk_kind) | {"choices": [], "usage": usage(generations)}
        return b"data: " + encode(body) + b"\n\n"

    def answer(self, choices: Iterable[Choice], generations: Sequence[Generation]) -> bytes:
        """The whole answer."""
        made = []
        for index, choice in enumerate(choices):
            logprobs = self._logprobs(index, choice.logprobs) if choice.logprobs else None
            made.append(self._whole_choice(index, choice.text, logprobs, choice.finish_reason))
            if self._has_token_ids:
                made[-1]["token_ids"] = choice.token_ids
        body = self._head(self.kind) | {"choices": made, "usage": usage(generations)}
        return encode(self._with_prompts(body))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _parts(self, index: int) -> list[bytes]:
        """What a chunk without log-probabilities and finish_reason has around its text and its token ids."""
        choice = self._delta_choice(index, "\0", None, None)
        if self._has_token_ids:
            choice["token_ids"] = "\0"
        return self._event(choice).split(encode("\0"))

    def _piece_choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.index, piece.logprobs) if piece.logprobs else None
        choice = self._delta_choice(piece.index, piece.text, logprobs, piece.finish_reason)
        if self._has_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _event(self, choice: dict[str, Any], more: bytes = b"") -> bytes:
        """One event. `more` are fields beside its choices."""
        return self._before_choice + encode(choice) + b"]" + more + self._after_choices

    @abstractmethod
    def _first_chunk(self, piece: Piece) -> bytes:
        """The events of the first piece of a choice."""

    @abstractmethod
    def _with_prompts(self, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer with the prompts' token ids, if they are asked for."""

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

    def __init__(
        self, request_id: str, service: Service, body: SamplingFields, prompts: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(request_id, service, body, prompts)
        self._offsets: dict[int, int] = {}  # of each choice, characters of the tokens so far

    def _first_chunk(self, piece: Piece) -> bytes:
        if not self._has_token_ids:
            return self.chunk(piece)
        return self._event(self._piece_choice(piece) | {"prompt_token_ids": self._prompts[piece.index // self._n]})

    def _with_prompts(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._has_token_ids:
            for choice in body["choices"]:
                choice["prompt_token_ids"] = self._prompts[choice["index"] // self._n]
        return body

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
            "top_logprobs": [
                None if each.logprob is None else {text_of(token_id): logprob for token_id, logprob in each.top}
                for each in logprobs
            ],
            "text_offset": offsets,
        }


class ChatFormat(AnswerFormat):
    """Of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def _first_chunk(self, piece: Piece) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
        prompt = b',"prompt_token_ids":' + encode(self._prompts[0]) if self._has_token_ids else b""
        return self._event(choice, prompt) + self.chunk(piece)

    def _with_prompts(self, body: dict[str, Any]) -> dict[str, Any]:
        return body | {"prompt_token_ids": self._prompts[0]} if self._has_token_ids else body

    def _delta_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish_reason}

    def _whole_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            text = self._tokenizer.text_of(token_id)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]}
            for each in logprobs
        ]
        return {"content": content, "refusal": None}


class ToolChatFormat(ChatFormat):
    """Of a chat whose answer may call tools: calls are told from the text, and sent whole at the end of a choice."""

    def __init__(
        self, request_id: str, service: Service, body: ChatCompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(request_id, service, body, prompts)
        self._new_reader = body.tool_reader
        self._is_named = isinstance(body.tool_choice, ToolChoice)
        self._readers: dict[int, ToolReader] = {}
        self._calls: dict[int, list[ToolCall]] = {}

    def events(self, pieces: Sequence[Piece], generations: Sequence[Generation]) -> bytes:
        return super().events([self._without_calls(piece) for piece in pieces], generations)

    def chunk(self, piece: Piece) -> bytes:
        if piece.index not in self._plain:
            return super().chunk(piece)  # tells the role and calls this again
        calls = self._calls.get(piece.index)
        if not calls:
            has_something = piece.text or piece.logprobs or piece.finish_reason or self._has_token_ids
            return super().chunk(piece) if has_something else b""
        delta = {"tool_calls": [{"index": index} | _described(call) for index, call in enumerate(calls)]}
        choice = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._event(choice) + super().chunk(piece)

    def _without_calls(self, piece: Piece) -> Piece:
        """The piece with the text that is certain to be no part of a call; the last one tells the calls as well."""
        reader = self._readers.get(piece.index)
        if reader is None:
            reader = self._readers[piece.index] = self._new_reader()
        text = reader.add(piece.text)
        if piece.finish_reason is not None:
            rest, self._calls[piece.index] = reader.finish()
            text += rest
        return msgspec.structs.replace(piece, text=text)

    def _delta_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        reason = self._reason(finish_reason, self._calls.get(index))
        return super()._delta_choice(index, text, logprobs, reason)

    def _whole_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        reader = self._new_reader()
        content = reader.add(text)
        rest, calls = reader.finish()
        choice = super()._whole_choice(index, content + rest, logprobs, self._reason(finish_reason, calls))
        if calls:
            called = {"content": content.strip() or None, "tool_calls": [_described(call) for call in calls]}
            choice["message"] |= called
        return choice

    def _reason(self, finish_reason: str | None, calls: Sequence[ToolCall] | None) -> str | None:
        """That an answer called, where that was the model's decision."""
        return "tool_calls" if finish_reason == "stop" and calls and not self._is_named else finish_reason


def _described(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}
