"""Text from tokens, for every runtime: incremental detokenization and stop strings.

What is streamed never holds half a character and never a part of a stop string: both are held
back until the next token decides. The pieces of a continuation, joined, are its Completion's
text.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from hasten.errors import RequestError, TokenizerError
from hasten.request import Completion, FinishReason, Request, TokenEvent
from hasten.runtimes.base import Runtime
from hasten.runtimes.process import RuntimeProcess
from hasten.runtimes.stop_strings import StopMatcher

MAX_WINDOW_TOKENS = 16
KEPT_WINDOW_TOKENS = 4
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
REPLACEMENT = "\ufffd"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

OnText = Callable[[str, int, str], object]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, as transformers has it.

    Raises:
        TokenizerError: the folder has none, or it cannot be read.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise TokenizerError(f"{path} has no tokenizer: one of {', '.join(TOKENIZER_FILES)} must be there")
    try:
        return _tokenizer_class(path).from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            model_max_length=sys.maxsize,  # held-out texts are longer than the context, and are cut into windows
        )
    except Exception as error:  # the Rust tokenizers raise bare Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(f"the tokenizer in {path} cannot be read: {reason}") from error


def _tokenizer_class(path: Path) -> Any:
    """AutoTokenizer, or what it would choose where that is known: its import takes two seconds.

    It is known of Llama models; of some other types transformers mistrusts the class that the folder names.
    """
    try:
        model, tokenizer = (json.loads((path / name).read_bytes()) for name in ("config.json", "tokenizer_config.json"))
        is_generic = tokenizer["tokenizer_class"] in GENERIC_CLASSES and "auto_map" not in tokenizer
        is_known = is_generic and model["model_type"] == "llama"
    except (OSError, ValueError, KeyError, TypeError):
        is_known = False
    return transformers.PreTrainedTokenizerFast if is_known else transformers.AutoTokenizer


def complete(
    runtime: Runtime | RuntimeProcess, requests: Sequence[Request], tokenizer: Any, on_text: OnText | None = None
) -> list[Completion]:
    """Runs requests and returns their continuations with text, in the order of the requests.

    A request whose continuations have all met a stop string is cancelled; where the runtime
    cannot cancel, what it goes on to generate is dropped.

    Args:
        on_text: gets request id, index of the continuation and a piece of text, as it is known.

    Raises:
        RequestError: two requests with the same id.
    """
    writers = {
        (request.request_id, index): _Writer(request, index, tokenizer)
        for request in requests
        for index in range(request.sampling.n)
    }
    if len(writers) != sum(request.sampling.n for request in requests):
        raise RequestError("two requests have the same id; give each its own")

    def handle(event: TokenEvent) -> None:
        writer = writers[event.request_id, event.index]
        if writer.finish_reason is not None:
            return
        piece = writer.add(event)
        if piece and on_text is not None:
            on_text(event.request_id, event.index, piece)
        if event.finish_reason is None and writer.finish_reason is not None:
            siblings = (writers[event.request_id, index] for index in range(writer.request.sampling.n))
            if all(each.finish_reason is not None for each in siblings):
                runtime.cancel(event.request_id)

    if isinstance(runtime, RuntimeProcess):
        runtime.generate(requests, on_event=handle)
    else:
        for event in runtime.generate(requests):
            handle(event)
    return [writer.completion() for writer in writers.values()]


class Detokenizer:
    """Turns a growing list of tokens into text, piece by piece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._window.append(token_id)
        text = self._decode()
        # bytes at the end that are no character yet decode as replacement characters
        piece = text.rstrip(REPLACEMENT)[self._num_emitted :]
        self._num_emitted += len(piece)
        if len(self._window) >= MAX_WINDOW_TOKENS and self._num_emitted == len(text):
            del self._window[:-KEPT_WINDOW_TOKENS]
            self._num_emitted = len(self._decode())
        return piece

    def flush(self) -> str:
        """What was held back: bytes that never became a character."""
        piece = self._decode()[self._num_emitted :]
        self._num_emitted += len(piece)
        return piece

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Writer:
    """One continuation's text while it grows."""

    def __init__(self, request: Request, index: int, tokenizer: Any) -> None:
        self.request = request
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(request.sampling.stop)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._pieces: list[str] = []
        self._error: str | None = None

    def add(self, event: TokenEvent) -> str:
        """Takes an event and returns the text that it settles."""
        piece = ""
        if event.token_id is not None:
            self._token_ids.append(event.token_id)
            if event.logprob is not None:
                self._logprobs.append(event.logprob)
            if event.finish_reason != "stop":  # an end-of-sequence or stop token is no text
                piece = self._detokenizer.add(event.token_id)
                if len(self._token_ids) > self.request.sampling.min_tokens:
                    piece = self._matcher.add(piece)
        if event.finish_reason is not None and not self._matcher.is_stopped:
            piece += self._matcher.add(self._detokenizer.flush()) + self._matcher.flush()
        self.finish_reason = "stop" if self._matcher.is_stopped else event.finish_reason
        self._error = event.error
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """The finished continuation; a runtime that never ended it has failed."""
        return Completion(
            request_id=self.request.request_id,
            index=self.index,
            token_ids=tuple(self._token_ids),
            text="".join(self._pieces),
            finish_reason=self.finish_reason or "error",
            logprobs=tuple(self._logprobs),
            error=self._error if self.finish_reason else "the runtime ended without ending this request",
        )
