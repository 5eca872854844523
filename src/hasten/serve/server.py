"""Runs a server from its first moment to its last: listens, loads, serves, drains, ends.

It listens while the model still loads, so that /health and /ready answer. The first SIGTERM or SIGINT
stops new requests with 503 and lets those that were taken end, up to a limit; the second ends at once.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from hasten.errors import UsageError
from hasten.runtimes.base import EngineFacts
from hasten.serve.service import Service

# a connection that is idle after an answer is kept for as long as clients' pools keep theirs
KEEP_ALIVE_S = 75

# who takes nothing of what was written to it for so long has lost its connection
WRITE_TIMEOUT_S = 300

# once the last request has ended, or may not go on, what is written may take this long to leave
FLUSH_TIMEOUT_S = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listen:
    """Where and how to listen.

    Args:
        tls_cert, tls_key: PEM files, both or neither.
        drain_timeout_s: how long requests that were taken may go on after SIGTERM.
        grpc_port: None does not listen for gRPC.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_timeout_s: float = 60.0
    grpc_port: int | None = None


class Server(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def bound(listen: Listen) -> Iterator[socket.socket]:
    """The socket to listen on.

    Raises:
        UsageError: the address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux, where the sockets of connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * WRITE_TIMEOUT_S)
        listener.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {listen.host}:{listen.port}: {error.strerror}") from error
    with listener:
        yield listener


def address_of(listener: socket.socket, listen: Listen) -> str:
    """Where clients find the server, as the beginning of a URL."""
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    return f"{'https' if listen.tls_cert else 'http'}://{host}:{listener.getsockname()[1]}"


async def serve(
    service: Service,
    app: ASGIApp,
    listener: socket.socket,
    listen: Listen,
    loading: asyncio.Task[EngineFacts],
    on_ready: Callable[[], object],
) -> None:
    """Serves until a signal ends it, and closes the engine client.

    Args:
        loading: the client's `start`, under way.
        on_ready: called once the model is loaded.

    Raises:
        UsageError: the TLS files cannot be read.
        HastenError: what loading the model raised.
    """
    server = Server(_uvicorn_config(app, listen))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    with _signals(service, server, listen.drain_timeout_s):
        try:
            await asyncio.wait((loading, running), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                gc.freeze()  # what is there now stays: collecting it again and again would stop all streams
                on_ready()
            await running
        finally:
            server.should_exit = True
            loading.cancel()
            await asyncio.wait((running, loading))
            await service.client.close()


@contextlib.contextmanager
def _signals(service: Service, server: Server, drain_timeout_s: float) -> Iterator[None]:
    """The first signal drains and then ends the server, the second ends the process."""
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    async def drain() -> None:
        service.drain()
        try:
            await asyncio.wait_for(service.idle.wait(), drain_timeout_s)
        except TimeoutError:
            logger.warning(
                "%d sequences had not ended after %g s and are cut off: --drain-timeout-s gives them longer",
                service.num_sequences,
                drain_timeout_s,
            )
            await service.client.close()  # what runs or waits is answered with an error
        server.should_exit = True

    def handle(number: int) -> None:
        if draining:
            os._exit(128 + number)
        logger.info("%s: no new requests; those that run may end", signal.Signals(number).name)
        draining.append(asyncio.create_task(drain()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _uvicorn_config(app: ASGIApp, listen: Listen) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
        ssl_certfile=listen.tls_cert,
        ssl_keyfile=listen.tls_key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"cannot use {listen.tls_cert} and {listen.tls_key} for TLS: {error}") from error
    return config
