"""What is sent to a server and what its answer says, for each API that streams text.

`OpenAIEndpoint` is completions and chat of OpenAI's API and of those who speak it (vLLM, llama.cpp,
hasten); `KServeEndpoint` is Triton's generate_stream extension of KServe v2, whose gRPC is in
`kserve_messages`. Every request asks for exactly its number of tokens, greedily; `optional` are fields that not
every server takes, and `probe` finds out which it does. Knows bytes, not sockets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec

from hasten.bench.arrivals import MAX_LENGTH
from hasten.bench.sse import timed_events
from hasten.bench.token_times import Chunk

IGNORE_EOS = "ignore_eos"
USAGE = "stream_options"
TOKEN_IDS = "return_token_ids"
OPENAI_OPTIONAL = (TOKEN_IDS, IGNORE_EOS, USAGE)
COUNTS = ("return_num_input_tokens", "return_num_output_tokens")
DONE = b"[DONE]"
PromptCount = Annotated[int, msgspec.Meta(ge=0, le=MAX_LENGTH)]
MAX_COUNT = 1 << 20  # a time is kept for each token that a server counts, so a wrong count must not be believed


@dataclass(frozen=True, slots=True)
class OnlineRequest:
    """One request to a server.

    Args:
        prompt: text, or token ids where the API takes them.
        num_prompt_tokens: as planned; what the server counts replaces it in the record.
        num_tokens: output tokens to ask for.
        arrival_s: when to send it, from the start of the run; None is as soon as a client is free.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    num_prompt_tokens: int
    num_tokens: int
    arrival_s: float | None = None


@dataclass(frozen=True)
class Answer:
    """What one streamed answer said.

    Args:
        num_tokens, num_prompt_tokens: as the server counted them, None where it does not say.
        num_cached_tokens: of the prompt, which the server had in its prefix cache; likewise.
        finish_reason: "length" or "stop" of an answer that ended as it should.
        error: one sentence; None for an answer that is whole.
    """

    chunks: tuple[Chunk, ...]
    num_tokens: int | None
    num_prompt_tokens: int | None
    finish_reason: str | None
    error: str | None
    num_cached_tokens: int | None = None


