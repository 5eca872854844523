"""A lean HTTP/1.1 client connection for measuring: the bytes of each answer and when they were read.

While an answer comes, a read is stamped, unframed (httptools, C) and kept; nothing is decoded. One
`Connection` carries one request at a time and is reused. A connection that the server closed while it was
idle is opened again, unseen by the caller. Redirects, compression and HTTP/2 are not spoken.
"""

import asyncio
import socket
import ssl
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urlsplit

from hasten.errors import UsageError
from hasten.extras import require

CONNECT_TIMEOUT_S = 10.0
HTTP_SCHEMES = ("http", "https")
GRPC_SCHEMES = ("grpc", "grpcs")


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Args:
        prefix: path before the API's own, "" for none.
        key: sent as a bearer token.
        is_grpc: whether it speaks gRPC, not HTTP/1.1.
    """

    host: str
    port: int
    is_tls: bool = False
    prefix: str = ""
    key: str | None = field(default=None, repr=False)
    is_grpc: bool = False

    @classmethod
    def from_url(cls, url: str, key: str | None = None) -> "Address":
        """Raises UsageError for what is not an address of a server."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise UsageError(f"{url!r} is not an address such as http://127.0.0.1:8000: {error}") from error
        _check_url(url, parts)
        is_tls = parts.scheme in ("https", "grpcs")
        is_grpc = parts.scheme in GRPC_SCHEMES
        prefix = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/v2")
        return cls(parts.hostname or "", port or (443 if is_tls else 80), is_tls, prefix, key, is_grpc)

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        scheme = (GRPC_SCHEMES if self.is_grpc else HTTP_SCHEMES)[self.is_tls]
        return f"{scheme}://{self.netloc}{self.prefix}"

    @property
    def headers(self) -> dict[str, str]:
        headers = {"host": self.netloc, "content-type": "application/json", "accept": "text/event-stream"}
        return headers if self.key is None else {**headers, "authorization": f"Bearer {self.key}"}

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of a request."""
        lines = [f"POST {self.prefix}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join((*lines, f"content-length: {len(body)}", "", "")).encode("latin-1") + body


def _check_url(url: str, parts: SplitResult) -> None:
    if parts.scheme not in HTTP_SCHEMES + GRPC_SCHEMES or not parts.hostname:
        raise UsageError(f"{url!r} is not an address such as http://127.0.0.1:8000")
    if parts.username is not None or parts.query:
        raise UsageError(f"{url!r} has a name or a query: give http://HOST:PORT and the key by --api-key-file")
    if parts.scheme in GRPC_SCHEMES and parts.path.strip("/"):
        raise UsageError(f"{url!r} has a path, which gRPC has not: give {parts.scheme}://{parts.netloc}")


@dataclass(slots=True)
class Exchange:
    """One request and its answer as it was read.

    Args:
        ended_s: when the last byte was read, or the failure was known.
        status: of HTTP; for gRPC the one that means the same, None where there is none.
        error: one sentence where no whole answer was read. Over HTTP an answer with another status than 200 is whole.
    """

    submitted_s: float
    times_s: list[float] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    ended_s: float = 0.0
    status: int | None = None
    retry_after_s: float | None = None
    error: str | None = None

    @classmethod
    def failed(cls, submitted_s: float | None, reason: str) -> "Exchange":
        """One for which there was no connection."""
        now_s = time.perf_counter()
        return cls(submitted_s or now_s, ended_s=now_s, error=reason)


class Connection(asyncio.Protocol):
    """One connection. `run` sends a request and returns when its answer has ended, however it ended."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._http = require("httptools")
        self._transport: Any = None
        self._ended: asyncio.Future[None] | None = None
        self._exchange = Exchange(0.0)
        self._now_s = 0.0
        self._is_framed = self._has_answered = False

    async def open(self) -> None:
        """Raises OSError where the server cannot be reached."""
        while self._transport is not None:
            if not self._transport.is_closing():
                return
            await asyncio.sleep(0)
        tls = ssl.create_default_context() if self._address.is_tls else None
        connecting = asyncio.get_running_loop().create_connection(
            lambda: self, self._address.host, self._address.port, ssl=tls
        )
        try:
            await asyncio.wait_for(connecting, CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            raise OSError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from error

    async def run(self, payload: bytes, submitted_s: float | None = None) -> Exchange:
        """Sends a request.

        Args:
            submitted_s: when the request should have been sent; None is when it is.
        """
        while True:
            is_reused = self._has_answered and self._transport is not None
            try:
                await self.open()
            except OSError as error:
                return Exchange.failed(submitted_s, f"no connection: {error.strerror or error}")
            self._ended = asyncio.get_running_loop().create_future()
            self._exchange = Exchange(submitted_s or time.perf_counter())
            self._transport.write(payload)
            await self._ended
            if is_reused and self._transport is None and self._exchange.status is None and not self._exchange.ended_s:
                continue  # the server had closed it while it was idle
            return self._exchange

    def fail(self, reason: str) -> None:
        """Gives the answer that is awaited up, and the connection with it."""
        if self._ended is not None and not self._ended.done():
            self._exchange.error = reason
            self._exchange.ended_s = time.perf_counter()
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._has_answered = self._is_framed = False
        self._parser = self._http.HttpResponseParser(self)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._ended is None or self._ended.done():
            return
        exchange = self._exchange
        if exchange.error is None and exchange.status is not None:
            exchange.ended_s = time.perf_counter()
            if self._is_framed:
                exchange.error = "the server closed the connection in the middle of the answer"
        elif exchange.error is None and not self._has_answered:
            exchange.ended_s = time.perf_counter()
            exchange.error = "the server closed the connection without an answer"
        self._ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except self._http.HttpParserError:
            self.fail("the server's answer is not HTTP/1.1")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._is_framed = True
        elif name == b"retry-after" and value.isdigit():
            self._exchange.retry_after_s = float(value)

    def on_headers_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._exchange.times_s.append(self._now_s)
        self._exchange.parts.append(body)

    def on_message_complete(self) -> None:
        self._exchange.ended_s = self._now_s
        self._has_answered, self._is_framed = True, False
        if not self._parser.should_keep_alive():
            self.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


def status_text(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
