"""The engine process and its client: nothing is lost, and whatever dies, every request ends."""

import asyncio
import gc
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import scripted_engine

from hasten.errors import EngineUnavailableError, ModelNotFoundError, RequestError, RuntimeFailedError, UsageError
from hasten.request import Request, SamplingParams, TokenEvent
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.native import NativeRuntime
from hasten.serve import engine_client
from hasten.serve.engine_client import EngineClient

SHIPPED_MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"
ENDLESS = 10**9

# starts a client whose engine is in the middle of a step of 30 s, prints the engine's pid, and stays
PARENT = """
import asyncio, sys
from pathlib import Path
from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.serve import engine_client

engine_client.COMMAND = ("-P", sys.argv[1])

async def main():
    client = engine_client.EngineClient("scripted", RuntimeConfig(Path("none"), "fp32"))
    await client.start()
    stream = client.stream(Request("r", (int(sys.argv[2]),), SamplingParams(max_tokens=5)))
    await asyncio.sleep(0.5)
    print(client._connection._process.pid, flush=True)
    await anext(stream)

asyncio.run(main())
"""


def request(request_id: str, prompt: Iterable[int] = (1, 2), max_tokens: int = 10, **sampling: object) -> Request:
    return Request(request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling))


async def read(client: EngineClient, each: Request) -> list[TokenEvent]:
    async with aclosing(client.stream(each)) as stream:
        return [event async for events in stream for event in events]


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def pid_of(client: EngineClient) -> int:
    assert client._connection is not None
    return client._connection._process.pid


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def tokens_in(events: Iterable[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "FIRST_BACKOFF_S", 0.02)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., EngineClient]:
    monkeypatch.setattr(engine_client, "COMMAND", ("-P", scripted_engine.__file__))

    def make(runtime: str = "scripted", max_num_seqs: int = 8) -> EngineClient:
        config = RuntimeConfig(tmp_path, "fp32", max_num_seqs, max_model_tokens=ENDLESS, num_threads=1)
        return EngineClient(runtime, config)

    return make


@asynccontextmanager
async def started(client: EngineClient) -> AsyncIterator[EngineClient]:
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def run(test: Awaitable[None], loop: str = "asyncio") -> None:
    async def main() -> None:
        async with asyncio.timeout(200):
            await test

    with asyncio.Runner(loop_factory=import_module(loop).new_event_loop) as runner:
        runner.run(main())


