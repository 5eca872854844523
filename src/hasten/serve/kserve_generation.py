"""The KServe models of a model that generates: text into text, and token ids into token ids.

Their inputs have the names of Triton's LLM models, and each may come as a tensor, as a request parameter, or in
sampling_parameters, the JSON object of Triton's vLLM models.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from hasten.errors import RequestError
from hasten.request import SamplingParams
from hasten.serve.kserve_fields import GenerateInference, Spec, TextInference, TokenInference
from hasten.serve.kserve_models import TOKENS_SUFFIX, KServeModel, KServeModels, Outputs
from hasten.serve.kserve_tensors import Elements
from hasten.serve.pieces import Piece
from hasten.serve.service import Generation, Service

TEXT_OUTPUT = "text_output"
OUTPUT_IDS = "output_ids"
FINISH_REASON = "finish_reason"
NUM_INPUT_TOKENS = "num_input_tokens"
NUM_OUTPUT_TOKENS = "num_output_tokens"
DEFAULT_MAX_TOKENS = SamplingParams().max_tokens
SAMPLING_PARAMETERS = "sampling_parameters"


class GeneratingModel(KServeModel[GenerateInference]):
    """One of the two models."""

    is_decoupled = True
    # of Triton's TensorRT-LLM and vLLM models
    other_names: ClassVar = {
        "stop": "stop_words",
        "random_seed": "seed",
        "request_output_len": "max_tokens",
        "min_length": "min_tokens",
    }

    @cached_property
    def outputs(self) -> Mapping[str, Spec]:
        """The finish reason is in a request's last response only, counts where they are asked for."""
        is_text = self._inference is TextInference
        output = {TEXT_OUTPUT: Spec("BYTES")} if is_text else {OUTPUT_IDS: Spec("INT32", (-1,))}
        counts = dict.fromkeys((NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS), Spec("UINT32"))
        return {**output, FINISH_REASON: Spec("BYTES"), **counts}

    def read_values(self, *sources: Mapping[str, Any]) -> GenerateInference:
        nested = [_json_object(source[SAMPLING_PARAMETERS]) for source in sources if SAMPLING_PARAMETERS in source]
        inference = super().read_values(*sources, *nested)
        if not inference.exclude_input_in_output:
            raise RequestError("exclude_input_in_output must be true or absent: the output never has the input")
        return inference

    async def open(self, inference: GenerateInference, *, is_stream: bool) -> "GenerationAnswer":
        if not is_stream:
            inference.check_unary()
        service = self._service
        service.check_ready()
        prompt = inference.prompt
        token_ids = await service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        room = service.output_room(token_ids)
        service.check_vocabulary(inference.stop_token_ids, "stop_token_ids")
        sampling = inference.sampling(inference.max_tokens or min(max(DEFAULT_MAX_TOKENS, inference.min_tokens), room))
        timeout_s = inference.timeout / 1e6 if inference.timeout else None
        generation = await service.open(token_ids, sampling, priority=inference.priority, timeout_s=timeout_s)
        return GenerationAnswer(inference, generation, is_stream=is_stream and inference.stream is not False)


class GenerationAnswer:
    """The responses to one request.

    Args:
        is_stream: whether there is one for each read of the engine's tokens; else one for all.
    """

    def __init__(self, inference: GenerateInference, generation: Generation, *, is_stream: bool) -> None:
        self.work = generation
        self._is_text = isinstance(inference, TextInference)
        self._has_num_output_tokens = inference.return_num_output_tokens
        self._constant = {NUM_INPUT_TOKENS: [generation.num_prompt_tokens]} if inference.return_num_input_tokens else {}
        self._responses = self._each() if is_stream else self._whole()

    def __aiter__(self) -> AsyncIterator[Outputs]:
        return self._responses

    async def aclose(self) -> None:
        """Ends the request if it still runs."""
        await self._responses.aclose()
        await self.work.aclose()

    def outputs(self, pieces: Sequence[Piece]) -> Outputs:
        """The response that has these pieces."""
        values: dict[str, Elements]
        if self._is_text:
            values = {TEXT_OUTPUT: ["".join([piece.text for piece in pieces])], **self._constant}
        else:
            values = {OUTPUT_IDS: [token_id for piece in pieces for token_id in piece.token_ids], **self._constant}
        if self._has_num_output_tokens:
            values[NUM_OUTPUT_TOKENS] = [sum(len(piece.token_ids) for piece in pieces)]
        if pieces[-1].finish_reason is not None:
            values[FINISH_REASON] = [pieces[-1].finish_reason]
        return values

    async def _each(self) -> AsyncGenerator[Outputs, None]:
        async for pieces in self.work:
            yield self.outputs(pieces)

    async def _whole(self) -> AsyncGenerator[Outputs, None]:
        yield self.outputs([piece async for pieces in self.work for piece in pieces])


def generating_models(service: Service) -> KServeModels:
    """Both models of a service whose model generates."""
    return KServeModels(
        service,
        GeneratingModel(service, service.model_name, TextInference),
        GeneratingModel(service, service.model_name + TOKENS_SUFFIX, TokenInference),
    )


def _json_object(text: Any) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{SAMPLING_PARAMETERS} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"{SAMPLING_PARAMETERS} must be a JSON object")
    return values
