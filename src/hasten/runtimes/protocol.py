"""What `process.RuntimeProcess` and its worker say to each other, and how it lies in the pipe.

A message is a msgspec Struct in MessagePack behind its length in four bytes, little endian.
Commands go to the worker's stdin; replies come through a pipe of their own, so that whatever a
library prints to stdout goes to the log and cannot corrupt them. Nothing is pickled.

The worker answers each command but Cancel with replies that end in Done or Failed. A closed
stdin tells it to end, which is also how it learns that its parent died.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from hasten.request import Request, TokenEvent
from hasten.runtimes.base import OperatorSample, RuntimeConfig


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


Command = Load | Generate | Cancel | Score | Trace | Record | MeasureMemory
Reply = Loaded | Token | Scored | Traced | Recorded | MemoryMeasured | Done | Failed

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # the only foreign type in a message is Path
M = TypeVar("M")


def decoder(messages: Any) -> msgspec.msgpack.Decoder:
    """A decoder of Command or of Reply."""
    return msgspec.msgpack.Decoder(messages, dec_hook=lambda cls, value: cls(value))


def write_message(pipe: BinaryIO, message: Command | Reply) -> None:
    """Writes a whole message; `pipe` must be unbuffered or is flushed here."""
    body = _encoder.encode(message)
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def read_message(pipe: BinaryIO, messages: msgspec.msgpack.Decoder) -> Any:
    """The next message, None at the end of the pipe or in a message that was cut off."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = pipe.read(length)
    return messages.decode(body) if len(body) == length else None
