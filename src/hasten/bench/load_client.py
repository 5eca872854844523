"""One client process of the load generator: sends its share of a run's requests and keeps the answers.

Told by messages over a pipe: its server, then `Prepare` a run, `Go` at a time, `Stop` early. While requests are under
way nothing is decoded; answers are read as bytes with times (`http_stream`, `grpc_stream`) and decoded when the
run has ended, or before, one answer at a time, when more than MAX_RAW_BYTES of them wait.
Loads neither torch nor a tokenizer.
"""

import asyncio
import gc
import importlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from hasten.bench.endpoints import IGNORE_EOS, Endpoint, OnlineRequest, OpenAIEndpoint
from hasten.bench.grpc_stream import GrpcConnection
from hasten.bench.http_stream import Address, Connection, Exchange, status_text
from hasten.bench.result import RequestRecord
from hasten.bench.token_times import token_times_s
from hasten.extras import is_installed

MAX_RAW_BYTES = 512 << 20
MAX_RETRY_AFTER_S = 10.0
TIMER_STEP_S = 0.002  # an event loop's timer is this coarse; who is later than that is late
REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class Prepare:
    """A run to make.

    Args:
        num_clients: most requests at the same time; a closed loop sends the requests without
            arrival_s one after the other through each.
        timeout_s: longest that one answer may take.
    """

    requests: tuple[OnlineRequest, ...]
    num_clients: int
    timeout_s: float


@dataclass(frozen=True)
class Go:
    """Begin at start_s of time.perf_counter(), which all processes of a machine share on Linux."""

    start_s: float


@dataclass(frozen=True)
class Stop:
    """Begin no further request; those under way are finished."""


@dataclass(frozen=True)
class Ready:
    """The run is prepared: connections are open, requests are encoded."""


@dataclass(frozen=True)
class Counted:
    """How many requests have ended."""

    num_ended: int


@dataclass(frozen=True)
class Ended:
    """The last answer has come; records follow.

    Args:
        end_s: when it had.
        busy_share: CPU time of this process over the time since the start.
    """

    end_s: float
    busy_share: float


Records = tuple[RequestRecord, ...]
AnyConnection = Connection | GrpcConnection


def main() -> None:
    """Serves the pipe whose file descriptor is the process's argument, until it is closed."""
    pipe = Pipe(int(sys.argv[1]))
    address, endpoint = pipe.recv()
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if is_installed("uvloop"):
        loop_factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_serve(pipe, address, endpoint))


async def _serve(pipe: Pipe, address: Address, endpoint: Endpoint) -> None:
    messages: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def receive() -> None:
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)  # the parent has gone
            loop.call_soon_threadsafe(messages.put_nowait, message)

    # a thread, because an event loop would make the pipe non-blocking, for sending too
    threading.Thread(target=receive, daemon=True).start()
    connections = [_connection(address, endpoint)]
    while True:
        run = _Run(await messages.get(), endpoint, address, connections)
        await run.prepare()
        gc.collect()
        gc.disable()  # until the records are made
        pipe.send(Ready())
        going = await messages.get()
        if isinstance(going, Stop):
            continue
        working = asyncio.create_task(run.go(going.start_s, lambda count: pipe.send(Counted(count))))
        stopping = asyncio.create_task(messages.get())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            run.stop()
        stopping.cancel()
        pipe.send(await working)
        pipe.send(run.records())
        gc.enable()


def _connection(address: Address, endpoint: Endpoint) -> AnyConnection:
    return GrpcConnection(address, endpoint.path) if address.is_grpc else Connection(address)


def _payload(address: Address, endpoint: Endpoint, request: OnlineRequest) -> bytes:
    body = endpoint.body(request)
    return body if address.is_grpc else address.post(endpoint.path, body)


