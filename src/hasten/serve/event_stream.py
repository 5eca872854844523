"""Server-sent events as a raw ASGI response: what a token costs on its way out is paid here.

The response does not send itself where a route returns it: there, each chunk would pass through every
layer of the framework. It leaves itself with the request's record, and the gate sends it once the
framework has returned. A reader that is slow stops the source through the server's flow control, with
at most one chunk beside the transport's buffer.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hasten.serve.access import http_request

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect chunks
)

DONE = b"data: [DONE]\n\n"


class EventStreamResponse(Response):
    """Sends chunks that are whole events.

    Args:
        source: is closed at the end, however that comes.
    """

    def __init__(self, chunks: AsyncIterator[bytes], source: AsyncExitStack) -> None:
        self.status_code = 200
        self.background = None
        self._chunks = chunks
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http_request(scope).stream = self

    async def send(self, send: Send) -> None:
        """Sends all of it, but the message that says that it is complete."""
        async with self._source:
            await send({"type": "http.response.start", "status": self.status_code, "headers": list(HEADERS)})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
