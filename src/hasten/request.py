"""What a user asks for and what comes back: the types that every runtime shares.

Frozen and stdlib only, so that they can be built without loading any library and sent
between processes. The engine's mutable state of a request is `engine.sequence.Sequence`.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from hasten.config import option
from hasten.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability, and the most probable tokens in its place with theirs, best first."""


GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]

MAX_GRAMMAR_CHARS = 65536
MAX_LOGIT_BIAS = 100


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output must match.

    Only the form is checked here; whether it can be compiled is known when the request runs.

    Args:
        kind: a JSON object, JSON that a schema describes, a regular expression, or a context-free
            grammar in llguidance's dialect of Lark.
        text: the schema, expression or grammar; empty for json_object.

    Raises:
        RequestError: no such kind, a text that is missing, too long or needless, or a schema that is no
            JSON object.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise RequestError(f"a grammar is one of {', '.join(get_args(GrammarKind))}, got {self.kind!r}")
        if (self.kind == "json_object") == bool(self.text):
            raise RequestError(f"a grammar of kind {self.kind} {'takes no' if self.text else 'needs a'} text")
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"the {self.kind} has {len(self.text)} characters and at most {MAX_GRAMMAR_CHARS} are allowed"
            )
        if self.kind == "json_schema":
            try:
                schema = json.loads(self.text)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the json_schema is not valid JSON: {error}") from error
            if not isinstance(schema, dict):
                raise RequestError(f"a json_schema is a JSON object, got {self.text[:40]}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The default is greedy.

    The order of operations is: grammar, biases, penalties, temperature, top-k, top-p, min-p, draw. A token that
    the grammar does not allow has probability 0 from the first of them on.

    Args:
        logit_bias: token ids, each with what is added to its logit, -100 to 100.
        prompt_logprobs: as logprobs, of the prompt's own tokens under the model alone.

    Raises:
        RequestError: a value outside its range.
    """

    max_tokens: int = option(128, "most tokens to generate")
    min_tokens: int = option(0, "tokens before the output may end by a token or a stop string")
    temperature: float = option(0.0, "0 is greedy; higher is more random")
    top_k: int | None = option(None, "draw from the K most probable tokens")
    top_p: float = option(1.0, "draw from the fewest tokens that hold this probability")
    min_p: float = option(0.0, "drop tokens below this share of the most probable one's probability")
    repetition_penalty: float = option(1.0, "divide positive logits of tokens seen in prompt or output")
    presence_penalty: float = option(0.0, "subtract from the logits of tokens already generated")
    frequency_penalty: float = option(0.0, "subtract for each time a token was generated")
    seed: int | None = option(None, "the same seed draws the same tokens")
    stop: tuple[str, ...] = option((), "text that ends the output")
    stop_token_ids: tuple[int, ...] = option((), "token ids that end the output, comma-separated")
    ignore_eos: bool = option(False, "go on after the end-of-sequence token")
    logprobs: int | None = option(None, "log-probabilities of the N most probable tokens")
    n: int = option(1, "continuations of each prompt")
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        limits = (
            ("max_tokens", self.max_tokens, 1, math.inf),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", 1 if self.top_k is None else self.top_k, 1, math.inf),
            ("top_p", self.top_p, 1e-9, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-6, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("logprobs", self.logprobs or 0, 0, 20),
            ("prompt_logprobs", self.prompt_logprobs or 0, 0, 20),
            ("n", self.n, 1, 128),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:  # NaN fails every comparison, so it is refused too
                allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise RequestError(f"{name} must be {allowed}, got {value}")
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise RequestError("logit_bias names a token twice")
        if not all(abs(bias) <= MAX_LOGIT_BIAS for _, bias in self.logit_bias):
            raise RequestError(f"a logit_bias must be between -{MAX_LOGIT_BIAS} and {MAX_LOGIT_BIAS}")
        if any(not text for text in self.stop):
            raise RequestError("a stop string must not be empty")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, already tokenized, and how to continue it.

    Args:
        priority: where requests wait, those with a lower number go first.

    Raises:
        RequestError: the prompt is empty.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise RequestError(f"request {self.request_id}: the prompt is empty")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one continuation, or the end of it.

    Args:
        index: which of the request's `n` continuations, from 0.
        token_id: None in an event that only ends a continuation: cancelled, error, or stop where a
            grammar is complete and nothing can follow.
        time_s: `time.perf_counter()` of the host when the token was known to the runtime's
            caller; on Linux that clock is shared by all processes.
        finish_reason: set on the continuation's last event, None before.
        logprob: log-probability of the token under the model's distribution over the tokens that
            the grammar allows, after penalties and with temperature 1, if asked for.
        top_logprobs: the most probable tokens with their log-probabilities, best first; fewer
            than asked for where the grammar allows fewer.
        error: one sentence, with finish_reason "error".
        started_s: as time_s, when the continuation's first step was scheduled; on its first token, where
            the runtime tells.
        num_cached_tokens: of the prompt, which the prefix cache had; where started_s is.
        prompt_logprobs: of the prompt's next tokens, from its second on, in events without a token before the
            continuation's first, if asked for.
    """

    request_id: str
    token_id: int | None
    time_s: float
    index: int = 0
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    started_s: float | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Inputs, already tokenized, of which each becomes a vector.

    Args:
        inputs: token ids, at least one input, and of each at least one token.
    """

    request_id: str
    inputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class EmbeddingEvent:
    """The end of an embedding request: its vectors, or why there are none.

    Args:
        vectors: float32 [number of inputs, size] in the machine's byte order; empty where it was cancelled.
        time_s, started_s: as TokenEvent's; the first step that had one of its inputs.
        error: one sentence.
    """

    request_id: str
    vectors: bytes
    time_s: float
    started_s: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished continuation with its text.

    Args:
        text: without the stop string and without special tokens.
        logprobs: one per token if asked for, else empty.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()
    error: str | None = None
