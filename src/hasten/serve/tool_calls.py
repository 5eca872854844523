"""Calls of tools in what a model writes.

A call is a JSON object with the name of a tool that the request offers and an object of arguments (or parameters,
as Llama's templates say). It counts where models write one: between <tool_call> tags (Qwen, Hermes), or as the
whole answer, alone, in an array or one behind the other (Llama 3, Mistral).
"""

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

TAG, END_TAG = "<tool_call>", "</tool_call>"

_BETWEEN = re.compile(r"[\s;,]*")
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Args:
        arguments: JSON.
        call_id: what the tool's answer will refer to.
    """

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolReader(ABC):
    """Tells an answer's text from its calls, while it is written."""

    @abstractmethod
    def add(self, text: str) -> str:
        """Takes what was written next; returns what is certain to be no part of a call."""

    @abstractmethod
    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""


class FreeReader(ToolReader):
    """Of a model that decides whether to call, and what.

    Args:
        names: of the tools that there are.
        max_calls: None is no limit; calls beyond are left out.
    """

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        self._names, self._max_calls = names, max_calls
        self._has_text = False
        self._begun = ""  # what may become a tag
        self._held: list[str] = []  # what may be calls, to the end

    def add(self, text: str) -> str:
        if self._held:
            self._held.append(text)
            return ""
        text = self._begun + text
        start = self._start(text)
        self._begun = text[start:]
        if self._begun.startswith((TAG, "{", "[")):
            self._held, self._begun = [self._begun], ""
        self._has_text |= bool(text[:start].strip())
        return text[:start]

    def finish(self) -> tuple[str, list[ToolCall]]:
        held = "".join(self._held) or self._begun
        calls = list(_calls(held, self._names))
        return ("", calls[: self._max_calls]) if calls else (held, [])

    def _start(self, text: str) -> int:
        """Where what may be calls starts."""
        first = len(text) - len(text.lstrip())
        if not self._has_text and text[first : first + 1] in ("{", "["):
            return first
        tag = text.find(TAG)
        return len(text) - _overlap(text, TAG) if tag < 0 else tag


class NamedReader(ToolReader):
    """Of a model that could only write the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._arguments: list[str] = []

    def add(self, text: str) -> str:
        self._arguments.append(text)
        return ""

    def finish(self) -> tuple[str, list[ToolCall]]:
        return "", [ToolCall(self._name, "".join(self._arguments))]


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of a text that may be the beginning of a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _calls(text: str, names: Collection[str]) -> Iterator[ToolCall]:
    """The calls that a text consists of; none if anything in it is no call."""
    try:
        values = [value for part in _parts(text) for value in _json_values(part)]
    except (ValueError, RecursionError):
        return
    calls = [_call(value, names) for value in values]
    if None not in calls:
        yield from (call for call in calls if call is not None)


def _parts(text: str) -> Iterator[str]:
    """What is between tags, or the text if it has none. Raises ValueError for text beside tags."""
    start = 0
    while text.startswith(TAG, start):
        end = text.find(END_TAG, start)
        end = len(text) if end < 0 else end
        yield text[start + len(TAG) : end]
        start = _skip(text, end + len(END_TAG))
    if start == 0:
        yield text
    elif start < len(text):
        raise ValueError("text behind a tag")


def _json_values(text: str) -> Iterator[Any]:
    """The values of a text that are written one behind the other, those of arrays singly."""
    start = _skip(text, 0)
    while start < len(text):
        value, start = _decoder.raw_decode(text, start)
        yield from value if isinstance(value, list) else [value]
        start = _skip(text, start)


def _skip(text: str, start: int) -> int:
    found = _BETWEEN.match(text, start)
    return start if found is None else found.end()


def _call(value: Any, names: Collection[str]) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not (isinstance(name, str) and name in names and isinstance(arguments, dict)):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
