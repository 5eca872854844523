"""The routes that every model has: /v1/models of the OpenAI API, and vLLM's /tokenize and /detokenize.

Also what all routes of the OpenAI API share.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from hasten.errors import RequestError
from hasten.serve.json_route import JsonRoute
from hasten.serve.openai_chat_models import TokenizeRequest, Tool
from hasten.serve.openai_errors import ApiError, ApiException, describe
from hasten.serve.openai_models import DetokenizeRequest
from hasten.serve.service import Service
from hasten.serve.tokenizer import ServeTokenizer

ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    for status, description in (("4XX", "what is wrong with the request"), ("5XX", "why it cannot be answered"))
}


def json_response(values: Any) -> Response:
    return Response(msgspec.json.encode(values), media_type="application/json")


def models_router(service: Service) -> APIRouter:
    """The routes of one service."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)

    @router.get("/v1/models")
    async def list_models() -> Response:
        """The one model that is served."""
        service.check_ready()  # before the model is loaded, its limits are not known
        return json_response({"object": "list", "data": [_model(service)]})

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        """The model, by its name."""
        check_model(service, model)
        service.check_ready()
        return json_response(_model(service))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of messages in the chat template."""
        check_model(service, body.model)
        service.check_ready()
        if body.messages is None:
            with blaming("prompt"):
                tokens = await service.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        else:
            with blaming("messages"):
                messages = [message.for_template() for message in body.messages]
            tokens = await chat_prompt(
                service.tokenizer,
                messages,
                body.tools,
                body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
            )
        token_strs = [service.tokenizer.text_of(token) for token in tokens] if body.return_token_strs else None
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": service.max_model_tokens,
                "tokens": tokens,
                "token_strs": token_strs,
            }
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of token ids, special tokens included."""
        check_model(service, body.model)
        service.check_ready()
        with blaming("tokens"):
            service.check_vocabulary(body.tokens)
        return json_response({"prompt": service.tokenizer.decode(body.tokens)})

    return router


async def chat_prompt(
    tokenizer: ServeTokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> tuple[int, ...]:
    """Token ids of a chat.

    Args:
        messages: as chat templates expect them.
        options: variables of the chat template.

    Raises:
        ApiException: what the chat template cannot take.
    """
    described = [tool.for_template() for tool in tools]
    with blaming("tools"):
        tokenizer.check_tools(described)
    with blaming("chat_template_kwargs"):
        tokenizer.check_options(options)
    with blaming("messages"):
        return await tokenizer.encode_chat(messages, described, options, add_generation_prompt=add_generation_prompt)


class blaming:
    """Names the field that a RequestError inside is about."""

    def __init__(self, param: str) -> None:
        self._param = param

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RequestError):
            raise ApiException(describe(error, self._param)) from error


def check_model(service: Service, name: str | None) -> None:
    """Raises ApiException for a name that is not the served model's."""
    if name not in (None, service.model_name):
        message = f"there is no model {name!r}; {service.model_name!r} is served"
        raise ApiException(ApiError(404, "model_not_found", message, "model"))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": int(service.start_time_s),
        "owned_by": "hasten",
        "max_model_len": service.max_model_tokens,
    }
