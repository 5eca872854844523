"""Errors in OpenAI's form, with the HTTP status that belongs to each.

Every error of a server's HTTP side is written here, so that each is counted by its kind once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response

from hasten.config import nearest
from hasten.errors import (
    DrainingError,
    EngineUnavailableError,
    HastenError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
)

MAX_MESSAGE_CHARS = 1000


@dataclass(frozen=True)
class ApiError:
    """One error as a client sees it.

    Args:
        code: what programs look at; also the kind by which metrics count errors.
        param: the request's field that is wrong, None if no single one is.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> bytes:
        """{"error": {...}}, in bytes of JSON."""
        fields = {
            "message": printable(self.message),
            "type": self.type,
            "param": None if self.param is None else printable(self.param),
            "code": self.code,
        }
        return msgspec.json.encode({"error": fields})

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


class ApiException(Exception):
    """Raised in a route to answer with this error."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def describe(error: Exception, param: str | None = None) -> ApiError:
    """The answer to an exception; what no client can have caused is an internal error that says nothing.

    Args:
        param: the field to blame for a RequestError.
    """
    message = str(error)
    match error:
        case ApiException():
            return error.error
        case RequestError():
            return ApiError(400, "invalid_value", message, param)
        case QueueFullError():
            return ApiError(429, "queue_full", message, retry_after_s=error.retry_after_s)
        case DrainingError():
            return ApiError(503, "shutting_down", message, retry_after_s=1)
        case EngineUnavailableError():
            return ApiError(503, "engine_unavailable", message, retry_after_s=1)
        case RequestTimeoutError():
            return ApiError(504, "timeout", message)
        case HastenError():
            return ApiError(500, "engine_error", message)
    return ApiError(500, "internal_error", "the server failed at this request: its log says why")


def describe_http(status: int, detail: str) -> ApiError:
    """The answer where no route took the request, or its body could not be read."""
    codes = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    return ApiError(status, codes.get(status, f"http_{status}"), detail)


def describe_validation(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> ApiError:
    """The answer to what pydantic found, by the first field that is wrong.

    Args:
        errors: with "type", "loc" (beginning with "body") and "msg".
        known: the fields that there are, to offer the nearest.
    """
    first = errors[0]
    path = [part for part in first["loc"][1:] if isinstance(part, str | int)]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_body", f"the body is no JSON: {first['ctx']['error']}")
    if not path:
        message = first["msg"].removeprefix("Value error, ")
        param = message.split(" ", 1)[0]  # validators of whole models begin with the field's name
        if param in known or first["type"] == "value_error":
            return ApiError(400, "invalid_value", message, param)
        return ApiError(400, "invalid_body", "the body must be a JSON object, sent as application/json")
    param = str(path[0])
    if first["type"] == "extra_forbidden":
        name = str(path[-1])
        hint = f": {nearest(name, known)}" if len(path) == 1 else ""
        where = "" if len(path) == 1 else f" in {param}"
        return ApiError(400, "unknown_parameter", f"there is no parameter {name!r}{where}{hint}", param)
    if first["type"] == "missing":
        return ApiError(400, "missing_parameter", f"{'.'.join(map(str, path))} is missing", param)
    reasons = dict.fromkeys(error["msg"] for error in errors if error["loc"][1:2] == first["loc"][1:2])
    return ApiError(400, "invalid_value", f"{param}: {', or '.join(reasons)}", param)


def printable(text: str) -> str:
    """What JSON in UTF-8 can hold: a client may have sent lone surrogates, and megabytes."""
    return text[:MAX_MESSAGE_CHARS].encode("utf-8", errors="replace").decode("utf-8")
