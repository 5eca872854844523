from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ModelError
from hasten.evaluate.held_out import MAX_TOKENS, HeldOutText, held_out_text, sample_windows


class ByteTokenizer:
    """One token a byte, with a BOS of 256 before a text if it is to have one."""

    def __init__(self, has_bos: bool = False) -> None:
        self.bos = [256] if has_bos else []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return (self.bos if add_special_tokens else []) + list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def numbered(num_bytes: int) -> HeldOutText:
    return HeldOutText("".join(chr(32 + index % 90) for index in range(num_bytes)), "made up")


def test_the_models_own_text_comes_first(tmp_path: Path) -> None:
    assert "pydoc" in held_out_text(tmp_path).origin
    assert len(held_out_text(tmp_path).text) > 100_000
    (tmp_path / "heldout.txt").write_text("Grüße", encoding="utf-8")
    assert held_out_text(tmp_path).text == "Grüße"
    (tmp_path / "heldout.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match="not UTF-8"):
        held_out_text(tmp_path)


@pytest.mark.parametrize("has_bos", [False, True])
def test_windows_are_distinct_pieces_of_the_text(has_bos: bool) -> None:
    text = numbered(100_000)
    made = sample_windows(text, ByteTokenizer(has_bos), 257, max_context_tokens=1024)
    prefix = (256,) if has_bos else ()
    assert len({len(window) for window in made.windows}) == 1
    assert len(made.windows[0]) == 256 + len(prefix)
    assert made.tokens_per_window == 255
    assert made.num_unscored == 1 + len(prefix)
    assert MAX_TOKENS - 256 < 256 * len(made.windows) <= MAX_TOKENS
    assert made.window_bytes == (255,) * len(made.windows)
    assert all(window[: len(prefix)] == prefix for window in (*made.windows, *made.prompts))
    assert len(made.prompts) == 4
    assert made.greedy_tokens == 64
    assert made == sample_windows(text, ByteTokenizer(has_bos), 257, max_context_tokens=1024)


def test_a_short_context_makes_short_windows_and_continuations() -> None:
    made = sample_windows(numbered(1000), ByteTokenizer(), 256, max_context_tokens=40)
    assert len(made.windows[0]) == 20
    assert len(made.prompts[0]) + made.greedy_tokens <= 40


def test_a_large_vocabulary_gets_fewer_windows() -> None:
    made = sample_windows(numbered(100_000), ByteTokenizer(), 152_000, max_context_tokens=1024)
    assert 512 <= 256 * len(made.windows) < 1024


def test_too_short_a_text_or_context_is_said_with_figures() -> None:
    with pytest.raises(ModelError, match="the held-out text has 5"):
        sample_windows(numbered(5), ByteTokenizer(), 256, max_context_tokens=1024)
    with pytest.raises(ModelError, match="half the context is 4"):
        sample_windows(numbered(500), ByteTokenizer(), 256, max_context_tokens=8)


def test_bytes_count_characters_past_ascii() -> None:
    made = sample_windows(HeldOutText("é" * 8, "made up"), ByteTokenizer(), 256, max_context_tokens=1024)
    # 16 bytes, of which the first is half a character
    assert made.window_bytes[0] == pytest.approx(15, abs=2)


@given(st.integers(8, 5000), st.integers(16, 700))
def test_no_token_is_in_two_windows(num_tokens: int, max_context_tokens: int) -> None:
    class Numbering(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return list(range(len(text)))

        def decode(self, token_ids: Sequence[int]) -> str:
            return "x" * len(token_ids)

    made = sample_windows(HeldOutText("x" * num_tokens, "made up"), Numbering(), 256, max_context_tokens)
    tokens = [token for window in made.windows for token in window]
    assert len(tokens) == len(set(tokens))
    assert all(after == before + 1 for window in made.windows for before, after in pairwise(window))
