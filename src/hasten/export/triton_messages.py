"""Triton's requests and responses as both exported models read and write them.

A value of a request may come as an input tensor, as in TensorRT-LLM's models, or by the same name in the request's
parameters or in the JSON text `sampling_parameters`, as in Triton's vLLM backend. Tensors go before
parameters, and those before the JSON text. A name that nobody knows is an error.

Runs in Triton's Python backend: neither torch nor transformers is there.
"""

import json
import traceback
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from hasten.config import nearest
from hasten.errors import EngineUnavailableError, HastenError, RequestError
from hasten.request import SamplingParams

ALIASES = {"stop_words": "stop", "request_output_len": "max_tokens", "min_length": "min_tokens"}


def _flag(value: Any) -> bool:
    return value.lower() in ("true", "1") if isinstance(value, str) else bool(value)


def _count_or_all(value: Any) -> int | None:
    """Triton's other models write 0 or -1 for "all tokens"."""
    return int(value) if int(value) > 0 else None


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value if isinstance(value, list) else [value]))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value if isinstance(value, list) else [value]))


SAMPLING: dict[str, Callable[[Any], Any]] = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_k": _count_or_all,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "stop": _texts,
    "stop_token_ids": _integers,
    "ignore_eos": _flag,
}
"""Fields of SamplingParams, each with what makes its value of a number, a text or a list."""

FLAGS = ("stream", "exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens")

CACHED_TENSORS = 1 << 12


class RequestOptions:
    """The values that a request gives beside its prompt.

    Args:
        request: a pb_utils.InferenceRequest.
        prompt: name of the input that holds the prompt.

    Raises:
        RequestError: a name that nobody knows, or a value that is none for its name.
    """

    def __init__(self, request: Any, prompt: str) -> None:
        self._values: dict[str, Any] = {}
        tensors = {tensor.name(): tensor for tensor in request.inputs() if tensor.name() != prompt}
        given = _parsed("the request's parameters", request.parameters()) | {
            name: value_of(tensor) for name, tensor in tensors.items()
        }
        for values in (_parsed("sampling_parameters", given.pop("sampling_parameters", "")), given):
            for name, value in values.items():
                self._take(ALIASES.get(name, name), value)

    def flag(self, name: str, default: bool = False) -> bool:
        """One of FLAGS."""
        return bool(self._values.get(name, default))

    @property
    def sampling_values(self) -> dict[str, Any]:
        """Those of SAMPLING that were given."""
        return {name: value for name, value in self._values.items() if name in SAMPLING}

    @property
    def sampling(self) -> SamplingParams:
        """Raises RequestError for a value out of its range."""
        return SamplingParams(**self.sampling_values)

    def _take(self, name: str, value: Any) -> None:
        convert = _flag if name in FLAGS else SAMPLING.get(name)
        if convert is None:
            raise RequestError(f"unknown parameter {name!r}: {nearest(name, (*SAMPLING, *ALIASES, *FLAGS))}")
        try:
            self._values[name] = convert(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"{name} cannot be {value!r:.80}") from error


def value_of(tensor: Any) -> Any:
    """The value of a tensor with one element, else the list of its values; bytes become text.

    Raises:
        RequestError: bytes that are not UTF-8.
    """
    values = tensor.as_numpy().reshape(-1).tolist()
    try:
        values = [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError as error:
        raise RequestError(f"{tensor.name()} is not UTF-8 text") from error
    return values[0] if len(values) == 1 else values


def text_tensor(name: str, text: str) -> Any:
    """An output with one element, of Triton's type STRING."""
    return pb_utils.Tensor(name, np.array([text.encode()], np.object_))


streamed_text_tensor = lru_cache(CACHED_TENSORS)(text_tensor)
"""As `text_tensor`. Streams are made of few different texts, and a new tensor costs as much as half of sending it."""


@lru_cache(CACHED_TENSORS)
def count_tensor(name: str, count: int) -> Any:
    """An output with one number of tokens."""
    return pb_utils.Tensor(name, np.array([count], np.uint32))


class TokenCounts:
    """The outputs num_input_tokens and num_output_tokens of one request's responses, where it asked for them."""

    def __init__(self, options: RequestOptions, num_input_tokens: int) -> None:
        self._has_num_output_tokens = options.flag("return_num_output_tokens")
        self._constant: tuple[Any, ...] = ()
        if options.flag("return_num_input_tokens"):
            self._constant = (count_tensor("num_input_tokens", num_input_tokens),)

    def tensors(self, num_output_tokens: int) -> tuple[Any, ...]:
        """For a response that has so many tokens."""
        if self._has_num_output_tokens:
            return (*self._constant, count_tensor("num_output_tokens", num_output_tokens))
        return self._constant


def failed_response(error: Exception) -> Any:
    """A response that says what was wrong, with Triton's code for it; what is no user's mistake is logged."""
    code, message = pb_utils.TritonError.INTERNAL, str(error)
    if isinstance(error, RequestError):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, EngineUnavailableError):
        code = pb_utils.TritonError.UNAVAILABLE
    elif not isinstance(error, HastenError):
        message = f"{type(error).__name__}: {error}"
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _parsed(what: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError as error:
        raise RequestError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise RequestError(f"{what} must be a JSON object")
    return dict(values)
