"""What a service takes on, and that every request that it took ends and gives its place back."""

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from fake_engine import TEXT, TEXT_IDS, FakeEngineClient, make_service

from hasten.errors import (
    DrainingError,
    EngineUnavailableError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    RuntimeFailedError,
)
from hasten.request import SamplingParams
from hasten.serve.service import Service

FEW = SamplingParams(max_tokens=4)


async def text_of(service: Service, prompt: Any = "x", sampling: SamplingParams = FEW, **options: Any) -> str:
    text = ""
    async with aclosing(await service.open(prompt, sampling, **options)) as generation:
        async for pieces in generation:
            text += "".join(piece.text for piece in pieces)
    return text


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_text_comes_back_and_is_counted() -> None:
    async def check() -> None:
        service = make_service(FakeEngineClient())
        assert await text_of(service, [5, 6], SamplingParams(max_tokens=len(TEXT_IDS))) == TEXT
        assert service.idle.is_set()
        metrics = service.metrics
        assert metrics.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}
        assert sum(metrics.time_to_first_token_s.counts) == sum(metrics.e2e_latency_s.counts) == 1
        assert sum(metrics.inter_token_latency_s.counts) == len(TEXT_IDS) - 1
        assert (metrics.request_prompt_tokens.sum, metrics.request_generation_tokens.sum) == (2, len(TEXT_IDS))

    run(check())


def test_a_stop_string_ends_the_request_in_the_engine() -> None:
    async def check() -> None:
        client = FakeEngineClient()
        service = make_service(client)
        text = await text_of(service, sampling=SamplingParams(max_tokens=200, stop=("aloud",)))
        assert text == TEXT.partition("aloud")[0]
        assert len(client.aborted) == 1
        assert service.metrics.finished["stop"] == 1

    run(check())


def test_a_continuation_that_met_its_stop_string_is_silent_while_others_go_on() -> None:
    async def check() -> None:
        client = FakeEngineClient()
        service = make_service(client)
        sampling = SamplingParams(max_tokens=200, n=2, stop=("aloud",))
        ends = []
        async with aclosing(await service.open("x", sampling)) as generation:
            async for pieces in generation:
                ends += [piece.index for piece in pieces if piece.finish_reason is not None]
        assert sorted(ends) == [0, 1]
        assert len(client.aborted) == 1

    run(check())


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "empty"),
        ("", 4, "empty"),
        ([5] * 256, 4, "256 tokens"),
        ([5] * 250, 7, "lower max_tokens to 6"),
        ([5, 4096], 4, "between 0 and 4095"),
        ([-1], 4, "between 0 and 4095"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_the_engine_hears_of_it(
    prompt: Any, max_tokens: int, message: str
) -> None:
    async def check() -> None:
        client = FakeEngineClient()
        service = make_service(client)
        with pytest.raises(RequestError, match=message):
            await service.open(prompt, SamplingParams(max_tokens=max_tokens))
        assert not client.requests
        assert service.idle.is_set()

    run(check())


def test_the_queue_has_an_end_and_places_come_back() -> None:
    async def check() -> None:
        client = FakeEngineClient(max_num_seqs=2)
        service = make_service(client, max_queue=1)
        client.gate.clear()
        running = [asyncio.create_task(text_of(service)) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError) as caught:
            await service.open("x", FEW)
        assert caught.value.retry_after_s >= 1
        with pytest.raises(RequestError, match="at most 3"):
            await service.open("x", SamplingParams(n=4))
        client.gate.set()
        await asyncio.gather(*running)
        assert await text_of(service, sampling=SamplingParams(max_tokens=4, n=3))

    run(check())


def test_a_generation_that_was_never_read_gives_its_place_back() -> None:
    async def check() -> None:
        service = make_service(FakeEngineClient(max_num_seqs=1), max_queue=0)
        for _ in range(3):
            async with aclosing(await service.open("x", FEW)):
                assert not service.idle.is_set()
        assert service.idle.is_set()

    run(check())


@pytest.mark.parametrize("has_pieces", [True, False])
def test_a_request_that_takes_too_long_ends_in_the_engine(has_pieces: bool) -> None:
    async def check() -> None:
        client = FakeEngineClient(step_s=0.02)
        service = make_service(client, request_timeout_s=0.1)
        if not has_pieces:
            client.gate.clear()
        with pytest.raises(RequestTimeoutError):
            await text_of(service, sampling=SamplingParams(max_tokens=100))
        assert not client.running
        assert len(client.aborted) == 1
        current = asyncio.current_task()
        assert current is not None
        assert not current.cancelling()
        await asyncio.sleep(0)  # a cancellation that was left behind would end this

    run(check())


def test_a_reader_is_not_interrupted_by_the_deadline_while_it_does_something_else() -> None:
    async def check() -> None:
        service = make_service(FakeEngineClient(), request_timeout_s=0.05)
        async with aclosing(await service.open("x", SamplingParams(max_tokens=100))) as generation:
            with pytest.raises(RequestTimeoutError):
                async for _ in generation:
                    await asyncio.sleep(0.2)

    run(check())


def test_a_shorter_timeout_of_the_request_counts() -> None:
    async def check() -> None:
        client = FakeEngineClient(step_s=0.02)
        with pytest.raises(RequestTimeoutError):
            await text_of(make_service(client), sampling=SamplingParams(max_tokens=100), timeout_s=0.05)

    run(check())


@pytest.mark.parametrize(("dies", "error"), [(True, EngineUnavailableError), (False, RuntimeFailedError)])
def test_an_error_of_the_engine_ends_the_request(dies: bool, error: type[Exception]) -> None:
    async def check() -> None:
        service = make_service(FakeEngineClient(fails_after=2, dies=dies))
        with pytest.raises(error):
            await text_of(service)
        assert service.metrics.finished["error"] == 1
        assert service.idle.is_set()

    run(check())


def test_draining_lets_running_requests_end_and_takes_no_others() -> None:
    async def check() -> None:
        client = FakeEngineClient()
        service = make_service(client)
        client.gate.clear()
        running = asyncio.create_task(text_of(service, sampling=SamplingParams(max_tokens=len(TEXT_IDS))))
        await asyncio.sleep(0.01)
        service.drain()
        assert not service.is_ready
        with pytest.raises(DrainingError):
            await service.open("x", FEW)
        assert not service.idle.is_set()
        client.gate.set()
        assert await running == TEXT
        assert service.idle.is_set()

    run(check())
