"""Compiles a grammar, in a process that may be killed first.

Grammars come from whoever sends requests, and some of a hundred bytes cost llguidance minutes and
gigabytes in spite of its own limits: `{"type": "integer", "multipleOf": 99999999}`. So `Trial`
compiles each new one in a child process whose CPU time and memory are limited. What it survives can
be compiled in this process.

The child is `python -m hasten.engine.grammar_compile`. It reads a GrammarTokenizer and then
grammars, each a line of JSON, and answers each with a line: the reason against it, or null.
It ends at the end of its input.
"""

import math
import resource
import subprocess
import sys
import time

import msgspec
import psutil
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from hasten.errors import RequestError

MAX_COMPILE_S = 2
"""CPU time, in whole seconds; a schema of 60 KB takes 0.02."""

MAX_COMPILE_BYTES = 128 * 2**20

_LIMITS = LLParserLimits(step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)


class GrammarTokenizer(msgspec.Struct, frozen=True):
    """The tokens that grammars are followed in.

    Args:
        serialized: the JSON of the library `tokenizers`.
        vocab_size: the model's; at least that of the tokenizer.
        eos_token_ids: at least one.
    """

    serialized: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def build(self) -> LLTokenizer:
        """Takes most of a second for 150,000 tokens.

        Raises:
            ValueError: the tokenizer is of a kind that llguidance cannot use.
        """
        return LLTokenizer(self.serialized, n_vocab=self.vocab_size, eos_token=list(self.eos_token_ids))


def compile_grammar(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """Compiles what one of LLMatcher.grammar_from_* returned.

    Raises:
        RequestError: the reason against the grammar.
    """
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # much of the work waits until the first mask
    if matcher.is_error():
        raise RequestError(reason_of(matcher))
    return matcher


def reason_of(matcher: LLMatcher) -> str:
    """Why a matcher is in an error, in one line."""
    lines = matcher.get_error().splitlines()
    if lines[0] == "NoExtensionBias":
        return "nothing matches it"
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


class Trial:
    """Compiles grammars in a child process, one at a time; a child that a grammar killed is replaced."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = tokenizer
        self._child = self._start()

    def check(self, text: str) -> None:
        """Waits until a grammar has been compiled.

        Raises:
            RequestError: the reason against the grammar.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(msgspec.json.encode(text) + b"\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            self.close()
            self._child = self._start()
            raise RequestError(
                f"it takes more than {MAX_COMPILE_S} s or {MAX_COMPILE_BYTES // 2**20} MiB to compile: make it simpler"
            )
        reason = msgspec.json.decode(answer, type=str | None)
        if reason is not None:
            raise RequestError(reason)

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()

    def _start(self) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard is not for it
        )
        assert child.stdin is not None
        child.stdin.write(msgspec.json.encode(self._tokenizer) + b"\n")
        child.stdin.flush()
        return child


def main() -> None:
    tokenizer = msgspec.json.decode(sys.stdin.buffer.readline(), type=GrammarTokenizer).build()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + MAX_COMPILE_BYTES)
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + MAX_COMPILE_S)
        reason = None
        try:
            compile_grammar(tokenizer, msgspec.json.decode(line, type=str))
        except RequestError as error:
            reason = str(error)
        sys.stdout.buffer.write(msgspec.json.encode(reason) + b"\n")
        sys.stdout.buffer.flush()


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


if __name__ == "__main__":
    main()
