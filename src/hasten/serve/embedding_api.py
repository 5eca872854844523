"""POST /v1/embeddings of the OpenAI API, for an encoder."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from hasten.errors import RequestError
from hasten.runtimes.base import EmbeddingFacts
from hasten.serve.access import http_request
from hasten.serve.embedding_service import Embedding
from hasten.serve.json_route import JsonRoute
from hasten.serve.models_api import ERRORS, check_model
from hasten.serve.openai_errors import ApiError, ApiException, describe
from hasten.serve.openai_models import INT32, MAX_INPUTS, EmbeddedText, OpenAIModel, TokenId
from hasten.serve.service import Service

SMALLEST_LENGTH = 1e-12  # a vector of zeros stays one

TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class EmbeddingsBody(OpenAIModel):
    """POST /v1/embeddings."""

    input: (
        EmbeddedText
        | TokenIds
        | Annotated[list[EmbeddedText], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="text, token ids, or a list of either")
    model: str | None = Field(None, description="a name that /v1/models lists; the served model if absent")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is of float32, little endian")
    dimensions: int | None = Field(None, ge=1, le=INT32, description="fewer than the model has, where it allows that")
    user: str | None = Field(None, description="a label; it changes nothing")

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """The inputs of the request, one or more."""
        is_one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if is_one else self.input  # type: ignore[list-item, return-value]


def embedding_router(service: Service) -> APIRouter:
    """The route of one service, whose engine is an encoder."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)

    @router.post("/v1/embeddings")
    async def create_embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """A vector for each input."""
        record = http_request(request.scope)
        record.prompts = body.input
        check_model(service, body.model)
        service.check_ready()
        facts = service.client.facts.embedding
        assert facts is not None, "an encoder tells what its vectors are"
        check_size(body.dimensions, facts)
        try:
            embedding = await Embedding.of(service, body.inputs)
        except RequestError as error:
            raise ApiException(describe(error, "input")) from error
        record.generations = (embedding,)
        vectors = cut(await embedding.vectors(), body.dimensions, facts)
        data = []
        for index, vector in enumerate(vectors):
            data.append({"object": "embedding", "index": index, "embedding": encoded(vector, body.encoding_format)})
            await asyncio.sleep(0)  # thousands of vectors take a second to write, and others must not wait for it
        answer = {
            "object": "list",
            "data": data,
            "model": service.model_name,
            "usage": {"prompt_tokens": embedding.num_prompt_tokens, "total_tokens": embedding.num_prompt_tokens},
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router


def check_size(dimensions: int | None, facts: EmbeddingFacts) -> None:
    """Raises ApiException for a size that the model's vectors may not be cut to."""
    if dimensions in (None, facts.size):
        return
    sizes = facts.matryoshka_sizes
    if sizes is None:
        reason = f"it must be {facts.size} or absent, because this model's vectors mean nothing when they are cut"
    elif sizes and dimensions not in sizes:
        reason = f"it must be one of {', '.join(map(str, sizes))}"
    elif dimensions is not None and dimensions > facts.size:
        reason = f"it may be at most {facts.size}"
    else:
        return
    raise ApiException(ApiError(400, "invalid_value", f"dimensions is {dimensions}: {reason}", "dimensions"))


def cut(vectors: np.ndarray, dimensions: int | None, facts: EmbeddingFacts) -> np.ndarray:
    """The beginnings of vectors [number, size], of length 1 again where the model's are."""
    if dimensions in (None, facts.size):
        return vectors
    beginnings = vectors[:, :dimensions]
    if not facts.is_normalized:
        return beginnings
    return beginnings / np.maximum(np.linalg.norm(beginnings, axis=1, keepdims=True), SMALLEST_LENGTH)


def encoded(vector: np.ndarray, encoding_format: str) -> msgspec.Raw:
    """A vector as the answer has it, in JSON."""
    if encoding_format == "float":
        return msgspec.Raw(msgspec.json.encode(vector.tolist()))
    return msgspec.Raw(b'"%s"' % base64.b64encode(vector.astype("<f4", copy=False).tobytes()))
