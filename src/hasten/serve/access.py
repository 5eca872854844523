"""What every HTTP request meets first: its id, its key, its size, and who notices that its client is gone.

A request's body is read here, up to a limit, and handed on whole. From then on the connection is
watched: when the client goes away, the task that answers is cancelled, whatever route it is in. When a
request has ended, one line is logged; the text of prompts is never in it unless that was asked for.
"""

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.errors import UsageError
from hasten.serve.openai_errors import ApiError

if TYPE_CHECKING:
    from hasten.serve.event_stream import EventStreamResponse
    from hasten.serve.service import Work

logger = logging.getLogger(__name__)

BODY_TIMEOUT_S = 60.0

# asked once a second by pages and monitors: in the log they would hide the requests
POLLED_PATHS = ("/metrics", "/page/figures")

CLIENT_GONE = 499

_SCOPE_KEY = "hasten.request"


class ApiKeys:
    """The keys that let a client in. Only their hashes are kept."""

    def __init__(self, keys: Collection[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """Keys of a file, one a line; empty lines and those that begin with # are none.

        Raises:
            UsageError: the file cannot be read or has no key.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the API keys in {path}: {error}") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UsageError(f"{path} has no API key: write one a line")
        return cls(keys)

    def admits(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header is "Bearer" and a key; takes as long for any value."""
        scheme, _, key = (authorization or "").partition(" ")
        offered = hashlib.sha256(key.strip().encode("utf-8", errors="replace")).digest()
        is_known = False
        for known in self._hashes:
            is_known |= hmac.compare_digest(offered, known)
        return is_known and scheme.lower() == "bearer"


@dataclass
class HttpRequest:
    """One request while it is answered, and what its line in the log will say.

    Args:
        headers: of several with one name, the last.
        body: whole.
        generations: what a route opened for it.
        stream: what is left to send once the framework has returned.
        prompts: what a route was asked to continue, for a log that may have it.
        error: the code of the error that it was answered with, also in the middle of a stream.
    """

    request_id: str
    start_s: float
    status: int = 0
    is_answered: bool = False
    is_client_gone: bool = False
    stream: "EventStreamResponse | None" = None
    error: str | None = None
    generations: Sequence["Work"] = ()
    prompts: Any = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


def http_request(scope: Scope) -> HttpRequest:
    """The record of a request that came through the gate."""
    record: HttpRequest = scope[_SCOPE_KEY]
    return record


def generation_fields(generations: Sequence["Work"]) -> dict[str, Any]:
    """What a request's line in the log says of what was generated for it."""
    first_token_s = [each.first_token_s for each in generations if each.first_token_s is not None]
    return {
        "prompt_tokens": sum(each.num_prompt_tokens for each in generations),
        "completion_tokens": sum(each.num_tokens for each in generations),
        "ttft_s": round(min(first_token_s), 6) if first_token_s else None,
        "finish_reason": generations[-1].finish_reason,
    }


class Gate:
    """Wraps an ASGI application.

    Args:
        open_paths: where no key is asked for.
        error_response: an error in the form that its path's clients know.
        on_error: gets the code of every error that a client was answered with.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None = None,
        open_paths: Collection[str] = (),
        max_body_bytes: int,
        log_prompts: bool = False,
        error_response: Callable[[Scope, ApiError], Response] = lambda scope, error: error.response(),
        on_error: Any = lambda code: None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._max_body_bytes = max_body_bytes
        self._log_prompts = log_prompts
        self._error_response = error_response
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = HttpRequest(uuid.uuid4().hex, time.perf_counter(), headers=dict(scope["headers"]))
        scope[_SCOPE_KEY] = record
        request_id = (b"x-request-id", record.request_id.encode())

        async def send_watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], request_id]
            elif not message.get("more_body"):
                record.is_answered = True
            await send(message)

        try:
            await self._answer(scope, record, receive, send_watched)
        finally:
            if record.error is not None:
                self._on_error(record.error)
            self._log(scope, record)

    async def _answer(self, scope: Scope, record: HttpRequest, receive: Receive, send: Send) -> None:
        body = self._refusal(scope, record) or await self._read_body(record, receive)
        if isinstance(body, ApiError):
            record.error = body.code
            await self._error_response(scope, body)(scope, receive, send)
        elif body is not None:
            record.body = body
            await self._run(scope, record, receive, send)

    def _refusal(self, scope: Scope, record: HttpRequest) -> ApiError | None:
        """Why a request is not even read."""
        if self._keys is not None and scope["path"] not in self._open_paths:
            authorization = record.headers.get(b"authorization", b"").decode("latin-1")
            if not self._keys.admits(authorization):
                return ApiError(401, "invalid_api_key", "no valid API key: send one as Authorization: Bearer KEY")
        length = record.headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"a request's body may have at most {self._max_body_bytes} bytes")

    async def _read_body(self, record: HttpRequest, receive: Receive) -> bytes | ApiError | None:
        """The body; None if the client went away before it had sent all of it."""
        body = b""
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        record.is_client_gone = True
                        return None
                    body = body + message["body"] if body else message["body"]
                    if len(body) > self._max_body_bytes:
                        return self._too_large()
                    if not message.get("more_body"):
                        return body
        except TimeoutError:
            return ApiError(408, "body_timeout", f"the request's body did not come within {BODY_TIMEOUT_S:.0f} s")

    async def _run(self, scope: Scope, record: HttpRequest, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        messages = [{"type": "http.request", "body": record.body, "more_body": False}]

        async def receive_read() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not record.is_answered:
                record.is_client_gone = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_read, send)
            if record.stream is not None:
                await record.stream.send(send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not record.is_client_gone or task.uncancel() > 0:
                raise
        finally:
            watcher.cancel()

    def _log(self, scope: Scope, record: HttpRequest) -> None:
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": CLIENT_GONE if record.is_client_gone else record.status,
            "duration_s": round(time.perf_counter() - record.start_s, 6),
        }
        if record.error is not None:
            fields["error"] = record.error
        if record.generations:
            fields |= {"stream": record.stream is not None, **generation_fields(record.generations)}
        if self._log_prompts and record.prompts is not None:
            fields["prompts"] = record.prompts
        level = logging.DEBUG if scope["path"] in POLLED_PATHS else logging.INFO
        logger.log(level, "request", extra={"fields": fields})