class _Run:
    """One run of this process."""

    def __init__(self, plan: Prepare, endpoint: Endpoint, address: Address, connections: list[AnyConnection]) -> None:
        self._plan, self._endpoint = plan, endpoint
        self._connections = connections
        connections += [_connection(address, endpoint) for _ in range(plan.num_clients - len(connections))]
        self._waiting = deque((request, _payload(address, endpoint, request)) for request in plan.requests)
        self._unread: deque[tuple[OnlineRequest, Exchange]] = deque()
        self._records: dict[str, RequestRecord] = {}
        self._raw_bytes = self._num_ended = 0
        self._started_s: dict[AnyConnection, float] = {}
        self._end_s = 0.0

    async def prepare(self) -> None:
        """Opens the connections that are needed from the start; one that fails fails again when it is used."""
        is_open_loop = bool(self._waiting) and self._waiting[0][0].arrival_s is not None
        num_first = 1 if is_open_loop else min(self._plan.num_clients, len(self._waiting))
        opening = (connection.open() for connection in self._connections[:num_first])
        await asyncio.gather(*opening, return_exceptions=True)

    def stop(self) -> None:
        self._waiting.clear()

    async def go(self, start_s: float, on_count: Callable[[int], None]) -> Ended:
        """Sends all requests and waits for the last to end."""
        await _sleep_until(start_s)
        cpu_s = time.process_time()
        watching = asyncio.create_task(self._watch(on_count))
        if self._waiting and self._waiting[0][0].arrival_s is not None:
            await self._open_loop(start_s)
        else:
            await asyncio.gather(*map(self._closed_loop, self._connections[: self._plan.num_clients]))
        watching.cancel()
        end_s = max(self._end_s, start_s)
        busy_s = time.process_time() - cpu_s
        return Ended(end_s, busy_s / max(time.perf_counter() - start_s, 1e-9))

    async def _closed_loop(self, connection: AnyConnection) -> None:
        while self._waiting:
            request, payload = self._waiting.popleft()
            exchange = await self._send(connection, request, payload)
            if exchange.status in (429, 503) and exchange.retry_after_s:
                await asyncio.sleep(min(exchange.retry_after_s, MAX_RETRY_AFTER_S))

    async def _open_loop(self, start_s: float) -> None:
        idle = self._connections[: self._plan.num_clients][::-1]  # those that are open first
        is_free = asyncio.Semaphore(len(idle))
        sending: set[asyncio.Task[None]] = set()

        async def send(request: OnlineRequest, payload: bytes, due_s: float) -> None:
            connection = idle.pop()
            is_late = time.perf_counter() - due_s > TIMER_STEP_S
            await self._send(connection, request, payload, due_s if is_late else None)
            idle.append(connection)
            is_free.release()

        while self._waiting:
            due_s = start_s + (self._waiting[0][0].arrival_s or 0.0)
            await _sleep_until(due_s)
            await is_free.acquire()
            if self._waiting:  # not stopped meanwhile
                task = asyncio.create_task(send(*self._waiting.popleft(), due_s))
                sending.add(task)
                task.add_done_callback(sending.discard)
        await asyncio.gather(*sending)

    async def _send(
        self, connection: AnyConnection, request: OnlineRequest, payload: bytes, submitted_s: float | None = None
    ) -> Exchange:
        self._started_s[connection] = time.perf_counter()
        exchange = await connection.run(payload, submitted_s)
        del self._started_s[connection]
        self._end_s = max(self._end_s, exchange.ended_s)
        self._num_ended += 1
        self._unread.append((request, exchange))
        self._raw_bytes += sum(map(len, exchange.parts))
        while self._raw_bytes > MAX_RAW_BYTES:
            self._read_one()
        return exchange

    async def _watch(self, on_count: Callable[[int], None]) -> None:
        """Gives up on answers that take too long, and reports."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            on_count(self._num_ended)
            limit_s = time.perf_counter() - self._plan.timeout_s
            for connection in [each for each, since_s in self._started_s.items() if since_s < limit_s]:
                connection.fail(f"no whole answer within {self._plan.timeout_s:g} s")

    def records(self) -> Records:
        """Those of all requests that were sent, in the order of the plan."""
        while self._unread:
            self._read_one()
        requests = self._plan.requests
        return tuple(self._records[each.request_id] for each in requests if each.request_id in self._records)

    def _read_one(self) -> None:
        request, exchange = self._unread.popleft()
        self._raw_bytes -= sum(map(len, exchange.parts))
        self._records[request.request_id] = make_record(self._endpoint, request, exchange)


def make_record(endpoint: Endpoint, request: OnlineRequest, exchange: Exchange) -> RequestRecord:
    """What an answer comes to; an answer that is not what was asked for is an error with one reason."""
    if exchange.status not in (None, 200) and exchange.error is None:
        exchange.error = f"the server answered {status_text(exchange.status or 0)}"
        exchange.times_s, exchange.parts = [], []
    answer = endpoint.read(exchange.times_s, exchange.parts)
    times = token_times_s(answer.chunks, answer.num_tokens)
    error = exchange.error or answer.error
    is_exact = isinstance(endpoint, OpenAIEndpoint) and IGNORE_EOS in endpoint.optional
    if error is None and not times:
        error = "the answer has no tokens"
    elif error is None and is_exact and answer.num_tokens not in (None, request.num_tokens):
        error = "the answer has another number of tokens than was asked for"
    return RequestRecord(
        request_id=request.request_id,
        num_prompt_tokens=answer.num_prompt_tokens or request.num_prompt_tokens,
        submitted_s=exchange.submitted_s,
        token_times_s=times,
        finish_reason="error" if error is not None else answer.finish_reason or "length",
        error=error,
        num_cached_tokens=answer.num_cached_tokens,
    )


async def _sleep_until(due_s: float) -> None:
    while (delay_s := due_s - time.perf_counter()) > 0:  # a timer may fire early
        await asyncio.sleep(delay_s)
