"""Pieces joined are the text that the command line would print, however tokens and stop strings fall."""

import random

import pytest
from fake_engine import MODEL, TEXT, TEXT_IDS, TOKENIZER

from hasten.request import SamplingParams, TokenEvent
from hasten.runtimes.text import Detokenizer
from hasten.serve.pieces import ContinuationText, Echo, Piece, RustDetokenizer, TokenLogprob

HELD_OUT = (MODEL / "heldout.txt").read_text()[:4000] + " naïve 漢字 😀 \u200d ok"


def pieces_of(token_ids: list[int], at_once: int = 1, **sampling: object) -> list[Piece]:
    text = ContinuationText(0, SamplingParams(**sampling), RustDetokenizer(TOKENIZER.backend_tokenizer))
    pieces = []
    for position, token_id in enumerate(token_ids):
        is_last = position + 1 == len(token_ids)
        if text.finish_reason is None:
            text.add(TokenEvent("r", token_id, float(position), 0, "length" if is_last else None, -1.0))
        if position % at_once == at_once - 1 or is_last:
            pieces.append(text.take())
    return [piece for piece in pieces if piece is not None]


@pytest.mark.parametrize("seed", range(30))
def test_text_is_that_of_the_detokenizer_of_all_runtimes(seed: int) -> None:
    rng = random.Random(seed)
    token_ids = [rng.randrange(len(TOKENIZER)) for _ in range(60)]
    if seed % 2:
        start = rng.randrange(1000)
        token_ids = TOKENIZER.encode(HELD_OUT, add_special_tokens=False)[start : start + 60]
    reference = Detokenizer(TOKENIZER)
    expected = "".join(reference.add(token_id) for token_id in token_ids) + reference.flush()
    pieces = pieces_of(token_ids)
    assert "".join(piece.text for piece in pieces) == expected
    assert [token_id for piece in pieces for token_id in piece.token_ids] == token_ids


def test_half_a_character_waits_and_comes_out_at_the_end() -> None:
    token_ids = TOKENIZER.encode("a😀", add_special_tokens=False)
    whole = pieces_of(token_ids)
    assert "\ufffd" not in "".join(piece.text for piece in whole[:-1])
    assert whole[-1].text.endswith("😀")
    cut = pieces_of(token_ids[:-1])
    assert cut[-1].text.count("\ufffd") >= 1
    assert cut[-1].finish_reason == "length"


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_a_stop_string_ends_the_text_before_it(at_once: int) -> None:
    pieces = pieces_of(TEXT_IDS * 2, at_once, stop=("aloud, tok", "never"))
    assert "".join(piece.text for piece in pieces) == TEXT.partition("aloud, tok")[0]
    assert pieces[-1].finish_reason == "stop"


def test_a_stop_string_among_the_first_min_tokens_is_text() -> None:
    start = len(TEXT_IDS)
    pieces = pieces_of(TEXT_IDS * 2, stop=("aloud, tok",), min_tokens=start)
    assert "".join(piece.text for piece in pieces) == TEXT + TEXT.partition("aloud, tok")[0]


def test_a_prompt_that_is_echoed_is_looked_at_for_no_stop_string() -> None:
    echo = Echo("stop here: ", (7, 8, 9))
    sampling = SamplingParams(stop=("stop",), prompt_logprobs=1)
    text = ContinuationText(0, sampling, RustDetokenizer(TOKENIZER.backend_tokenizer), echo)
    text.add(TokenEvent("r", None, 0.0, prompt_logprobs=((-0.5, ((8, -0.5),)),)))
    prompt = text.take()
    assert prompt is not None
    assert (prompt.text, prompt.token_ids, prompt.finish_reason) == ("stop here: ", (), None)
    assert prompt.logprobs == (TokenLogprob(7, None, ()), TokenLogprob(8, -0.5, ((8, -0.5),)))
    text.add(TokenEvent("r", None, 0.0, prompt_logprobs=((-2.0, ()),)))
    assert text.take() == Piece(0, "", (), (TokenLogprob(9, -2.0, ()),))
    text.add(TokenEvent("r", TEXT_IDS[0], 1.0, 0, "length"))
    assert text.num_tokens == 1
    last = text.take()
    assert last is not None and last.token_ids == (TEXT_IDS[0],)


def test_what_only_looked_like_a_stop_string_is_text() -> None:
    pieces = pieces_of(TEXT_IDS, stop=("again. but",))
    assert "".join(piece.text for piece in pieces) == TEXT
    assert pieces[-1].finish_reason == "length"


def test_tokens_that_came_together_are_one_piece() -> None:
    pieces = pieces_of(TEXT_IDS, at_once=len(TEXT_IDS))
    assert [piece.text for piece in pieces] == [TEXT]
    assert pieces[0].token_ids == tuple(TEXT_IDS)


def test_log_probabilities_are_one_a_token() -> None:
    pieces = pieces_of(TEXT_IDS, logprobs=0)
    assert [each.token_id for piece in pieces for each in piece.logprobs] == TEXT_IDS
