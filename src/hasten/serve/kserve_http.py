"""KServe v2 over HTTP: the Open Inference Protocol with Triton's binary tensors and its generate extension.

Answers and errors have Triton's forms and status codes: {"error": "..."}, and a server or model that is not
ready answers 400. Paths with /versions/1 are the same as without. A stream's events are a response each; an
error after the first one is its last event.

Not here: what the models take (`kserve_models`), and who is let in (`access`).
"""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from importlib.metadata import version
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from hasten.errors import HastenError
from hasten.serve.access import HttpRequest, http_request
from hasten.serve.event_stream import EventStreamResponse
from hasten.serve.kserve_fields import Inference, TextInference
from hasten.serve.kserve_format import (
    HEADER_LENGTH,
    INFER_SCHEMA,
    AnswerForm,
    binary_outputs,
    infer_response,
    read_generate,
    read_infer,
)
from hasten.serve.kserve_models import KServeModel, KServeModels, Outputs, only_response
from hasten.serve.openai_errors import ApiError, ApiException, describe, printable
from hasten.serve.service import Service

PREFIX = "/v2"

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
            }
        },
    }
    for status, description in (("4XX", "what is wrong with the request"), ("5XX", "why it cannot be answered"))
}

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
BINARY: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}


def error_body(error: ApiError) -> bytes:
    """An error in Triton's form, in bytes of JSON."""
    return msgspec.json.encode({"error": printable(error.message)})


def kserve_error(error: ApiError) -> Response:
    """An error in Triton's form."""
    return Response(error_body(error), error.status, error.headers, media_type="application/json")


def kserve_router(models: KServeModels) -> APIRouter:
    """Routes of all models of one service."""
    router = APIRouter(prefix=PREFIX, responses=ERRORS)
    service = models.service
    names = [each["name"] for each in models.index()]

    async def find(
        model: Annotated[str, Path(json_schema_extra={"enum": names})], request: Request
    ) -> KServeModel[Any]:
        return models.find(model, request.path_params.get("version", ""))

    Model = Annotated[KServeModel[Any], Depends(find)]

    def add(method: str, suffix: str, handler: Callable[..., Coroutine[Any, Any, Response]], **described: Any) -> None:
        for infix in ("/versions/{version}", ""):
            path = f"/models/{{model:path}}{infix}{suffix}"
            router.add_api_route(path, handler, methods=[method], include_in_schema=not infix, **described)

    async def run(model: KServeModel[Any], inference: Inference, record: HttpRequest) -> Outputs:
        record.prompts = inference.prompt
        async with aclosing(await model.open(inference, is_stream=False)) as answer:
            record.generations = (answer.work,)
            return await only_response(answer)

    @router.get("")
    async def server_metadata() -> Response:
        """Name, version and extensions of the server."""
        return _json({"name": "hasten", "version": version("hasten"), "extensions": models.extensions})

    @router.get("/health/live")
    async def server_live() -> Response:
        """200 while the server works or can mend itself."""
        if service.client.failure is not None:
            return kserve_error(ApiError(400, "not_live", str(service.client.failure)))
        return _json({"live": True})

    @router.get("/health/ready")
    async def server_ready() -> Response:
        """200 while requests are taken."""
        return _ready(service)

    @router.post("/repository/index")
    async def repository_index() -> Response:
        """The models that there are."""
        return _json(models.index())

    async def model_ready(model: Model) -> Response:
        """200 while the model takes requests."""
        return _ready(service, name=model.name)

    async def model_config(model: Model) -> Response:
        """The model as Triton's config.pbtxt has it, in JSON."""
        return _json(model.config())

    async def model_metadata(model: Model) -> Response:
        """The model's tensors."""
        return _json(model.metadata())

    async def infer(model: Model, request: Request) -> Response:
        """One request in tensors, one answer."""
        message, tensors = read_infer(await _body(request), request.headers.get(HEADER_LENGTH))
        asked = binary_outputs(model, message)
        inference = model.read(tensors, message.parameters)
        outputs = await run(model, inference, http_request(request.scope))
        return await infer_response(model, message.id, outputs, asked)

    async def generate(model: Model, request: Request) -> Response:
        """One request in plain JSON, one answer."""
        request_id, inference = read_generate(model, await _body(request))
        outputs = await run(model, inference, http_request(request.scope))
        return Response(AnswerForm(model, request_id).answer(outputs), media_type="application/json")

    async def generate_stream(model: Model, request: Request) -> Response:
        """One request in plain JSON, an event for each response."""
        record = http_request(request.scope)
        request_id, inference = read_generate(model, await _body(request))
        record.prompts = inference.prompt
        async with AsyncExitStack() as stack:
            answer = await stack.enter_async_context(aclosing(await model.open(inference, is_stream=True)))
            record.generations = (answer.work,)
            rest = aiter(answer)
            form = AnswerForm(model, request_id)
            return EventStreamResponse(_events(await anext(rest), rest, form, record), stack.pop_all())

    add("GET", "/ready", model_ready)
    add("GET", "/config", model_config)
    add("POST", "/infer", infer, openapi_extra=_described_body(INFER_SCHEMA), responses=BINARY)
    if models.are_decoupled:
        generate_body = _described_body(TextInference.model_json_schema())
        add("POST", "/generate", generate, openapi_extra=generate_body)
        add("POST", "/generate_stream", generate_stream, openapi_extra=generate_body, responses=STREAMS)
    add("GET", "", model_metadata)  # last: its path would match the others' too
    return router


async def _events(
    first: Outputs, rest: AsyncIterator[Outputs], form: AnswerForm, record: HttpRequest
) -> AsyncIterator[bytes]:
    yield form.event(first)
    try:
        async for outputs in rest:
            yield form.event(outputs)
    except HastenError as error:
        described = describe(error)
        record.error = described.code
        yield b"data: " + error_body(described) + b"\n\n"


async def _body(request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ApiException(ApiError(415, "encoding_not_supported", f"bodies in {encoding[:40]!r} are not supported"))
    return await request.body()


def _json(values: Any) -> Response:
    return Response(msgspec.json.encode(values), media_type="application/json")


def _ready(service: Service, **fields: str) -> Response:
    if not service.is_ready:
        return kserve_error(ApiError(400, "not_ready", "no requests are taken now"))
    return _json({**fields, "ready": True})


def _described_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
