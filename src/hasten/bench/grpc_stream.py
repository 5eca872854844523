"""A gRPC client connection for measuring: the bytes of each response message and when they were read.

Nothing is encoded or decoded here. A request is one message on a call of its own, which the client ends at
once; the server ends it behind its last response. On the wire that is ModelStreamInfer, too, with one request on
the stream. One `GrpcConnection` is one TCP connection and carries one request at a time.
"""

import asyncio
import ssl
import time
from typing import Any

from hasten.bench.http_stream import CONNECT_TIMEOUT_S, Address, Exchange
from hasten.extras import require

# what the status says to a client of the closed loop, in HTTP's terms
STATUS_OF_CODE = {"RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503}

OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # channels to one address would share a connection
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIMEOUT_S * 1e3)),  # how long one attempt to connect may take
)


class GrpcConnection:
    """One connection. `run` sends a request and returns when its answer has ended, however it ended.

    Args:
        path: of the method, such as /inference.GRPCInferenceService/ModelStreamInfer.

    Raises:
        MissingExtraError: gRPC is not installed.
    """

    def __init__(self, address: Address, path: str) -> None:
        self._address, self._path = address, path
        self._grpc = require("grpc")
        self._channel: Any = None
        self._call: Any = None
        self._exchange = Exchange(0.0)

    async def open(self) -> None:
        """Raises OSError where the server cannot be reached."""
        if self._channel is None:
            self._channel = _open_channel(self._grpc, self._grpc.aio, self._address)
            self._method = self._channel.unary_stream(self._path)
        states = self._grpc.ChannelConnectivity
        while (state := self._channel.get_state(try_to_connect=True)) is not states.READY:
            if state is states.TRANSIENT_FAILURE:  # a channel would wait before it tries again; a new one does not
                await self.close()
                raise OSError(f"no server that speaks gRPC answers at {self._address.netloc}")
            await self._channel.wait_for_state_change(state)

    async def run(self, payload: bytes, submitted_s: float | None = None) -> Exchange:
        """Sends a request.

        Args:
            payload: the request's message.
            submitted_s: when the request should have been sent; None is when it is.
        """
        try:
            await self.open()
        except OSError as error:
            return Exchange.failed(submitted_s, f"no connection: {error}")
        self._exchange = exchange = Exchange(submitted_s or time.perf_counter())
        self._call = self._method(payload, metadata=_metadata(self._address))
        try:
            async for part in self._call:
                exchange.times_s.append(time.perf_counter())
                exchange.parts.append(part)
            exchange.status = 200
        except self._grpc.aio.AioRpcError as error:
            _note_status(exchange, error)
        except asyncio.CancelledError:
            if exchange.error is None:  # not by `fail`
                raise
        self._call = None
        exchange.ended_s = exchange.ended_s or time.perf_counter()
        return exchange

    def fail(self, reason: str) -> None:
        """Gives the answer that is awaited up; the connection stays."""
        if self._call is not None:
            self._exchange.error = reason
            self._exchange.ended_s = time.perf_counter()
            self._call.cancel()

    async def close(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()


def ask(address: Address, path: str, payload: bytes, timeout_s: float) -> tuple[str, str, list[bytes]]:
    """Sends one request and waits for all of its answer, outside of an event loop.

    Returns:
        The status's name, such as OK or NOT_FOUND, what the server says about it, and the response messages.
    """
    grpc = require("grpc")
    parts: list[bytes] = []
    with _open_channel(grpc, grpc, address) as channel:
        try:
            parts.extend(channel.unary_stream(path)(payload, timeout=timeout_s, metadata=_metadata(address)))
        except grpc.RpcError as error:
            return error.code().name, one_line(error.details()), parts
    return "OK", "", parts


def _open_channel(grpc: Any, kind: Any, address: Address) -> Any:
    """Args: kind: grpc, or grpc.aio for an event loop."""
    if not address.is_tls:
        return kind.insecure_channel(address.netloc, options=OPTIONS)
    # what HTTPS trusts here (SSL_CERT_FILE, the system), where it is known as files; else gRPC's own list
    trusted = ssl.create_default_context().get_ca_certs(binary_form=True)
    roots = "".join(map(ssl.DER_cert_to_PEM_cert, trusted)).encode() or None
    return kind.secure_channel(address.netloc, grpc.ssl_channel_credentials(roots), options=OPTIONS)


def _metadata(address: Address) -> tuple[tuple[str, str], ...]:
    return () if address.key is None else (("authorization", f"Bearer {address.key}"),)


def _note_status(exchange: Exchange, error: Any) -> None:
    """Puts down how a call ended that did not end with OK."""
    exchange.status = STATUS_OF_CODE.get(error.code().name)
    exchange.error = exchange.error or f"the call ended with {error.code().name}: {one_line(error.details())}"
    retry_after = dict(error.trailing_metadata() or ()).get("retry-after", "")
    if isinstance(retry_after, str) and retry_after.isdecimal():
        exchange.retry_after_s = float(retry_after)


def one_line(details: str | None) -> str:
    return " ".join((details or "no reason given").split())[:300]
