"""What a request of the Open Inference Protocol may hold beside its protocol: names, types, ranges, defaults.

The names are those of Triton's LLM models, and of the one that `hasten export triton` writes; the defaults are
those of SamplingParams. Each field is a parameter and, if it has a Spec, an input tensor too. Like with Triton's
vLLM models, numbers may be strings. Models that give embeddings take nothing but their inputs.

Not here: which model takes what (`kserve_models`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from hasten.errors import RequestError
from hasten.request import SamplingParams
from hasten.serve.kserve_tensors import FLOATS, INTEGERS, Tensor
from hasten.serve.openai_models import INT32, MAX_INPUTS, MAX_STOPS, EmbeddedText, StopText, TokenId


@dataclass(frozen=True)
class Spec:
    """Datatype and shape of a tensor; -1 is any size."""

    datatype: str
    shape: tuple[int, ...] = (1,)

    def check(self, tensor: Tensor) -> None:
        """Raises RequestError unless the tensor fits, as it is or with one more leading dimension of 1."""
        family = next((kinds for kinds in (INTEGERS, FLOATS) if self.datatype in kinds), (self.datatype,))
        if tensor.datatype not in family:
            raise RequestError(f"{tensor.name} is {tensor.datatype[:40]} and must be {' or '.join(family)}")
        if not self._fits(tensor.shape) and not (tensor.shape[:1] == (1,) and self._fits(tensor.shape[1:])):
            raise RequestError(f"{tensor.name} has the shape {str(list(tensor.shape))[:80]}, not {list(self.shape)}")

    @property
    def is_scalar(self) -> bool:
        return self.shape == (1,)

    def shape_of(self, num_elements: int) -> list[int]:
        """The shape of a tensor of so many elements; of the sizes at most one is -1."""
        row = math.prod(size for size in self.shape if size != -1)
        return [num_elements // row if size == -1 else size for size in self.shape]

    def _fits(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(
            want in (-1, got) for want, got in zip(self.shape, shape, strict=True)
        )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


TokenIds = Annotated[list[Annotated[TokenId, Strict()]], Spec("INT32", (-1,))]


class Inference(BaseModel, ABC):
    """What a model takes. A field with a Spec is an input tensor, the others are parameters."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    @abstractmethod
    def prompt(self) -> object:
        """What a log that may have it says was asked."""


class GenerateInference(Inference):
    """What both models that generate take beside the prompt."""

    max_tokens: Annotated[int | None, Spec("INT32")] = Field(
        None, ge=1, le=INT32, description="128 if absent, or what fits"
    )
    min_tokens: Annotated[int, Spec("INT32")] = Field(0, ge=0, le=INT32, description="before the output may end")
    temperature: Annotated[float, Spec("FP32")] = Field(0.0, ge=0, le=100, description="0 is greedy")
    top_k: Annotated[int, Spec("INT32")] = Field(0, ge=-1, le=INT32, description="0 and -1 are off")
    top_p: Annotated[float, Spec("FP32")] = Field(1.0, gt=0, le=1)
    min_p: Annotated[float, Spec("FP32")] = Field(0.0, ge=0, le=1)
    repetition_penalty: Annotated[float, Spec("FP32")] = Field(1.0, ge=0.01, le=100)
    presence_penalty: Annotated[float, Spec("FP32")] = Field(0.0, ge=-2, le=2)
    frequency_penalty: Annotated[float, Spec("FP32")] = Field(0.0, ge=-2, le=2)
    seed: Annotated[int | None, Spec("INT64")] = Field(None, ge=-(2**63), le=2**63 - 1)
    stop_token_ids: Annotated[list[TokenId], Spec("INT32", (-1,))] = Field([], max_length=1024)
    ignore_eos: Annotated[bool, Spec("BOOL")] = False
    stream: Annotated[bool | None, Spec("BOOL")] = Field(None, description="a response a piece; where it is possible")
    exclude_input_in_output: Annotated[bool, Spec("BOOL")] = Field(True, description="false is not supported")
    return_num_input_tokens: Annotated[bool, Spec("BOOL")] = Field(False, description="with every response")
    return_num_output_tokens: Annotated[bool, Spec("BOOL")] = Field(False, description="those of each response")
    sampling_parameters: Annotated[str | None, Spec("BYTES")] = Field(None, description="a JSON object of the others")
    priority: int = Field(0, ge=-INT32, le=INT32, description="where requests wait, lower goes first")
    timeout: int = Field(0, ge=0, le=2**63 - 1, description="microseconds; 0 is the server's own limit")

    @property
    @abstractmethod
    def prompt(self) -> str | list[int]:
        """Text or its token ids."""

    def check_unary(self) -> None:
        """Raises RequestError for a stream, where there is one response."""
        if self.stream:
            raise RequestError("stream must be false or absent here: use generate_stream or ModelStreamInfer")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return ()

    def sampling(self, max_tokens: int) -> SamplingParams:
        """As the engine takes it. Raises RequestError."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k if self.top_k > 0 else None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=self.stop_texts,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )


class TextInference(GenerateInference):
    """Text in, text out."""

    text_input: Annotated[str, Spec("BYTES")]
    stop_words: Annotated[
        list[StopText], BeforeValidator(_as_list), Field(max_length=MAX_STOPS), Spec("BYTES", (-1,))
    ] = []

    @property
    def prompt(self) -> str:
        return self.text_input

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(self.stop_words)


class TokenInference(GenerateInference):
    """Token ids in, token ids out."""

    input_ids: TokenIds

    @property
    def prompt(self) -> list[int]:
        return self.input_ids


class EmbedInference(Inference):
    """What is to become vectors."""

    @property
    @abstractmethod
    def prompt(self) -> Sequence[str | list[int]]:
        """A text or its token ids for each vector."""


class EmbedTextInference(EmbedInference):
    """Texts in, a vector for each out."""

    text_input: Annotated[list[EmbeddedText], Field(min_length=1, max_length=MAX_INPUTS), Spec("BYTES", (-1,))]

    @property
    def prompt(self) -> list[str]:
        return self.text_input


class EmbedTokenInference(EmbedInference):
    """Token ids of one text in, since those of several are no tensor, and its vector out."""

    input_ids: TokenIds

    @property
    def prompt(self) -> list[list[int]]:
        return [self.input_ids]
