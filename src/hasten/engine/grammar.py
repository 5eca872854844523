"""Grammars that outputs must match: compiled once, followed token by token, as masks of allowed tokens.

llguidance does the parsing. Compiling happens on a thread, so that running requests need not wait.

The invariant: a token that a mask allows keeps the output a beginning of something that the grammar
accepts, and an end token is allowed only where the output is accepted as it stands.

Not here: applying masks to logits (`sampler`, `kernels.cuda.sample`) and when a sequence with a
grammar may be scheduled (`scheduler`).
"""

import functools
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from hasten.engine.grammar_compile import GrammarTokenizer, Trial, compile_grammar, reason_of
from hasten.errors import HastenError, RequestError
from hasten.request import Grammar

MAX_COMPILED = 32
"""Grammars that stay compiled; that which was asked for longest ago goes first."""

MAX_FOLLOWING_S = 2.0
"""What following one output may cost the others; a token of an ordinary grammar costs 2 microseconds."""

# Whitespace between JSON's tokens has a limit, or a model that falls into repeating it never ends.
_JSON_DEFAULTS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}


class Matcher:
    """Where one sequence is in its grammar.

    Args:
        ignored_token_ids: not drawn where anything else can follow.
        early_token_ids: likewise, while there are fewer than min_tokens.

    Attributes:
        is_complete: whether the output is accepted and nothing but an end token can follow.
        error: why the sequence cannot go on; None while it can.
    """

    def __init__(
        self, matcher: LLMatcher, ignored_token_ids: Items[int], early_token_ids: Items[int], min_tokens: int
    ) -> None:
        self.is_complete = False
        self.error: str | None = None
        self.matcher = matcher
        self._ignored_token_ids, self._early_token_ids = ignored_token_ids, early_token_ids
        self._num_missing = min_tokens
        self._following_s = 0.0

    def accept(self, token_id: int) -> None:
        """Takes the next token, one that the last mask allowed."""
        start_s = time.perf_counter()
        self.matcher.consume_token(token_id)
        self._num_missing -= 1
        self._following_s += time.perf_counter() - start_s
        self.is_complete = self.matcher.is_stopped()
        self._check()
        if self._following_s > MAX_FOLLOWING_S:
            self.error = f"following the grammar took more than {MAX_FOLLOWING_S} s: make it less ambiguous"

    def settle(self, mask: np.ndarray) -> None:
        """Takes from a mask that llguidance wrote what must not be drawn; after an error, that is everything."""
        self._check()
        held_back = (*self._ignored_token_ids, *(self._early_token_ids if self._num_missing > 0 else ()))
        if self.error is not None:
            mask[:] = 0
        elif held_back:
            kept = mask.view(np.uint32).copy()
            for token_id in held_back:
                kept[token_id // 32] &= ~np.uint32(1 << token_id % 32)
            if kept.any():  # else nothing but these can follow
                mask[:] = kept.view(np.int32)

    def _check(self) -> None:
        if self.error is None and self.matcher.is_error():
            self.error = f"the grammar cannot be followed further: {reason_of(self.matcher)}"


def write_masks(matchers: Items[Matcher], masks: np.ndarray) -> None:
    """Writes which tokens may come next.

    Args:
        masks: [len(matchers), ceil(vocab_size / 32)] int32, written: bit i % 32 of word i // 32 is token i's.
            A matcher with an error allows none.
    """
    num_rows, num_words = masks.shape
    places = [(matcher.matcher, row) for row, matcher in enumerate(matchers)]
    _executor().unsafe_compute_mask_ptr(places, masks.ctypes.data, num_words * 4, num_rows)
    for matcher, mask in zip(matchers, masks, strict=True):
        matcher.settle(mask)


class CompiledGrammar:
    """A grammar, compiled for one tokenizer."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids

    def matcher(self, *, ignore_eos: bool, early_token_ids: Items[int] = (), min_tokens: int = 0) -> Matcher:
        """The start of one output; see Matcher.

        Args:
            ignore_eos: draws end tokens only where nothing else can follow.
        """
        ignored = self._eos_token_ids if ignore_eos else ()
        return Matcher(self._matcher.deep_copy(), ignored, early_token_ids, min_tokens)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, without transformers, whose import takes longer than all the rest.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RequestError(f"the model's folder has no {path.name}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust tokenizers raise bare Exception
        raise RequestError(f"the model's {path.name} cannot be read: {error}") from error


class GrammarCompiler:
    """Compiles grammars for one model, one at a time, on a thread.

    Args:
        load_tokenizer: called once, on the thread, when the first grammar is asked for; see read_tokenizer.
    """

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._compiled: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._tools: tuple[LLTokenizer, Trial] | None = None

    def prepare(self) -> None:
        """Does now what the first grammar would wait for; all of Python stands still for most of it.

        A model that cannot have grammars says so when one is asked for.
        """
        with suppress(HastenError):
            self._thread.submit(self._get_tools).result()

    def compile(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Starts compiling, if the grammar is not known yet; the result may be a RequestError."""
        if grammar not in self._compiled:
            self._compiled[grammar] = self._thread.submit(self._compile, grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._tools is not None:
            self._tools[1].close()

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            tokenizer, trial = self._get_tools()
            text = _llguidance_text(grammar)
            trial.check(text)
            return CompiledGrammar(compile_grammar(tokenizer, text), self._eos_token_ids)
        except HastenError as error:
            raise RequestError(f"the request's {grammar.kind} cannot be used: {error}") from error

    def _get_tools(self) -> tuple[LLTokenizer, Trial]:
        if self._tools is None:
            self._tools = self._make_tools()
        return self._tools

    def _make_tools(self) -> tuple[LLTokenizer, Trial]:
        if not self._eos_token_ids:
            raise RequestError("the model names no end-of-sequence token")
        tokenizer = self._load_tokenizer()
        tokenizer.no_padding()
        tokenizer.no_truncation()
        setup = GrammarTokenizer(tokenizer.to_str(), self._vocab_size, self._eos_token_ids)
        trial = Trial(setup)  # first: it prepares itself at the same time
        try:
            return setup.build(), trial
        except ValueError as error:
            trial.close()
            raise RequestError(f"the model's tokenizer does not fit: {error}") from error


def _llguidance_text(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = json.loads(grammar.text) if grammar.kind == "json_schema" else {"type": "object"}
    return LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_DEFAULTS)


@functools.cache
def _executor() -> LLExecutor:
    """Computes the masks of several matchers at the same time, on threads of its own."""
    return LLExecutor()