class Endpoint(Protocol):
    """One model behind one API."""

    @property
    def path(self) -> str: ...

    def body(self, request: OnlineRequest) -> bytes: ...

    def read(self, times_s: Sequence[float], parts: Sequence[bytes]) -> Answer:
        """Of an answer with status 200: its body as it was read."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: PromptCount | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: PromptCount | None = None
    completion_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)] | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _OpenAIChunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class KServeChunk(msgspec.Struct):
    """One response of a KServe stream: the outputs that are measured, or an error."""

    text_output: str | list[str] | None = None
    num_input_tokens: int | list[int] | None = None
    num_output_tokens: int | list[int] | None = None
    error: Any = None


_openai = msgspec.json.Decoder(_OpenAIChunk)
_kserve = msgspec.json.Decoder(KServeChunk)


@dataclass(frozen=True)
class OpenAIEndpoint:
    """OpenAI's completions or chat.

    Args:
        optional: those of OPENAI_OPTIONAL to send.
    """

    model: str
    is_chat: bool = False
    optional: tuple[str, ...] = OPENAI_OPTIONAL

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, request: OnlineRequest) -> bytes:
        values = {TOKEN_IDS: True, IGNORE_EOS: True, USAGE: {"include_usage": True}}
        prompt = (
            {"messages": [{"role": "user", "content": request.prompt}]} if self.is_chat else {"prompt": request.prompt}
        )
        fields = {"model": self.model, **prompt, "max_tokens": request.num_tokens, "temperature": 0, "stream": True}
        return msgspec.json.encode(fields | {name: values[name] for name in self.optional})

    def read(self, times_s: Sequence[float], parts: Sequence[bytes]) -> Answer:
        chunks: list[Chunk] = []
        usage, finish_reason, error, is_done = _Usage(), None, None, False
        for time_s, data in timed_events(times_s, parts):
            if data == DONE:
                is_done = True
                break
            try:
                event = _openai.decode(data)
            except msgspec.DecodeError:
                error = "the server sent an event that is not a chunk of OpenAI's API"
                break
            if event.error is not None:
                error = f"the server reported: {error_text(event.error)}"
                break
            usage = event.usage or usage
            for choice in event.choices:
                delta = choice.delta
                text = choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)) or ""
                if text or choice.token_ids:
                    num_tokens = None if choice.token_ids is None else len(choice.token_ids)
                    chunks.append(Chunk(time_s, len(text), num_tokens))
                finish_reason = choice.finish_reason or finish_reason
        if error is None and not is_done:
            error = "the stream ended without [DONE]"
        details = usage.prompt_tokens_details or _PromptDetails()
        counts = (usage.completion_tokens, usage.prompt_tokens)
        return Answer(tuple(chunks), *counts, finish_reason, error, details.cached_tokens)


@dataclass(frozen=True)
class KServeEndpoint:
    """Triton's generate_stream for a model with text_input, text_output, max_tokens and stream.

    Args:
        is_nested: whether what is not the prompt goes under "parameters", as Triton's vLLM backend has it.
        is_counted: whether to ask for the numbers of tokens, as Triton's vLLM and TensorRT-LLM backends take it.
    """

    model: str
    is_nested: bool = False
    is_counted: bool = True

    @property
    def path(self) -> str:
        return f"/v2/models/{self.model}/generate_stream"

    def body(self, request: OnlineRequest) -> bytes:
        fields = kserve_fields(request)
        if self.is_counted:
            fields |= dict.fromkeys(COUNTS, True)
        return msgspec.json.encode(
            {"text_input": request.prompt, **({"parameters": fields} if self.is_nested else fields)}
        )

    def read(self, times_s: Sequence[float], parts: Sequence[bytes]) -> Answer:
        return kserve_answer(_kserve_events(times_s, parts))


class NotAnAnswerError(Exception):
    """What came is not what the API sends, in one sentence."""


def kserve_fields(request: OnlineRequest) -> dict[str, Any]:
    """What a KServe model is asked for beside the prompt and the counts."""
    return {"stream": True, "max_tokens": request.num_tokens, "temperature": 0, IGNORE_EOS: True}


def kserve_answer(events: Iterable[tuple[float, KServeChunk]]) -> Answer:
    """The answer whose responses came at these times.

    Args:
        events: may raise NotAnAnswerError.
    """
    chunks: list[Chunk] = []
    num_prompt_tokens, error = None, None
    try:
        for time_s, event in events:
            if event.error is not None:
                error = f"the server reported: {error_text(event.error)}"
                break
            text = event.text_output if isinstance(event.text_output, str) else "".join(event.text_output or ())
            num_tokens = _count(event.num_output_tokens, MAX_COUNT, "one response")
            num_prompt_tokens = _count(event.num_input_tokens, MAX_LENGTH, "a prompt") or num_prompt_tokens
            if text or num_tokens:
                chunks.append(Chunk(time_s, len(text), num_tokens))
    except NotAnAnswerError as reason:
        error = str(reason)
    counts = [chunk.num_tokens for chunk in chunks if chunk.num_tokens is not None]
    total = sum(counts) if counts and len(counts) == len(chunks) else None
    return Answer(tuple(chunks), total, num_prompt_tokens, "length" if chunks else None, error)


def _kserve_events(times_s: Sequence[float], parts: Sequence[bytes]) -> Iterator[tuple[float, KServeChunk]]:
    for time_s, data in timed_events(times_s, parts):
        try:
            event = _kserve.decode(data)
        except msgspec.DecodeError as error:
            raise NotAnAnswerError("the server sent an event that is not an answer of generate_stream") from error
        yield time_s, event


def _count(value: int | list[int] | None, most: int, what: str) -> int | None:
    """Of a tensor of one element, which Triton writes with or without brackets. Raises NotAnAnswerError."""
    count = next(iter(value), None) if isinstance(value, list) else value
    if count is not None and not 0 <= count <= most:
        raise NotAnAnswerError(f"the server sent {count} as the number of tokens of {what}")
    return count


def error_text(error: Any) -> str:
    """The sentence in an error, in whichever of the usual forms it comes."""
    if isinstance(error, dict):
        return error_text(error.get("message") or error.get("error") or error.get("detail") or error)
    return " ".join(str(error).split())[:300]
