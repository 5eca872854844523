"""Routes of FastAPI's whose body is one pydantic model, on the shortest way from the gate to their handlers.

FastAPI itself matches paths one after the other, enters its middleware and exit stacks, parses the body, resolves
the handler's parameters and validates then. That is two fifths of the time from the gate to a request's submission,
and where requests come in bursts after a pause the processor's caches have none of that code. The description, the
errors and every other route stay FastAPI's.
"""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hasten.errors import HastenError
from hasten.serve.access import http_request
from hasten.serve.openai_errors import ApiException

EXPECTED_ERRORS = (RequestValidationError, HTTPException, ApiException, HastenError)

Answer = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """Calls its handler with the model, validated straight from the bytes, and, where that asks for it, the request.

    Attributes:
        answer: what does so; None without a body.
    """

    answer: Answer | None

    def get_route_handler(self) -> Answer:
        if not self.dependant.body_params:
            self.answer = None
            return super().get_route_handler()
        [body_param] = self.dependant.body_params
        model = body_param.field_info.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        handler, request_name = self.endpoint, self.dependant.request_param_name

        async def answer(request: Request) -> Response:
            received = http_request(request.scope)
            # other kinds are sent by any page in a browser, to any server, without asking it first
            if not _is_json(received.headers.get(b"content-type", b"")):
                raise RequestValidationError([{"type": "content_type", "loc": ("body",), "msg": "not JSON"}])
            arguments: dict[str, Any] = {} if request_name is None else {request_name: request}
            try:
                arguments[body_param.name] = model.model_validate_json(received.body)
            except ValidationError as error:
                found = error.errors(include_url=False, include_input=False)
                raise RequestValidationError([each | {"loc": ("body", *each["loc"])} for each in found]) from error
            response: Response = await handler(**arguments)
            return response

        self.answer = answer
        return answer


class JsonRoutes:
    """Answers the JsonRoutes of an application that have a body; the rest is the application's.

    Args:
        routers: those that the application includes, none under a prefix of its own.
        answer_error: what the application also has for EXPECTED_ERRORS.
    """

    def __init__(
        self,
        app: FastAPI,
        routers: Sequence[APIRouter],
        answer_error: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._answer_error = answer_error
        routes = [route for router in routers for route in router.routes if isinstance(route, JsonRoute)]
        self._routes = {route.path: route for route in routes if route.answer is not None}
        assert all(route.methods == {"POST"} for route in self._routes.values())
        assert not any(route.param_convertors for route in self._routes.values()), "paths are compared whole"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None or route.answer is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            response = await route.answer(request)
        except Exception as error:
            response = await self._answer_error(request, error)
            await response(scope, receive, send)
            if not isinstance(error, EXPECTED_ERRORS):
                raise  # the server logs it
            return
        await response(scope, receive, send)


def _is_json(content_type: bytes) -> bool:
    kind, _, subtype = content_type.partition(b";")[0].strip().lower().partition(b"/")
    return kind == b"application" and (subtype == b"json" or subtype.endswith(b"+json"))
