"""The API process's end of the engine process: requests go in, tokens or vectors come out, in asyncio.

The client starts the process, and starts it again when it dies. Every request ends, whatever becomes
of the process: those that it held when it died end in errors, and are not run again, because one of
them may be what killed it.

A stream of tokens ends in an event with a finish_reason for each of its continuations. Its consumer is
woken once for each read of the socket, however many steps the read holds, and takes all its events
together.

Not here: text, queues and limits (`service`). Imports neither torch nor a web framework. A client
belongs to the event loop that called `start` and is not safe for use from other threads.
"""

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from hasten.errors import EngineUnavailableError, HastenError, RequestError, RuntimeFailedError
from hasten.hardware import count_cpus
from hasten.request import EmbeddingEvent, EmbeddingRequest, Request, TokenEvent
from hasten.runtimes.base import EngineFacts, EngineStats, OnLoading, RuntimeConfig
from hasten.runtimes.process import how_it_ended, worker_environment
from hasten.runtimes.protocol import Failed, Load, Loading, MessageSplitter, decoder, frame
from hasten.serve.messages import Abort, Embed, EmbeddingStep, FromEngine, Ready, Step, Submit, ToEngine

logger = logging.getLogger(__name__)

COMMAND = ("-P", "-m", "hasten.serve.engine_process")

MAX_RESTARTS = 5
RESTART_WINDOW_S = 600.0

FIRST_BACKOFF_S = 0.5
"""Doubles with each restart in the window: what killed the process, such as too little memory, may pass."""

QUIET_TURNS = 3
"""Of the event loop, in which no request follows: what it finds in a socket is a request two turns later."""

MAX_UNSENT_S = 0.005
"""How long a request that finds the engine idle may wait for others; taking one in takes 0.2 ms."""


class TokenStream:
    """The events of one request, as an async iterator over lists of them.

    It ends after the last continuation's finish_reason. Closing it before, or cancelling who waits for it,
    aborts the request.
    """

    def __init__(self, request: Request, connection: "_Connection") -> None:
        self._request_id = request.request_id
        self._running = set(range(request.sampling.n))
        self._connection = connection
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        if not self._events:
            if not self._running or self._is_closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                await self.aclose()
                raise
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events

    async def aclose(self) -> None:
        """Aborts the request if it has not ended; its blocks are free as soon as the engine reads that."""
        if self._running and not self._is_closed:
            self._connection.send(Abort(self._request_id))
        self._is_closed = True
        self._events = []

    @property
    def has_ended(self) -> bool:
        """Whether all continuations have ended in the engine."""
        return not self._running

    def put(self, event: TokenEvent) -> None:
        """Takes an event of this request."""
        if event.finish_reason is not None:
            self._running.discard(event.index)
        if self._is_closed:
            return
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: str) -> None:
        """Ends every continuation that has not ended."""
        time_s = time.perf_counter()
        for index in sorted(self._running):
            self.put(TokenEvent(self._request_id, None, time_s, index, "error", error=error))


