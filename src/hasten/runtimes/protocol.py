"""What `process.RuntimeProcess` and its worker say to each other, and how it lies in the pipe.

A message is a msgspec Struct in MessagePack behind its length in four bytes, little endian.
Commands go to the worker's stdin; replies come through a pipe of their own, so that whatever a
library prints to stdout goes to the log and cannot corrupt them. Nothing is pickled. The engine
process (`serve.messages`) frames its own messages in the same way.

The worker answers each command but Cancel with replies that end in Done or Failed. A closed
stdin tells it to end, which is also how it learns that its parent died.
"""

import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from hasten import errors
from hasten.errors import HastenError, RuntimeFailedError
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import LoadingPart, OperatorSample, RuntimeConfig


class Load(msgspec.Struct, tag=True, frozen=True):
    runtime: str
    config: RuntimeConfig


class Generate(msgspec.Struct, tag=True, frozen=True):
    requests: tuple[Request, ...]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class Score(msgspec.Struct, tag=True, frozen=True):
    token_ids: tuple[tuple[int, ...], ...]
    out_dir: Path


class Trace(msgspec.Struct, tag=True, frozen=True):
    requests: tuple[Request, ...]


class Record(msgspec.Struct, tag=True, frozen=True):
    requests: tuple[Request, ...]
    path: Path


class MeasureMemory(msgspec.Struct, tag=True, frozen=True):
    reset: bool


class Loading(msgspec.Struct, tag=True, frozen=True):
    """See base.OnLoading."""

    part: LoadingPart
    done: int
    total: int


class Loaded(msgspec.Struct, tag=True, frozen=True):
    weight_bytes_per_token: int | None


class Token(msgspec.Struct, tag=True, frozen=True):
    event: TokenEvent


class Scored(msgspec.Struct, tag=True, frozen=True):
    path: Path


class Traced(msgspec.Struct, tag=True, frozen=True):
    operators: tuple[OperatorSample, ...]


class Recorded(msgspec.Struct, tag=True, frozen=True):
    is_written: bool


class MemoryMeasured(msgspec.Struct, tag=True, frozen=True):
    peak_device_bytes: int | None


class Done(msgspec.Struct, tag=True, frozen=True):
    pass


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The command raised.

    Args:
        error: the class's name in hasten.errors, None if it was any other exception.
    """

    error: str | None
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failed":
        """What to send about an exception."""
        if isinstance(error, HastenError):
            return cls(type(error).__name__, str(error))
        lines = str(error).strip().splitlines() or [""]
        return cls(None, f"{type(error).__name__}: {lines[0]}")

    def exception(self, runtime: str, log_hint: str = "") -> HastenError:
        """The error to raise on this side."""
        if self.error is None:
            return RuntimeFailedError(f"the {runtime} runtime failed: {self.message}{log_hint}")
        found: type[HastenError] = getattr(errors, self.error)
        return found(self.message)


Command = Load | Generate | Cancel | Score | Trace | Record | MeasureMemory
Reply = Loading | Loaded | Token | Scored | Traced | Recorded | MemoryMeasured | Done | Failed

LOADING_EVERY_S = 0.1

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # the only foreign type in a message is Path


def decoder(messages: Any) -> msgspec.msgpack.Decoder:
    """A decoder of a union of messages, such as Command or Reply."""
    return msgspec.msgpack.Decoder(messages, dec_hook=lambda cls, value: cls(value))


def frame(message: msgspec.Struct) -> bytes:
    """A message as it lies in the pipe.

    Raises:
        OverflowError: a number has more than 64 bits.
        UnicodeEncodeError: a string is not Unicode text (lone surrogates).
    """
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def write_message(pipe: BinaryIO, message: msgspec.Struct) -> None:
    """Writes a whole message; `pipe` must be unbuffered or is flushed here."""
    pipe.write(frame(message))
    pipe.flush()


def read_message(pipe: BinaryIO, messages: msgspec.msgpack.Decoder) -> Any:
    """The next message, None at the end of the pipe or in a message that was cut off."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = pipe.read(length)
    return messages.decode(body) if len(body) == length else None


class LoadingReporter:
    """An OnLoading that sends the end of each part of loading, and before it no more than LOADING_EVERY_S allows."""

    def __init__(self, send: Callable[[Loading], object]) -> None:
        self._send = send
        self._sent_s = -math.inf

    def __call__(self, part: LoadingPart, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done == total or now_s - self._sent_s >= LOADING_EVERY_S:
            self._sent_s = now_s
            self._send(Loading(part, done, total))


class MessageSplitter:
    """Cuts a stream of bytes, in whatever pieces it comes, into messages."""

    def __init__(self, messages: msgspec.msgpack.Decoder) -> None:
        self._decoder = messages
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that these bytes complete."""
        self._buffer += data
        messages: list[Any] = []
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, start)
                end = start + _LENGTH.size + length
                if end > len(view):
                    break
                messages.append(self._decoder.decode(view[start + _LENGTH.size : end]))
                start = end
        del self._buffer[:start]
        return messages
