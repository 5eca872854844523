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

TAG = "<tool_call>"

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>\s*|\Z)", re.DOTALL)
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
        self._held = ""
        self._has_text = False

    def add(self, text: str) -> str:
        self._held += text
        begin = self._held.lstrip()[:1]
        if not self._has_text and begin in ("", "{", "["):
            return ""
        tag = self._held.find(TAG)
        end = len(self._held) - _overlap(self._held, TAG) if tag < 0 else tag
        text, self._held = self._held[:end], self._held[end:]
        self._has_text |= bool(text.strip())
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        calls = list(_calls(self._held, self._names))
        return ("", calls[: self._max_calls]) if calls else (self._held, [])


class NamedReader(ToolReader):
    """Of a model that could only write the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._arguments = ""

    def add(self, text: str) -> str:
        self._arguments += text
        return ""

    def finish(self) -> tuple[str, list[ToolCall]]:
        return "", [ToolCall(self._name, self._arguments)]


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of a text that may be the beginning of a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _calls(text: str, names: Collection[str]) -> Iterator[ToolCall]:
    """The calls that a text consists of; none if anything in it is no call."""
    parts = _TAGGED.findall(text) if text.startswith(TAG) else [text]
    if text.startswith(TAG) and _TAGGED.sub("", text):
        return
    try:
        values = [value for part in parts for value in _json_values(part)]
    except (ValueError, RecursionError):
        return
    calls = [_call(value, names) for value in values]
    if None not in calls:
        yield from (call for call in calls if call is not None)


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
