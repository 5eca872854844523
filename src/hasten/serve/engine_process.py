"""The engine process: loads a runtime and steps it, for the API process at the other end of a socket.

Run as `python -m hasten.serve.engine_process FD`. The main thread reads commands between steps, steps and sends;
one thread sends what the socket does not take at once, so that a slow API process delays no step, and one waits for
the socket to be closed: that, also by a parent that died, ends the process at once, whatever it is doing. SIGINT and
SIGTERM are ignored, because the parent decides what they mean.

Every submitted request ends in an event that says how, unless the process dies first; then the
client makes it (`engine_client`).
"""

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from hasten.errors import HastenError, RequestError
from hasten.runtimes.base import EngineStats, InFlightRuntime, SteppedRuntime
from hasten.runtimes.protocol import Failed, Load, LoadingReporter, MessageSplitter, decoder, frame
from hasten.runtimes.registry import serving_runtime
from hasten.serve.messages import Abort, Embed, EmbeddingStep, Ready, Step, Submit, ToEngine

MAX_UNSENT_EVENTS = 1 << 18
"""Events that may wait to be sent while others are on their way, about 100 MB in all. That is nine seconds of a
GPU's 28,000 tokens/s: who does not read for so long is stuck, and until it reads again steps wait as well."""

READ_BYTES = 1 << 20

MAX_FAILED_STEPS = 3
"""Steps that may fail one after the other: a device that is lost fails in all of them, and needs a new process."""


class CommandReader:
    """Reads commands in the thread that steps: another one would have to wake it for a request that finds it idle."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._splitter = MessageSplitter(decoder(ToEngine))

    def read(self, *, waits: bool) -> list[ToEngine]:
        """What came since the last call; none, or waits for at least one.

        Raises:
            ConnectionError: the other end was closed.
        """
        commands: list[ToEngine] = []
        while True:
            try:
                data = self._channel.recv(READ_BYTES, 0 if waits else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return commands
            if not data:
                raise ConnectionError("the API process has closed its end")
            commands += self._splitter.feed(data)
            if commands or not waits:
                return commands


class StepSender:
    """Sends the results of steps at once; what the socket does not take is sent from another thread.

    What comes while that thread sends goes together in the next message.

    Args:
        message: the kind that carries the runtime's events.
    """

    def __init__(self, channel: socket.socket, message: type[Step] | type[EmbeddingStep]) -> None:
        self._channel = channel
        self._message = message
        self._events: list[Any] = []
        self._stats: EngineStats | None = None
        self._rest = b""  # of a message; while there is one, only the thread sends
        self._changed = threading.Condition()

    def put(self, events: Sequence[Any], stats: EngineStats) -> None:
        """Sends, or keeps for the thread; waits while more than MAX_UNSENT_EVENTS are kept."""
        with self._changed:
            while len(self._events) > MAX_UNSENT_EVENTS:
                self._changed.wait()
            self._events += events
            self._stats = stats
            if self._rest:
                return
            self._rest = self._next_message(stats)
            with contextlib.suppress(BlockingIOError):
                self._rest = self._rest[self._channel.send(self._rest, socket.MSG_DONTWAIT) :]
            if self._rest:
                self._changed.notify_all()

    def run(self) -> None:
        """Sends what the socket did not take, for ever, in the thread that calls it."""
        while True:
            with self._changed:
                while not self._rest:
                    self._changed.wait()
            self._channel.sendall(self._rest)
            with self._changed:
                self._rest = b"" if self._stats is None else self._next_message(self._stats)
                self._changed.notify_all()

    def _next_message(self, stats: EngineStats) -> bytes:
        events, self._events, self._stats = self._events, [], None
        return frame(self._message(tuple(events), stats))


class EngineLoop:
    """Submits, aborts and steps in the thread that calls `run`; requests that were sent together start in one step."""

    def __init__(self, runtime: SteppedRuntime, commands: CommandReader, sender: StepSender) -> None:
        self._runtime = runtime
        self._commands = commands
        self._sender = sender
        self._num_failed_steps = 0

    def run(self) -> None:
        """Runs until steps fail again and again; raises what the last of them raised."""
        while True:
            events: list[Any] = []
            for command in self._commands.read(waits=not self._runtime.has_unfinished):
                events += self._execute(command)
            if self._runtime.has_unfinished:
                events += self._step()
            self._sender.put(events, self._runtime.stats())

    def _execute(self, command: ToEngine) -> list[Any]:
        """Obeys; returns the ends of a request that was refused."""
        if isinstance(command, Submit | Embed):
            return self._submit(command.request)
        if isinstance(command, Abort):
            self._runtime.cancel(command.request_id)
        return []

    def _submit(self, request: Any) -> list[Any]:
        try:
            self._runtime.submit(request)
        except RequestError as error:
            return self._runtime.refuse(request, str(error))
        except Exception as error:
            traceback.print_exc()
            reason = f"the engine cannot take this request: {type(error).__name__}: {error}"
            return self._runtime.refuse(request, reason)
        return []

    def _step(self) -> list[Any]:
        try:
            events = self._runtime.step()
        except Exception:
            traceback.print_exc()
            self._num_failed_steps += 1
            if self._num_failed_steps == MAX_FAILED_STEPS:
                raise
            return []
        if any(self._runtime.has_result(event) for event in events):
            self._num_failed_steps = 0
        return events


def serve(channel: socket.socket) -> None:
    """Loads the runtime that the first command names and runs it until the channel is closed: a ConnectionError."""
    _start_thread(_wait_until_closed, channel)
    commands = CommandReader(channel)
    [load] = commands.read(waits=True)
    assert isinstance(load, Load), "the client loads first, and sends nothing until that is done"
    try:
        found = serving_runtime(load.runtime, load.config.scheme)
        runtime = found(load.config, LoadingReporter(lambda loading: channel.sendall(frame(loading))))
    except Exception as error:
        if not isinstance(error, HastenError):
            traceback.print_exc()
        channel.sendall(frame(Failed.of(error)))
        return
    runtime.expect_grammars()  # the first request with one should not wait for the tokenizer
    gc.freeze()  # what is there now stays: walking all that torch has made would hold up a step
    channel.sendall(frame(Ready(runtime.facts)))
    sender = StepSender(channel, Step if isinstance(runtime, InFlightRuntime) else EmbeddingStep)
    _start_thread(sender.run)
    EngineLoop(runtime, commands, sender).run()


def _wait_until_closed(channel: socket.socket) -> None:
    poll = select.poll()
    poll.register(channel, 0)  # nothing but what is always told, that the other end is closed
    poll.poll()


def _start_thread(target: Callable[..., None], *args: object) -> None:
    """Runs a function beside the steps, and ends the process when it returns or raises: then nobody listens."""

    def run() -> None:
        code = 0
        try:
            target(*args)
        except Exception as error:
            if not isinstance(error, ConnectionError):  # which says that the parent has died
                traceback.print_exc()
                code = 1
        os._exit(code)

    threading.Thread(target=run, daemon=True).start()


def main() -> None:
    """Takes over the socket, then serves."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)  # or a child of this process could keep it open
    with contextlib.suppress(ConnectionError):  # the parent has died
        serve(channel)


if __name__ == "__main__":
    main()
