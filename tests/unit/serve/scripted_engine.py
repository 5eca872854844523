"""An engine process whose runtimes need no model: one does what prompts tell it, one is only fast.

Run in place of hasten.serve.engine_process, it has both in the registry.
"""

import os
import signal
import time
from typing import ClassVar

from hasten.request import Request, TokenEvent
from hasten.runtimes.base import EngineStats, RuntimeConfig
from hasten.runtimes.fake import FakeRuntime
from hasten.runtimes.registry import RUNTIMES
from hasten.serve.engine_process import main

KILL, RAISE_ONCE, SPIN, SLEEP, SLOW, REFUSE = range(100, 106)
"""First token of a prompt: what happens when its request is submitted or in each step that it is in."""

SPIN_S = 30.0


class ScriptedRuntime(FakeRuntime):
    """A FakeRuntime that fails as it is told."""

    name: ClassVar[str] = "scripted"

    def __init__(self, config: RuntimeConfig, on_loading: object = None) -> None:
        death = config.model / "die-while-loading"
        if death.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(config)

    def submit(self, request: Request) -> None:
        if request.prompt_token_ids[0] == REFUSE:
            raise ValueError("scripted")
        super().submit(request)

    def step(self) -> list[TokenEvent]:
        told = {each.request.prompt_token_ids[0]: each.request.request_id for each in self._continuations}
        if KILL in told:
            os.kill(os.getpid(), signal.SIGKILL)
        if SPIN in told:
            end_s = time.monotonic() + SPIN_S
            while time.monotonic() < end_s:
                pass
        if SLEEP in told:
            time.sleep(SPIN_S)
        if SLOW in told:
            time.sleep(0.05)
        if RAISE_ONCE in told:
            self._cancelled += [
                TokenEvent(each.request.request_id, None, time.perf_counter(), each.index, "error", error="scripted")
                for each in self._continuations
            ]
            self._continuations.clear()
            raise ValueError("scripted")
        return super().step()


class NullRuntime(FakeRuntime):
    """Makes up tokens as fast as Python can, to measure the way from here to a stream's consumer."""

    name: ClassVar[str] = "null"

    def __init__(self, config: RuntimeConfig, on_loading: object = None) -> None:
        super().__init__(config)
        self._left: dict[str, int] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._left)

    def submit(self, request: Request) -> None:
        self._left[request.request_id] = request.sampling.max_tokens

    def step(self) -> list[TokenEvent]:
        time_s = time.perf_counter()
        events = []
        for request_id, left in self._left.items():
            events.append(TokenEvent(request_id, left, time_s, 0, None if left > 1 else "length"))
        self._left = {request_id: left - 1 for request_id, left in self._left.items() if left > 1}
        return events

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._left))


if __name__ == "__main__":
    RUNTIMES.update(scripted="__main__:ScriptedRuntime", null="__main__:NullRuntime")
    main()