class EngineClient:
    """Runs requests on a runtime in a process of its own.

    Args:
        runtime: name of a runtime that serves, see runtimes.base.SteppedRuntime.
        on_progress: told how far loading is, also when the process is started again.
        python: the interpreter that the process runs in, with torch and hasten.

    Attributes:
        facts: what is loaded; known once `start` has returned.
        failure: why the process will not be started again; None while it runs or will run.
    """

    facts: EngineFacts

    def __init__(
        self,
        runtime: str,
        config: RuntimeConfig,
        *,
        on_progress: OnLoading | None = None,
        python: str = sys.executable,
    ) -> None:
        self.failure: HastenError | None = None
        self._load = Load(runtime, replace(config, num_threads=config.num_threads or count_cpus()))
        self._on_progress = on_progress
        self._python = python
        self._connection: _Connection | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether a request can be submitted now."""
        return self._connection is not None and self._connection.is_ready

    @property
    def stats(self) -> EngineStats:
        """As of the last step; before the first one of a process all 0 but num_kv_blocks, which loading tells."""
        return EngineStats() if self._connection is None else self._connection.stats

    async def start(self) -> EngineFacts:
        """Starts the process and waits until it is ready.

        Raises:
            HastenError: what loading raised, as the class it was.
            RuntimeFailedError: any other exception in the process, or it died.
        """
        connection = await self._start_process()
        self._supervisor = asyncio.create_task(self._supervise(connection))
        return self.facts

    def stream(self, request: Request) -> TokenStream:
        """Submits a request.

        Raises:
            EngineUnavailableError: no process is ready.
            RequestError: a request with this id runs, or a value in it is beyond 64 bits or not Unicode.
        """
        return self._ready_connection().submit(request)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingEvent:
        """Submits a request to an encoder and waits for how it ends; cancelling who waits aborts it.

        Raises:
            EngineUnavailableError, RequestError: as `stream`.
        """
        return await self._ready_connection().embed(request)

    async def close(self) -> None:
        """Ends the process; requests that still run end in errors."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        if self._connection is not None:
            await self._connection.end()
            self._connection.fail_streams("the engine was shut down")
            self._connection = None
        self.failure = EngineUnavailableError("the engine was shut down")

    def _ready_connection(self) -> "_Connection":
        if self._connection is None or not self._connection.is_ready:
            raise EngineUnavailableError(str(self.failure or "the engine is starting: try again in a few seconds"))
        return self._connection

    async def _start_process(self) -> "_Connection":
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(ours.close)
            process = subprocess.Popen(
                [self._python, *COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print belongs in the log
                pass_fds=(theirs.fileno(),),
                env=worker_environment(self._load.config.num_threads or 1),
                process_group=0,  # the terminal's Ctrl-C goes to its foreground group, and this is none of it
            )
            on_failure.pop_all()
        connection = self._connection = _Connection(process, self._on_progress)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=ours)
            self.facts = await connection.load(self._load)
        except BaseException:
            await connection.end()
            self._connection = None
            raise
        return connection

    async def _supervise(self, connection: "_Connection") -> None:
        """Starts the process again whenever it has died, unless it does so too often."""
        deaths_s: deque[float] = deque()
        while True:
            await connection.lost.wait()
            reason = f"the engine process {how_it_ended(await connection.end())}"
            connection.fail_streams(f"{reason}; the request was not run again")
            self._connection = None
            while self._connection is None:
                deaths_s.append(time.monotonic())
                while deaths_s[0] < deaths_s[-1] - RESTART_WINDOW_S:
                    deaths_s.popleft()
                if len(deaths_s) > MAX_RESTARTS:
                    self.failure = EngineUnavailableError(
                        f"{reason}; it is not started again, because that was the {len(deaths_s)}th time in "
                        f"{RESTART_WINDOW_S:.0f} s: see the log and start the server again"
                    )
                    logger.error("%s", self.failure)
                    return
                backoff_s = FIRST_BACKOFF_S * 2 ** (len(deaths_s) - 1)
                logger.error("%s; it is started again in %.1f s", reason, backoff_s)
                await asyncio.sleep(backoff_s)
                try:
                    connection = await self._start_process()
                except (HastenError, OSError) as error:
                    reason = str(error)
            logger.warning("the engine process is ready again")


