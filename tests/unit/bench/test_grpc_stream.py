"""A gRPC connection of the load generator against made-up servers on real sockets."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from hasten.bench import grpc_stream
from hasten.bench.grpc_stream import GrpcConnection, ask
from hasten.bench.http_stream import Address, Exchange

PATH = "/a.Service/Stream"


class Echo(grpc.GenericRpcHandler):
    """Answers as the request's bytes say."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self.peers: set[str] = set()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return grpc.stream_stream_rpc_method_handler(self._stream) if details.method == PATH else None

    async def _stream(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.peers.add(context.peer())
        asked = [each async for each in requests]  # ends only when the client has said that it sends no more
        assert len(asked) == 1
        if asked[0] == b"busy":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many\nrequests", (("retry-after", "3"),))
        yield b"a" + asked[0]
        if asked[0] == b"hang":
            await asyncio.sleep(60)
        if asked[0] == b"break":
            await context.abort(grpc.StatusCode.INTERNAL, "broken")
        await asyncio.sleep(0.03)
        yield b""


def against_a_server(
    use: Callable[[Address, grpc.aio.Server], Awaitable[Any]], key: str | None = None
) -> tuple[Any, Echo]:
    async def run() -> tuple[Any, Echo]:
        echo, server = Echo(), grpc.aio.server()
        server.add_generic_rpc_handlers((echo,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            return await use(Address("127.0.0.1", port, key=key, is_grpc=True), server), echo
        finally:
            await server.stop(0)

    return asyncio.run(run())


def exchanges(*payloads: bytes, key: str | None = None) -> tuple[list[Exchange], Echo]:
    """One after the other over one connection."""

    async def use(address: Address, server: grpc.aio.Server) -> list[Exchange]:
        connection = GrpcConnection(address, PATH)
        made = [await connection.run(payload) for payload in payloads]
        await connection.close()
        return made

    return against_a_server(use, key)


def test_messages_come_as_they_are_with_their_times() -> None:
    begin_s = time.perf_counter()
    (first, second), echo = exchanges(b"x", b"", key="secret")
    assert (first.parts, second.parts) == ([b"ax", b""], [b"a", b""])
    assert (first.status, first.error) == (200, None)
    assert begin_s <= first.submitted_s <= first.times_s[0]
    assert first.times_s[1] - first.times_s[0] > 0.02
    assert first.times_s[1] <= first.ended_s <= second.submitted_s
    assert [each["authorization"] for each in echo.metadata] == ["Bearer secret"] * 2
    assert len(echo.peers) == 1


def test_every_connection_is_one_of_its_own() -> None:
    async def use(address: Address, server: grpc.aio.Server) -> None:
        connections = [GrpcConnection(address, PATH) for _ in range(3)]
        await asyncio.gather(*(connection.run(b"x") for connection in connections))
        await asyncio.gather(*(connection.close() for connection in connections))

    _, echo = against_a_server(use)
    assert len(echo.peers) == 3


def test_a_status_is_one_sentence_and_the_connection_goes_on() -> None:
    (busy, broken, fine), _ = exchanges(b"busy", b"break", b"x")
    assert (busy.status, busy.retry_after_s) == (429, 3.0)
    assert busy.error == "the call ended with RESOURCE_EXHAUSTED: too many requests"
    assert (broken.parts, broken.status) == ([b"abreak"], None)
    assert broken.error == "the call ended with INTERNAL: broken"
    assert fine.error is None


def test_an_answer_that_is_given_up_ends_at_once() -> None:
    async def use(address: Address, server: grpc.aio.Server) -> list[Exchange]:
        connection = GrpcConnection(address, PATH)
        connection.fail("nothing is under way")
        asking = asyncio.create_task(connection.run(b"hang"))
        await asyncio.sleep(0.1)
        connection.fail("too slow")
        made = [await asking, await connection.run(b"x")]
        await connection.close()
        return made

    (given_up, after), _ = against_a_server(use)
    assert (given_up.error, given_up.parts) == ("too slow", [b"ahang"])
    assert given_up.ended_s - given_up.submitted_s < 5
    assert after.error is None


def test_a_server_that_goes_ends_the_answer_and_is_not_there_for_the_next() -> None:
    async def use(address: Address, server: grpc.aio.Server) -> list[Exchange]:
        connection = GrpcConnection(address, PATH)
        asking = asyncio.create_task(connection.run(b"hang"))
        await asyncio.sleep(0.1)
        await server.stop(0)
        return [await asking, await connection.run(b"x", 1.0), await connection.run(b"x")]

    (cut, late, later), _ = against_a_server(use)
    assert cut.error is not None and cut.error.startswith("the call ended with ") and "\n" not in cut.error
    for none in (late, later):
        assert none.error is not None and none.error.startswith("no connection: no server that speaks gRPC answers at ")
    assert late.submitted_s == 1.0


def test_a_server_that_says_nothing_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(grpc_stream.OPTIONS) | {"grpc.min_reconnect_backoff_ms": 200}
    monkeypatch.setattr(grpc_stream, "OPTIONS", tuple(options.items()))

    async def run() -> Exchange:
        server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1], is_grpc=True)
        made = await asyncio.wait_for(GrpcConnection(address, PATH).run(b"x"), 30)
        server.close()
        return made

    error = asyncio.run(run()).error
    assert error is not None and error.startswith("no connection: ")


def test_ask_waits_for_the_whole_answer() -> None:
    async def use(address: Address, server: grpc.aio.Server) -> list[tuple[str, str, list[bytes]]]:
        asked = ((PATH, b"x"), (PATH, b"break"), ("/a.Service/Other", b""))
        return [await asyncio.to_thread(ask, address, path, payload, 10.0) for path, payload in asked]

    (fine, broken, other), _ = against_a_server(use)
    assert fine == ("OK", "", [b"ax", b""])
    assert broken == ("INTERNAL", "broken", [b"abreak"])
    assert other[0] == "UNIMPLEMENTED"