@pytest.fixture
def long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a busy machine takes for a request is not to split those that belong together."""
    monkeypatch.setattr(engine_client, "MAX_UNSENT_S", 5.0)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_requests_that_find_the_engine_idle_together_start_in_one_step(
    scripted: Callable[..., EngineClient], loop: str, long_wait: None
) -> None:
    async def test() -> None:
        async with started(scripted()) as client:
            for wave in range(10):
                await asyncio.gather(*(read(client, request(f"{wave}-{i}", (3,), 4)) for i in range(8)))
            assert (client.stats.num_steps, client.stats.num_generated_tokens) == (10 * 4, 10 * 8 * 4)

    run(test(), loop)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_requests_that_arrive_while_others_are_taken_in_start_with_them(
    scripted: Callable[..., EngineClient], loop: str, long_wait: None
) -> None:
    """Each comes by a socket of its own, the next one while it is taken in."""

    async def send_wave(client: EngineClient, wave: int) -> None:
        arrivals = [socket.socketpair() for _ in range(8)]
        taken: list[asyncio.Task[object]] = []

        async def take(index: int) -> None:
            if index < 7:
                arrivals[index + 1][1].send(b"x")
            await read(client, request(f"{wave}-{index}", (3,), 4))

        def arrive(index: int) -> None:
            asyncio.get_running_loop().remove_reader(arrivals[index][0])
            taken.append(asyncio.create_task(take(index)))

        for index, (theirs, _) in enumerate(arrivals):
            asyncio.get_running_loop().add_reader(theirs, arrive, index)
        arrivals[0][1].send(b"x")
        while len(taken) < 8:
            await asyncio.sleep(0.001)
        await asyncio.gather(*taken)
        for each in itertools.chain.from_iterable(arrivals):
            each.close()

    async def test() -> None:
        async with started(scripted()) as client:
            for wave in range(10):
                await send_wave(client, wave)
            assert (client.stats.num_steps, client.stats.num_generated_tokens) == (10 * 4, 10 * 8 * 4)

    run(test(), loop)


def test_the_first_of_many_requests_does_not_wait_for_all(scripted: Callable[..., EngineClient]) -> None:
    async def test() -> None:
        async with started(scripted(max_num_seqs=64)) as client:
            streams = []
            for i in range(50):
                streams.append(client.stream(request(str(i), max_tokens=1)))
                time.sleep(0.002)  # as long as taking one in keeps the event loop
            last_submitted_s = time.perf_counter()
            events = [await anext(stream) for stream in streams]
            assert events[0][0].time_s < last_submitted_s - 0.05
            assert client.stats.num_generated_tokens == 50

    run(test())


def test_facts_events_and_stats(scripted: Callable[..., EngineClient], tmp_path: Path) -> None:
    async def test() -> None:
        client = scripted()
        with pytest.raises(EngineUnavailableError, match="starting"):
            client.stream(request("early"))
        async with started(client):
            assert (client.facts.model, client.facts.runtime) == (tmp_path.name, "scripted")
            events = await read(client, request("r", (3,), 4, n=2))
            assert [event.index for event in events] == [0, 1] * 4
            assert tokens_in(events)[::2] == [100, 35, 68, 67]
            assert [event.finish_reason for event in events] == [None] * 6 + ["length"] * 2
            assert (client.stats.num_generated_tokens, client.stats.num_steps) == (8, 4)
            assert (client.stats.num_running, client.stats.num_prompt_tokens) == (0, 1)
        with pytest.raises(EngineUnavailableError, match="shut down"):
            client.stream(request("late"))

    run(test())


def test_closing_a_stream_aborts_and_others_go_on(scripted: Callable[..., EngineClient]) -> None:
    async def test() -> None:
        async with started(scripted()) as client:
            other = asyncio.create_task(read(client, request("other", (scripted_engine.SLOW,), 50)))
            stream = client.stream(request("r", max_tokens=ENDLESS))
            await anext(stream)
            await until(lambda: client.stats.num_running == 2)
            with pytest.raises(RequestError, match="a request with this id is running"):
                client.stream(request("r"))
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await until(lambda: client.stats.num_running == 1)
            assert len(await read(client, request("r", max_tokens=4))) == 4  # the id is free again, nothing is left
            waiting = asyncio.create_task(read(client, request("cancelled", max_tokens=ENDLESS)))
            await until(lambda: client.stats.num_running == 2)
            waiting.cancel()
            await until(lambda: client.stats.num_running == 1)
            assert len(await other) == 50
            assert client.is_ready

    run(test())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_killed_process_ends_its_requests_in_errors_and_comes_back(
    scripted: Callable[..., EngineClient], loop: str
) -> None:
    async def test() -> None:
        async with started(scripted()) as client:
            num_files, pids = num_open_files(), []
            for _ in range(3):
                streams = [asyncio.create_task(read(client, request(str(i), max_tokens=ENDLESS, n=2))) for i in (1, 2)]
                await until(lambda: client.stats.num_running == 4)
                pids.append(pid_of(client))
                os.kill(pids[-1], signal.SIGKILL)
                for events in await asyncio.gather(*streams):
                    ends = [event for event in events if event.finish_reason is not None]
                    assert [(end.finish_reason, end.index) for end in ends] == [("error", 0), ("error", 1)]
                    assert events[-2:] == ends
                    assert "killed by SIGKILL" in (ends[0].error or "")
                with pytest.raises(EngineUnavailableError, match="try again"):
                    client.stream(request("r"))
                await until(lambda: client.is_ready)
                assert client.stats.num_generated_tokens == 0, "nothing was submitted again"
                assert len(await read(client, request("r"))) == 10
            assert all(not psutil.pid_exists(pid) for pid in pids)
            gc.collect()
            assert num_open_files() == num_files
            assert sum(type(each) is engine_client.TokenStream for each in gc.get_objects()) == 0

    run(test(), loop)  # loads the loop
    num_files = num_open_files()
    run(test(), loop)
    assert num_open_files() == num_files


def test_a_request_that_kills_the_process_does_so_once(scripted: Callable[..., EngineClient]) -> None:
    async def test() -> None:
        async with started(scripted()) as client:
            events = await read(client, request("r", (scripted_engine.KILL,)))
            assert [event.finish_reason for event in events] == ["error"]
            await until(lambda: client.is_ready)
            assert len(await read(client, request("r"))) == 10

    run(test())


def test_a_process_that_dies_again_and_again_is_given_up(
    scripted: Callable[..., EngineClient], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with started(scripted()) as client:
            (tmp_path / "die-while-loading").touch()
            os.kill(pid_of(client), signal.SIGKILL)
            await until(lambda: client.failure is not None, 60)
            assert not client.is_ready
            with pytest.raises(EngineUnavailableError, match=r"SIGKILL.* while it loaded.*the 6th time in 600 s"):
                client.stream(request("r"))
            assert caplog.text.count("it is started again in") == 5

    run(test())


def test_closing_while_the_process_is_started_again_leaves_nothing(scripted: Callable[..., EngineClient]) -> None:
    async def test() -> None:
        for wait_s in (0.0, 0.01, 0.1):  # before it has died, in the pause, while it loads
            async with started(scripted()) as client:
                os.kill(pid_of(client), signal.SIGKILL)
                await asyncio.sleep(wait_s)

    num_files = num_open_files()
    run(test())
    assert num_open_files() == num_files


def test_a_load_that_fails_is_the_error_that_it_was(scripted: Callable[..., EngineClient], tmp_path: Path) -> None:
    async def test() -> None:
        num_files = num_open_files()
        with pytest.raises(UsageError, match=r"the transformers runtime cannot serve: .* use native"):
            await EngineClient("transformers", RuntimeConfig(tmp_path, "fp32")).start()
        with pytest.raises(UsageError, match="unknown runtime"):
            await scripted("scriptedd").start()
        with pytest.raises(ModelNotFoundError, match="no folder"):
            await EngineClient("native", RuntimeConfig(tmp_path / "none", "fp32")).start()
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(RuntimeFailedError, match="JSONDecodeError"):
            await scripted().start()
        (tmp_path / "die-while-loading").touch()
        with pytest.raises(RuntimeFailedError, match=r"was killed by SIGKILL .* while it loaded"):
            await scripted().start()
        loading = asyncio.create_task(EngineClient("native", RuntimeConfig(SHIPPED_MODEL, "fp32")).start())
        await asyncio.sleep(0.3)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await asyncio.sleep(0)  # the last socket is closed by a callback
        assert num_open_files() == num_files

    run(test())


@pytest.mark.parametrize("busy", [scripted_engine.SPIN, scripted_engine.SLEEP])
def test_the_process_ends_with_its_parent_even_in_the_middle_of_a_step(busy: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, scripted_engine.__file__, str(busy)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not is_gone(pid)
    os.kill(pid, signal.SIGTERM)  # what a service manager sends to all processes is the parent's business
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    end_s = time.monotonic() + 2
    while not is_gone(pid):
        assert time.monotonic() < end_s, "the engine process outlived its parent"
        time.sleep(0.01)
    parent.stdout.close()


def test_steps_that_raise_end_their_requests_and_then_the_process(scripted: Callable[..., EngineClient]) -> None:
    async def test() -> None:
        async with started(scripted()) as client:
            pid = pid_of(client)
            for _ in range(4):  # alternating with steps that work
                (event,) = await read(client, request("bad", (scripted_engine.RAISE_ONCE,)))
                assert (event.finish_reason, event.error) == ("error", "scripted")
                assert len(await read(client, request("good"))) == 10
            assert pid_of(client) == pid
            for _ in range(3):  # nothing works in between
                (event,) = await read(client, request("bad", (scripted_engine.RAISE_ONCE,)))
                assert event.finish_reason == "error"
            await until(lambda: client.is_ready and pid_of(client) != pid)
            assert len(await read(client, request("good"))) == 10

    run(test())


def test_a_request_that_cannot_be_taken_ends_alone(scripted: Callable[..., EngineClient]) -> None:
    async def test() -> None:
        async with started(scripted()) as client:
            other = asyncio.create_task(read(client, request("other", max_tokens=500)))
            refused = await read(client, request("r", (10**6,), n=2))
            assert [(event.finish_reason, event.index) for event in refused] == [("error", 0), ("error", 1)]
            assert "outside the vocabulary" in (refused[0].error or "")
            (event,) = await read(client, request("r", (scripted_engine.REFUSE,)))
            assert event.error == "the engine cannot take this request: ValueError: scripted"
            for sampling in ({"seed": 2**70}, {"stop": ("\ud800",)}):
                with pytest.raises(RequestError, match="cannot be sent"):
                    client.stream(request("r", **sampling))
            assert len(await read(client, request("r"))) == 10
            assert len(await other) == 500

    run(test())


def test_a_client_that_does_not_read_bounds_the_engine_s_memory_and_loses_nothing(
    scripted: Callable[..., EngineClient],
) -> None:
    async def test() -> None:
        async with started(scripted("null")) as client:
            engine = psutil.Process(pid_of(client))
            tasks = [asyncio.create_task(read(client, request(str(i), max_tokens=2000))) for i in range(256)]
            await asyncio.sleep(0.05)
            time.sleep(2)  # the whole API process is stuck
            end_s = time.monotonic() + 30
            cpu_s = 0.0
            while engine.cpu_times().user - cpu_s > 0.1:
                assert time.monotonic() < end_s, "it does not wait"
                cpu_s = engine.cpu_times().user
                time.sleep(0.5)
            assert engine.memory_info().rss < 300 << 20
            for events in await asyncio.gather(*tasks):
                assert tokens_in(events) == list(range(2000, 0, -1))

    run(test())


def test_the_way_to_a_stream_s_consumer_costs_little(scripted: Callable[..., EngineClient]) -> None:
    async def test() -> None:
        async with started(scripted("null")) as client:
            costs_s = [await cost_of_a_token(client, turn) for turn in range(5)]
            # 200,000 tokens/s would fill a core; the quickest counts, since what else the machine does only adds
            assert min(costs_s) < 5e-6, costs_s

    async def cost_of_a_token(client: EngineClient, turn: int) -> float:
        """CPU time of this process, socket and wake-ups included."""
        start_s = time.process_time()
        requests = [request(f"{turn}-{i}", max_tokens=400) for i in range(256)]
        assert await asyncio.gather(*(count(client, each) for each in requests)) == [400] * 256
        return (time.process_time() - start_s) / (400 * 256)

    async def count(client: EngineClient, each: Request) -> int:
        return sum([len(events) async for events in client.stream(each)])

    run(test())


def test_random_requests_and_aborts_give_the_tokens_of_generate() -> None:
    """600 requests of the shipped model over the real socket."""
    rng = random.Random(4)
    config = RuntimeConfig(SHIPPED_MODEL, "fp32", max_num_seqs=16, max_model_tokens=64, num_threads=1)
    prompts = [tuple(rng.randrange(4, 4000) for _ in range(rng.randint(1, 12))) for _ in range(60)]
    runtime = NativeRuntime(config)
    expected = {prompt: tokens_in(runtime.generate([request("r", prompt, 24, ignore_eos=True)])) for prompt in prompts}
    runtime.close()

    async def one(client: EngineClient, index: int) -> int:
        prompt, max_tokens, n = rng.choice(prompts), rng.randint(1, 24), rng.choice((1, 1, 1, 2))
        abort_after = rng.randint(0, max_tokens) if rng.random() < 0.3 else ENDLESS
        each = request(str(index), prompt, max_tokens, n=n, ignore_eos=True)
        events: list[TokenEvent] = []
        stream = client.stream(each)
        if abort_after:
            async for some in stream:
                events += some
                if len(events) >= abort_after:
                    break
        await stream.aclose()
        for number in range(n):
            own = [event for event in events if event.index == number]
            assert tokens_in(own) == expected[prompt][: len(own)]
            if abort_after == ENDLESS:
                assert [event.finish_reason for event in own] == [None] * (max_tokens - 1) + ["length"]
        return len(events)

    async def test() -> None:
        places = asyncio.Semaphore(40)

        async def queued(client: EngineClient, index: int) -> int:
            async with places:
                return await one(client, index)

        async with started(EngineClient("native", config)) as client:
            assert client.stats.num_kv_blocks == client.facts.num_kv_blocks > 0
            kept, aborted = (client.stream(request(name, prompts[0], 50, ignore_eos=True)) for name in "ab")
            await anext(aborted)
            both = client.stats.num_used_kv_blocks
            await aborted.aclose()
            await until(lambda: 0 < client.stats.num_used_kv_blocks < both)
            await kept.aclose()
            counts = await asyncio.gather(*(queued(client, index) for index in range(600)))
            await until(lambda: client.stats.num_running + client.stats.num_waiting == 0)
            assert client.stats.num_used_kv_blocks == 0
            assert client.stats.num_generated_tokens >= sum(counts)

    run(test())
