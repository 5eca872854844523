"""The HTTP application of a server: FastAPI with the routers of its protocols, behind the gate.

FastAPI reads and checks requests and describes them (`/openapi.json`); answers and streams are written
by the routers themselves. Every error leaves in the form of the protocol that its path belongs to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from hasten.serve.access import ApiKeys, Gate, http_request
from hasten.serve.embedding_api import embedding_router
from hasten.serve.json_route import EXPECTED_ERRORS, JsonRoutes
from hasten.serve.kserve_embeddings import embedding_models
from hasten.serve.kserve_generation import generating_models
from hasten.serve.kserve_http import PREFIX, kserve_error, kserve_router
from hasten.serve.models_api import ERRORS, json_response, models_router
from hasten.serve.openai_api import openai_router
from hasten.serve.openai_errors import ApiError, ApiException, describe, describe_http, describe_validation
from hasten.serve.page_route import PAGE_FILES, page_router
from hasten.serve.prometheus import CONTENT_TYPE
from hasten.serve.service import Service

EMBEDDINGS = "/v1/embeddings"
GENERATING = (
    "/v1/completions",
    "/v1/chat/completions",
    *(f"{PREFIX}/models/{{model:path}}/{suffix}" for suffix in ("generate", "generate_stream")),
)

OPEN_PATHS = ("/health", "/ready", *PAGE_FILES)


@dataclass(frozen=True)
class HttpLimits:
    """Who may ask what over HTTP.

    Args:
        keys: None lets everybody in.
        cors_origins: origins whose pages may read answers.
        max_body_bytes: of one request.
        log_prompts: whether the log has them.
    """

    keys: ApiKeys | None = None
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 32 << 20
    log_prompts: bool = False


def make_app(service: Service, limits: HttpLimits, routers: Sequence[APIRouter] = ()) -> ASGIApp:
    """The application of a service whose model generates.

    Args:
        routers: further protocols and pages.
    """
    reason = f"{service.model_name} generates text and gives no embeddings: serve an encoder for them"
    return _gated(
        service,
        limits,
        openai_router(service),
        models_router(service),
        kserve_router(generating_models(service)),
        operations_router(service),
        page_router(service),
        refusing_router((EMBEDDINGS,), reason),
        *routers,
    )


def make_embedding_app(service: Service, limits: HttpLimits) -> ASGIApp:
    """The application of a service whose model is an encoder."""
    reason = (
        f"{service.model_name} is an encoder, which gives embeddings and generates nothing: ask {EMBEDDINGS}, or "
        "infer of KServe v2"
    )
    return _gated(
        service,
        limits,
        embedding_router(service),
        models_router(service),
        kserve_router(embedding_models(service)),
        operations_router(service),
        refusing_router(GENERATING, reason),
    )


def refusing_router(paths: Sequence[str], reason: str) -> APIRouter:
    """Routes of other kinds of models, which are answered with 404 and the reason, and are not described."""
    router = APIRouter(include_in_schema=False)

    async def refuse() -> Response:
        raise ApiException(ApiError(404, "not_found", reason))

    for path in paths:
        router.add_api_route(path, refuse, methods=["GET", "POST"])
    return router


def _gated(service: Service, limits: HttpLimits, *routers: APIRouter) -> ASGIApp:
    app = FastAPI(title="hasten", version=version("hasten"), docs_url=None, redoc_url=None)
    for router in routers:
        app.include_router(router)
    for kind in (*EXPECTED_ERRORS, Exception):
        app.add_exception_handler(kind, _answer_error)
    gate = Gate(
        JsonRoutes(app, routers, _answer_error),
        keys=limits.keys,
        open_paths=OPEN_PATHS,
        max_body_bytes=limits.max_body_bytes,
        log_prompts=limits.log_prompts,
        error_response=error_response,
        on_error=lambda code: service.metrics.errors.update((code,)),
    )
    if not limits.cors_origins:
        return gate
    return CORSMiddleware(gate, limits.cors_origins, allow_methods=("GET", "POST"), allow_headers=("*",))


def error_response(scope: Scope, error: ApiError) -> Response:
    """An error in the form of the protocol that the path belongs to."""
    return kserve_error(error) if scope["path"].startswith(PREFIX) else error.response()


def operations_router(service: Service) -> APIRouter:
    """What those who run a server ask: is it alive, does it take requests, how is it."""
    router = APIRouter(responses=ERRORS)

    @router.get("/health")
    async def health() -> Response:
        """200 while the server works or can mend itself; 503 once its engine will not be started again."""
        if service.client.failure is not None:
            return describe(service.client.failure).response()
        return json_response({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """200 while requests are taken; 503 while the model loads, the engine restarts or the server drains."""
        service.check_ready()
        return json_response({"status": "ready", "model": service.model_name})

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    @router.get("/version")
    async def server_version() -> Response:
        """The version of hasten."""
        return json_response({"version": version("hasten")})

    return router


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        described = describe_validation(error.errors(), _fields_of(request))
    elif isinstance(error, HTTPException):
        described = describe_http(error.status_code, str(error.detail))
    else:
        described = describe(error)
    http_request(request.scope).error = described.code
    return error_response(request.scope, described)


def _fields_of(request: Request) -> list[str]:
    """The fields of the body that the request's route takes."""
    models = [param.field_info.annotation for param in request.scope["route"].dependant.body_params]
    return [
        name
        for model in models
        if isinstance(model, type) and issubclass(model, BaseModel)
        for name in model.model_fields
    ]
