"""How messages lie in a pipe."""

import io
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hasten.errors import EngineUnavailableError, HastenError, ModelNotFoundError, RuntimeFailedError, UsageError
from hasten.runtimes.protocol import (
    Cancel,
    Command,
    Failed,
    Loading,
    LoadingReporter,
    MessageSplitter,
    decoder,
    frame,
    read_message,
)


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), max_size=20),
    cuts=st.lists(st.integers(0, 4000), max_size=30),
)
def test_messages_come_whole_and_in_order_however_the_bytes_are_cut(names: list[str], cuts: list[int]) -> None:
    messages = [Cancel(name) for name in names]
    data = b"".join(map(frame, messages))
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    splitter = MessageSplitter(decoder(Command))
    heard = [message for start, end in pairwise(borders) for message in splitter.feed(data[start:end])]
    assert heard == messages


def test_a_message_that_was_cut_off_is_the_end() -> None:
    data = frame(Cancel("a")) + frame(Cancel("b"))
    pipe = io.BytesIO(data[:-1])
    assert read_message(pipe, decoder(Command)) == Cancel("a")
    assert read_message(pipe, decoder(Command)) is None


@pytest.mark.parametrize("cls", [HastenError, UsageError, ModelNotFoundError, EngineUnavailableError])
def test_an_error_is_of_its_class_on_the_other_side(cls: type[HastenError]) -> None:
    received = Failed.of(cls("what went wrong")).exception("fake")
    assert (type(received), str(received)) == (cls, "what went wrong")


def test_any_other_exception_is_named_by_its_first_line() -> None:
    received = Failed.of(ValueError("first\nsecond")).exception("fake", " (log: x)")
    assert isinstance(received, RuntimeFailedError)
    assert str(received) == "the fake runtime failed: ValueError: first (log: x)"


def test_loading_is_reported_now_and_then_and_at_the_end_of_each_part() -> None:
    sent: list[Loading] = []
    report = LoadingReporter(sent.append)
    for done in range(1, 1001):
        report("read", done, 1000)
    report("capture", 3, 3)
    assert sent[0] == Loading("read", 1, 1000)
    assert sent[-2:] == [Loading("read", 1000, 1000), Loading("capture", 3, 3)]
    assert len(sent) < 20
