"""One continuation of a request while it runs, for runtimes that are driven token by token.

Decides when a continuation ends, the same way for every library: end-of-sequence tokens, the
request's own stop tokens, its token limit, the model's limit, cancellation. Stop strings are
text and belong to `runtimes.text`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.request import FinishReason, Request, TokenEvent


@dataclass(frozen=True)
class ModelLimits:
    """What a request is checked against before it reaches a library.

    Args:
        samples: whether the runtime draws tokens and applies penalties.
        has_logprobs: whether it reports log-probabilities of the tokens.
    """

    vocab_size: int
    max_model_tokens: int
    eos_token_ids: frozenset[int]
    samples: bool
    has_logprobs: bool = False


class Continuation:
    """A continuation's state. It is over once `finish_reason` is set."""

    def __init__(self, request: Request, index: int, limits: ModelLimits) -> None:
        sampling = request.sampling
        self.request = request
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.max_tokens = min(sampling.max_tokens, limits.max_model_tokens - len(request.prompt_token_ids))
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self._stop_token_ids |= limits.eos_token_ids

    def accept(
        self,
        token_id: int,
        time_s: float,
        logprob: float | None = None,
        top_logprobs: tuple[tuple[int, float], ...] = (),
    ) -> TokenEvent:
        """Takes the next token and says whether it was the last."""
        self.token_ids.append(token_id)
        if token_id in self._stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        return TokenEvent(
            self.request.request_id, token_id, time_s, self.index, self.finish_reason, logprob, top_logprobs
        )

    def cancel(self, time_s: float) -> TokenEvent:
        self.finish_reason = "cancelled"
        return TokenEvent(self.request.request_id, None, time_s, self.index, "cancelled")


def admit(requests: Iterable[Request], limits: ModelLimits) -> tuple[list[Continuation], list[tuple[Request, str]]]:
    """Splits requests into the continuations that can run and the requests that cannot, with the reason."""
    admitted: list[Continuation] = []
    refused: list[tuple[Request, str]] = []
    for request in requests:
        reason = refusal(request, limits)
        if reason is None:
            admitted += [Continuation(request, index, limits) for index in range(request.sampling.n)]
        else:
            refused.append((request, reason))
    return admitted, refused


def refusal(request: Request, limits: ModelLimits) -> str | None:
    """Why a request cannot run, None if it can."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if len(prompt) >= limits.max_model_tokens:
        return (
            f"the prompt has {len(prompt)} tokens and leaves no room for output within "
            f"{limits.max_model_tokens} tokens; shorten it"
        )
    if not all(0 <= token_id < limits.vocab_size for token_id in prompt):
        return f"a prompt token is outside the vocabulary of {limits.vocab_size}; is this the model's own tokenizer?"
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if not limits.samples and not (sampling.is_greedy and penalties == (1.0, 0.0, 0.0)):
        return "this runtime is greedy only here: set temperature 0 and no penalties, or use the native runtime"
    if sampling.logit_bias or sampling.min_tokens:
        return "this runtime takes neither logit_bias nor min_tokens: use the native runtime"
    if sampling.grammar is not None:
        return "this runtime does not follow grammars: use the native runtime"
    if sampling.prompt_logprobs is not None:
        return "this runtime does not report log-probabilities of prompts: use the native runtime"
    if sampling.logprobs is not None and not limits.has_logprobs:
        return "this runtime does not report log-probabilities: use the native runtime"
    return None


def error_events(refused: Sequence[tuple[Request, str]], time_s: float) -> list[TokenEvent]:
    """The events that end refused requests, one for each continuation that was asked for."""
    return [
        TokenEvent(request.request_id, None, time_s, index, "error", error=reason)
        for request, reason in refused
        for index in range(request.sampling.n)
    ]


def eos_token_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence tokens of a model folder: generation_config.json goes before config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
