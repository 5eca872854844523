"""What the OpenAI API's requests may hold, as pydantic models: types, ranges, and what is refused.

Values are checked strictly ("1" is no number), null is the same as absent, and a parameter that does
not exist is refused with its name, as OpenAI does: what was asked for is never silently dropped. Of the
parameters that exist but are not served, those that cannot change the answer are accepted, the others
are refused unless they ask for nothing.
"""

import functools
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from hasten.errors import RequestError
from hasten.request import MAX_LOGIT_BIAS, Grammar, SamplingParams

INT32 = 2**31 - 1
MAX_PROMPTS = 1024
MAX_INPUTS = 2048  # of one request for embeddings
MAX_STOPS = 16
MAX_BIASES = 1024

TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIdText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]  # a key of JSON is text
LogitBias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
EmbeddedText = Annotated[str, StringConstraints(min_length=1)]

# labels for OpenAI's own records; they cannot change an answer
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)

# not served, and what says the same as leaving them out
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
}


class OpenAIModel(BaseModel):
    """Base of all: strict, without unknown fields, and null means absent."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict) or None not in values.values():
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(OpenAIModel):
    include_usage: bool = Field(False, description="an event with the usage, before the last")
    continuous_usage_stats: bool = Field(False, description="and in every chunk that of the request so far")

    @model_validator(mode="after")
    def _check_together(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage")
        return self


class JsonSchemaFormat(OpenAIModel):
    """The schema that an answer must follow; it is always followed strictly."""

    name: str
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool = True


class ResponseFormat(OpenAIModel):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and is needed there")
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return schema_grammar(self.json_schema.json_schema)
        return Grammar("json_object") if self.type == "json_object" else None


class StructuredOutputs(OpenAIModel):
    """vLLM's form of the same: exactly one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema")
    regex: str | None = None
    grammar_: str | None = Field(None, alias="grammar", description="in llguidance's dialect of Lark")

    @model_validator(mode="after")
    def _check_together(self) -> "StructuredOutputs":
        if [self.json_, self.regex, self.grammar_].count(None) != 2:
            raise ValueError("structured_outputs needs exactly one of json, regex and grammar")
        return self

    @property
    def grammar(self) -> Grammar:
        if self.json_ is not None:
            return Grammar("json_schema", self.json_) if isinstance(self.json_, str) else schema_grammar(self.json_)
        return Grammar("regex", self.regex) if self.regex is not None else Grammar("lark", self.grammar_ or "")


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    """Of JSON that a schema describes. Raises RequestError for one that is nested too deeply."""
    try:
        return Grammar("json_schema", json.dumps(schema))
    except RecursionError as error:
        raise RequestError("the json_schema is nested too deeply") from error


class SamplingFields(OpenAIModel):
    """The parameters that completions and chat completions share; the last group is vLLM's, via extra_body."""

    model: str | None = Field(None, description="a name that /v1/models lists; the served model if absent")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    logit_bias: dict[TokenIdText, LogitBias] = Field({}, max_length=MAX_BIASES)

    structured_outputs: StructuredOutputs | None = None
    top_k: int | None = Field(None, ge=-1, le=INT32, description="0 and -1 are off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=1024)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=INT32)
    priority: int = Field(0, ge=-INT32, le=INT32, description="where requests wait, lower goes first")
    return_token_ids: bool = Field(False, description="the prompt's and the output's token ids beside the text")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_not_served(cls, values: Any) -> Any:
        not_served = _names_not_served(cls)
        if not isinstance(values, dict) or not_served.isdisjoint(values):
            return values
        for name, value in values.items():
            if name in not_served and name in REFUSED and value not in (None, *REFUSED[name]):
                raise ValueError(f"{name} is not supported by this server: leave it out")
        return {name: value for name, value in values.items() if name not in not_served}

    @model_validator(mode="after")
    def _check_one_format(self) -> "SamplingFields":
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("structured_outputs and response_format exclude each other")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the output must match. Raises RequestError for one that is none."""
        if self.structured_outputs is not None:
            return self.structured_outputs.grammar
        return self.response_format.grammar if self.response_format is not None else None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, logprobs: int | None, *, prompt_logprobs: int | None = None) -> SamplingParams:
        """As the engine takes it. Raises RequestError for values that only it knows to be wrong."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            n=self.n,
            prompt_logprobs=prompt_logprobs,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in self.logit_bias.items()),
            grammar=self.grammar,
        )


@functools.cache
def _names_not_served(model: type[SamplingFields]) -> frozenset[str]:
    return frozenset({*IGNORED, *REFUSED} - model.model_fields.keys())


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="text, token ids, or a list of either")
    max_tokens: int | None = Field(None, ge=1, le=INT32, description="16 if absent, or fewer where only they fit")
    logprobs: int | None = Field(None, ge=0, le=20, description="of the N most probable tokens at each place")
    echo: bool = Field(False, description="the prompt goes before each text, and its log-probabilities before theirs")
    suffix: Literal[""] | None = Field(None, description="inserting before a suffix is not supported")
    best_of: int | None = Field(None, ge=1, le=128, description="not supported: it must be n, or absent")

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported by this server: leave it out, or set it to n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts of the request, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0]
        return [self.prompt] if isinstance(first, int) else self.prompt  # type: ignore[return-value]


class DetokenizeRequest(OpenAIModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