class _Connection(asyncio.Protocol):
    """One life of the engine process: its socket, and who waits for the requests that it holds.

    Who waits for a request stays until the engine has ended it, also after it was closed: an id that is
    used again before would get the events of the first.
    """

    def __init__(self, process: subprocess.Popen[bytes], on_progress: OnLoading | None) -> None:
        self.stats = EngineStats()
        self.is_ready = False
        self.lost = asyncio.Event()
        self._process = process
        self._on_progress = on_progress
        self._loaded: asyncio.Future[Ready | Failed | None] = asyncio.get_running_loop().create_future()
        self._splitter = MessageSplitter(decoder(FromEngine))
        self._streams: dict[str, TokenStream] = {}
        self._embeddings: dict[str, asyncio.Future[EmbeddingEvent]] = {}
        self._transport: asyncio.WriteTransport | None = None
        self._unsent: list[bytes] = []
        self._unsent_since_s = 0.0

    async def load(self, load: Load) -> EngineFacts:
        """Sends what to load and waits until that is done."""
        self.send(load)
        reply = await self._loaded
        if reply is None:
            how = how_it_ended(await self.end())
            raise RuntimeFailedError(f"the {load.runtime} runtime's process {how} while it loaded: see its log above")
        if isinstance(reply, Failed):
            raise reply.exception(load.runtime)
        self.stats = EngineStats(num_kv_blocks=reply.facts.num_kv_blocks)
        self.is_ready = True
        return reply.facts

    def submit(self, request: Request) -> TokenStream:
        """Sends a request and gives the stream of its events."""
        self._send_request(Submit(request))
        stream = self._streams[request.request_id] = TokenStream(request, self)
        return stream

    async def embed(self, request: EmbeddingRequest) -> EmbeddingEvent:
        """Sends a request and waits for its end."""
        self._send_request(Embed(request))
        ended = self._embeddings[request.request_id] = asyncio.get_running_loop().create_future()
        try:
            return await ended
        except asyncio.CancelledError:
            self.send(Abort(request.request_id))
            raise

    def _send_request(self, command: Submit | Embed) -> None:
        request_id = command.request.request_id
        if request_id in self._streams or request_id in self._embeddings:
            raise RequestError(f"request {request_id}: a request with this id is running; give each its own id")
        try:
            self.send(command)
        except (OverflowError, UnicodeError) as error:
            raise RequestError(f"request {request_id} cannot be sent to the engine: {error}") from error

    def send(self, command: ToEngine) -> None:
        """Queues a command for the process; for a dead one it does nothing.

        Requests that find the engine idle and arrive together are written together: it would begin with the first
        of them, and the others would wait for that step.
        """
        data = frame(command)
        if self._unsent:
            self._unsent.append(data)
            if self._has_waited:
                self._flush()
        elif self._streams or self._embeddings:
            self._write(data)
        else:
            self._unsent.append(data)
            self._unsent_since_s = time.perf_counter()
            self._collect(num_before=0)

    @property
    def _has_waited(self) -> bool:
        return time.perf_counter() > self._unsent_since_s + MAX_UNSENT_S

    def _collect(self, num_before: int, num_quiet_turns: int = 0) -> None:
        """Writes what is unsent once some turns of the event loop have added nothing to it."""
        num_unsent = len(self._unsent)
        num_quiet_turns = num_quiet_turns + 1 if num_unsent == num_before else 0
        if num_quiet_turns == QUIET_TURNS or self._has_waited:
            self._flush()
        else:
            asyncio.get_running_loop().call_soon(self._collect, num_unsent, num_quiet_turns)

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self.lost.is_set():
            self._transport.write(data)

    def fail_streams(self, error: str) -> None:
        """Ends what the process will not end any more."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        for request_id in [*self._embeddings]:
            self._end_embedding(EmbeddingEvent(request_id, b"", time.perf_counter(), error=error))

    async def end(self) -> int:
        """Kills the process if it still lives; returns its return code."""
        if self._transport is not None:
            self._transport.abort()
        self._process.kill()
        return await asyncio.to_thread(self._process.wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        for message in self._splitter.feed(data):
            if isinstance(message, Step):
                self._take(message)
            elif isinstance(message, EmbeddingStep):
                self.stats = message.stats
                for event in message.events:
                    self._end_embedding(event)
            elif isinstance(message, Loading):
                if self._on_progress is not None:
                    self._on_progress(message.part, message.done, message.total)
            elif not self._loaded.done():
                self._loaded.set_result(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_ready = False
        self.lost.set()
        if not self._loaded.done():
            self._loaded.set_result(None)

    def _end_embedding(self, event: EmbeddingEvent) -> None:
        waiting = self._embeddings.pop(event.request_id)
        if not waiting.done():  # else who waited was cancelled
            waiting.set_result(event)

    def _take(self, step: Step) -> None:
        self.stats = step.stats
        streams = self._streams
        for event in step.events:
            stream = streams[event.request_id]
            stream.put(event)
            if event.finish_reason is not None and stream.has_ended:
                del streams[event.request_id]
