"""Calls are told from text, however the text is cut into pieces."""

import json
import random
import time
from typing import Any

import pytest

from hasten.serve.tool_calls import FreeReader, NamedReader, ToolReader

NAMES = {"weather", "add"}
WEATHER = '{"name": "weather", "arguments": {"city": "Zürich <tool_call>"}}'
ADD = '{"name": "add", "parameters": {"a": 1, "b": [2, {"c": "}"}]}}'
CALLS: list[Any] = [["weather", {"city": "Zürich <tool_call>"}], ["add", {"a": 1, "b": [2, {"c": "}"}]}]]


def read(reader: ToolReader, pieces: list[str]) -> tuple[str, list[list[Any]]]:
    text = "".join(map(reader.add, pieces))
    rest, calls = reader.finish()
    assert len({call.call_id for call in calls}) == len(calls)
    return text + rest, [[call.name, json.loads(call.arguments)] for call in calls]


def cuts(text: str) -> list[list[str]]:
    draw = random.Random(text)
    ends = sorted(draw.sample(range(len(text)), min(5, len(text))))
    return [[text], ["", *text], [text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True)]]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (ADD, "", CALLS[1:]),
        (f" \n{ADD}\n", " \n", CALLS[1:]),
        (f"[{WEATHER}, {ADD}]", "", CALLS),
        (f"{ADD}; {ADD}", "", CALLS[1:] * 2),
        (f"<tool_call>\n{ADD}\n</tool_call>", "", CALLS[1:]),
        (f"<tool_call>\n{ADD}\n</tool_call>\n<tool_call>{ADD}</tool_call>", "", CALLS[1:] * 2),
        (f"<tool_call>\n{ADD}", "", CALLS[1:]),
        (f"I look it up.\n<tool_call>{ADD}</tool_call>\n", "I look it up.\n", CALLS[1:]),
    ],
)
def test_calls_are_found(text: str, content: str, calls: list[Any]) -> None:
    for pieces in cuts(text):
        assert read(FreeReader(NAMES), pieces) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Hello.",
        "a < b <tool",
        '{"name": "weather", "arguments": {"city": "Bern"}',
        '{"name": "weather"}',
        '{"name": "weather", "arguments": "Bern"}',
        '{"name": "other", "arguments": {}}',
        '{"name": ["weather"], "arguments": {}}',
        f"{ADD} and so on",
        f"[{ADD}, 5]",
        "[]",
        "[1, 2, 3] is an array",
        f"It is {ADD}",
        "<tool_call>",
        "<tool_call>weather()</tool_call>",
        f"<tool_call>{ADD}</tool_call> and then?",
        "[" * 100_000,
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    for pieces in cuts(text):
        assert read(FreeReader(NAMES), pieces) == (text, [])


def test_text_is_passed_on_while_it_is_written() -> None:
    reader = FreeReader(NAMES)
    assert [reader.add(piece) for piece in ("Hello", " there <", "b> <tool", "_call>{")] == [
        "Hello",
        " there ",
        "<b> ",
        "",
    ]


@pytest.mark.parametrize(
    "text",
    [
        " " * 10**6,
        "<tool_call>" + " " * 10**6 + "a",
        "<tool_call></tool_call>" * 10**5,
        "{" * 10**6,
        '{"name": "add", "arguments": {"a": ' + "9" * 10**6,
        ADD * 10**4 + " ",
        "<tool_call" * 10**5,
    ],
    ids=lambda text: text[:24],
)
def test_long_answers_take_no_longer_than_their_length(text: str) -> None:
    start_s = time.process_time()
    read(FreeReader(NAMES), [text[start : start + 20] for start in range(0, len(text), 20)])
    assert time.process_time() - start_s < 2


def test_calls_beyond_the_limit_are_left_out() -> None:
    assert read(FreeReader(NAMES, max_calls=1), [f"{ADD}{ADD}"]) == ("", CALLS[1:])


def test_arguments_of_a_named_tool_are_all_that_is_written() -> None:
    reader = NamedReader("add")
    assert [reader.add('{"a":'), reader.add(" 1")] == ["", ""]
    text, [call] = reader.finish()
    assert (text, call.name, call.arguments) == (
        "",
        "add",
        '{"a": 1',
    )  # cut by max_tokens: the client sees how far it came
