"""Grammars: what a mask allows, how an output ends, and what no grammar may do to the engine."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from byte_tokenizer import EOS, TOKENS, VOCAB_SIZE, byte_tokenizer
from hypothesis import given, settings

from hasten.engine import grammar as grammar_module
from hasten.engine.grammar import CompiledGrammar, GrammarCompiler, read_tokenizer, write_masks
from hasten.errors import RequestError
from hasten.request import Grammar

SLOW_SCHEMA = json.dumps({"type": "integer", "multipleOf": 99999999})
SPELLED = {token: token_id for token_id, token in enumerate(TOKENS)}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(byte_tokenizer, VOCAB_SIZE, EOS)
    yield made
    made.close()


def compiled(compiler: GrammarCompiler, kind: str, text: str = "") -> CompiledGrammar:
    return compiler.compile(Grammar(kind, text)).result()  # type: ignore[arg-type]


def allowed(*matchers: grammar_module.Matcher) -> list[set[int]]:
    masks = np.full((len(matchers), -(-VOCAB_SIZE // 32)), -1, dtype=np.int32)
    write_masks(matchers, masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def follow(matcher: grammar_module.Matcher, text: str) -> None:
    for letter in text:
        matcher.accept(SPELLED[letter])


def test_an_end_token_is_allowed_only_where_the_output_is_accepted(compiler: GrammarCompiler) -> None:
    matcher = compiled(compiler, "regex", "c+d?").matcher(ignore_eos=False)
    assert allowed(matcher) == [{SPELLED["c"]}]
    follow(matcher, "c")
    assert allowed(matcher) == [{SPELLED["c"], SPELLED["d"], *EOS}]
    assert not matcher.is_complete
    follow(matcher, "d")
    assert allowed(matcher) == [set(EOS)]
    assert matcher.is_complete
    assert matcher.error is None


def test_an_end_token_completes_an_output_that_could_go_on(compiler: GrammarCompiler) -> None:
    matcher = compiled(compiler, "regex", "c+").matcher(ignore_eos=False)
    follow(matcher, "c")
    matcher.accept(EOS[1])
    assert matcher.is_complete
    assert matcher.error is None


def test_ignored_end_tokens_are_allowed_only_where_nothing_else_is(compiler: GrammarCompiler) -> None:
    matcher = compiled(compiler, "regex", "c+d?").matcher(ignore_eos=True)
    follow(matcher, "c")
    assert allowed(matcher) == [{SPELLED["c"], SPELLED["d"]}]
    follow(matcher, "d")
    assert allowed(matcher) == [set(EOS)]


def test_early_end_tokens_are_allowed_only_where_nothing_else_is(compiler: GrammarCompiler) -> None:
    grammar = compiled(compiler, "regex", "c{1,9}")
    matcher = grammar.matcher(ignore_eos=False, early_token_ids=EOS, min_tokens=3)
    for _ in range(2):
        follow(matcher, "c")
        assert allowed(matcher) == [{SPELLED["c"]}]
    follow(matcher, "c")
    assert allowed(matcher) == [{SPELLED["c"], *EOS}]
    short = compiled(compiler, "regex", "c").matcher(ignore_eos=False, early_token_ids=EOS, min_tokens=3)
    follow(short, "c")
    assert allowed(short) == [set(EOS)]


def test_matchers_of_one_grammar_go_their_own_ways(compiler: GrammarCompiler) -> None:
    grammar = compiled(compiler, "lark", 'start: "c" "d" | "d" "c"')
    first, second = grammar.matcher(ignore_eos=False), grammar.matcher(ignore_eos=False)
    follow(first, "c")
    assert allowed(first, second) == [{SPELLED["d"]}, {SPELLED["c"], SPELLED["d"]}]


def test_a_token_outside_the_grammar_is_an_error_and_then_nothing_is_allowed(compiler: GrammarCompiler) -> None:
    matcher = compiled(compiler, "regex", "ab").matcher(ignore_eos=False)
    follow(matcher, "b")
    assert matcher.error is not None
    assert "doesn't satisfy the grammar" in matcher.error
    assert allowed(matcher) == [set()]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_walk_through_the_masks_spells_what_the_grammar_describes(
    compiler: GrammarCompiler, data: st.DataObject
) -> None:
    schema = '{"type": "array", "items": {"enum": [1, "ab", {"a": null}, true]}, "maxItems": 3}'
    matcher = compiled(compiler, "json_schema", schema).matcher(ignore_eos=False)
    text = ""
    while not matcher.is_complete and len(text) < 400:
        token_id = data.draw(st.sampled_from(sorted(allowed(matcher)[0])))
        matcher.accept(token_id)
        assert matcher.error is None
        text += TOKENS[token_id] if token_id not in EOS else ""
    if matcher.is_complete:
        assert all(item in (1, "ab", {"a": None}, True) for item in json.loads(text))


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "(", "the request's regex cannot be used: unclosed group"),
        ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("regex", r"[^\x00-\x{10FFFF}]", "nothing matches it"),
        ("lark", "start: b", 'unknown name: "b"'),
        ("json_schema", '{"type": "nope"}', "Invalid type: nope"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', 'Unimplemented keys: ."uniqueItems"'),
        ("json_schema", '{"type": "string", "minLength": 3, "maxLength": 1}', "Unsatisfiable schema"),
        ("json_schema", '{"items": ' * 150 + "{}" + "}" * 150, "recursion limit"),
    ],
)
def test_a_grammar_that_is_no_good_is_refused_with_the_reason(
    compiler: GrammarCompiler, kind: str, text: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as error:
        compiled(compiler, kind, text)
    assert "\n" not in str(error.value)


def test_a_grammar_that_takes_too_long_is_given_up_and_the_next_one_compiles(compiler: GrammarCompiler) -> None:
    start_s = time.perf_counter()
    slow = compiler.compile(Grammar("json_schema", SLOW_SCHEMA))
    following = compiler.compile(Grammar("regex", "abba"))
    assert time.perf_counter() - start_s < 1.5, "the caller waits"
    with pytest.raises(RequestError, match="more than 2 s or 128 MiB to compile: make it simpler"):
        slow.result()
    assert following.result()


def test_a_grammar_that_needs_too_much_memory_is_given_up(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match="more than 2 s or 128 MiB to compile: make it simpler"):
        compiled(compiler, "regex", "((a{1000}){1000}){1000}")


def test_following_an_ambiguous_grammar_has_a_limit(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_FOLLOWING_S", 0.02)
    matcher = compiled(compiler, "lark", 'start: s\ns: s s | s s s | "a" | ').matcher(ignore_eos=False)
    for _ in range(200):
        follow(matcher, "a")
        if matcher.error:
            break
    assert matcher.error == "following the grammar took more than 0.02 s: make it less ambiguous"


def test_the_number_of_compiled_grammars_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_COMPILED", 2)
    compiler = GrammarCompiler(byte_tokenizer, VOCAB_SIZE, EOS)
    first, second, third = (Grammar("regex", letter) for letter in "abc")
    futures = [compiler.compile(each) for each in (first, second, first)]
    assert futures[0] is futures[2]
    compiler.compile(third)
    assert compiler.compile(first) is futures[0]
    assert compiler.compile(second) is not futures[1], "it was asked for longest ago"
    compiler.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "the model's folder has no tokenizer.json"), ("{}", "the model's tokenizer.json cannot be read")],
)
def test_a_model_without_a_tokenizer_refuses_grammars(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    compiler = GrammarCompiler(lambda: read_tokenizer(tmp_path), VOCAB_SIZE, EOS)
    compiler.prepare()
    with pytest.raises(RequestError, match=f"the request's regex cannot be used: {reason}"):
        compiled(compiler, "regex", "a")
    compiler.close()


def test_the_tokenizer_is_loaded_once_with_the_first_grammar_or_before() -> None:
    loads: list[int] = []

    def load() -> object:
        loads.append(threading.get_ident())
        return byte_tokenizer()

    compiler = GrammarCompiler(load, VOCAB_SIZE, EOS)
    assert not loads
    compiler.prepare()
    assert len(loads) == 1
    compiled(compiler, "regex", "a")
    assert len(loads) == 1
    assert loads != [threading.get_ident()], "the engine's thread must not wait"
    compiler.close()


@pytest.mark.parametrize(
    ("vocab_size", "eos", "reason"),
    [
        (VOCAB_SIZE, (), "the model names no end-of-sequence token"),
        (VOCAB_SIZE - 1, EOS, "the model's tokenizer does not fit: vocab size too small"),
    ],
)
def test_a_tokenizer_that_grammars_cannot_use_is_a_reason(vocab_size: int, eos: tuple[int, ...], reason: str) -> None:
    compiler = GrammarCompiler(byte_tokenizer, vocab_size, eos)
    with pytest.raises(RequestError, match=reason):
        compiled(compiler, "regex", "a")
    compiler.close()
