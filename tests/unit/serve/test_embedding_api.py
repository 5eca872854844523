"""/v1/embeddings over a made-up engine: limits, errors and metrics; the real one is in tests/serving."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fake_encoder import SIZE, FakeEncoderClient, encoder_service
from fake_engine import TOKENIZER, FakeEngineClient, make_service

from hasten.serve.app import HttpLimits, make_app, make_embedding_app
from hasten.serve.service import Service


def served(service: Service, ask: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        app = make_embedding_app(service, HttpLimits())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await ask(http)

    return asyncio.run(run())


def post(body: dict[str, Any], client: FakeEncoderClient | None = None, **limits: Any) -> httpx.Response:
    service = encoder_service(client or FakeEncoderClient(), **limits)
    return served(service, lambda http: http.post("/v1/embeddings", json=body))


def test_an_answer_is_as_openai_has_it() -> None:
    answer = post({"input": [[7, 8], [9]]}).json()
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, 7.0, 0.0, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 9.0, 0.0, 0.0]},
        ],
        "model": "tiny",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


def test_texts_that_take_long_to_tokenize_are_no_different() -> None:
    texts = ["a", "The model reads " * 400]
    client = FakeEncoderClient(max_model_tokens=4096)
    data = post({"input": texts}, client).json()["data"]
    assert [each["embedding"][0] for each in data] == [len(TOKENIZER.encode(text)) for text in texts]


@pytest.mark.parametrize(
    ("sizes", "dimensions", "reason"),
    [
        (None, 3, "it must be 4 or absent"),
        ((2,), 3, "it must be one of 2"),
        ((), 5, "it may be at most 4"),
        ((), 0, "greater than or equal to 1"),
    ],
)
def test_a_size_that_the_model_has_not_is_refused(sizes: tuple[int, ...] | None, dimensions: int, reason: str) -> None:
    answer = post({"input": [3], "dimensions": dimensions}, FakeEncoderClient(matryoshka_sizes=sizes))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "dimensions"
    assert reason in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("is_normalized", "expected"), [(False, [3.0, 4.0]), (True, [pytest.approx(0.6), pytest.approx(0.8)])]
)
def test_a_vector_that_is_cut_is_normalized_again_where_the_models_are(is_normalized: bool, expected: Any) -> None:
    client = FakeEncoderClient(matryoshka_sizes=(), is_normalized=is_normalized)
    answer = post({"input": [4, 4, 4], "dimensions": 2}, client).json()
    assert answer["data"][0]["embedding"] == expected
    assert post({"input": [4], "dimensions": SIZE}).status_code == 200


def test_too_many_inputs_are_429_while_others_run_and_400_if_they_never_fit() -> None:
    client = FakeEncoderClient()
    service = encoder_service(client, max_queue=1)  # with 2 that run, 3 places

    async def ask(http: httpx.AsyncClient) -> list[httpx.Response]:
        client.gate.clear()
        first = asyncio.create_task(http.post("/v1/embeddings", json={"input": [[3], [3]]}))
        while service.idle.is_set():
            await asyncio.sleep(0)
        second = await http.post("/v1/embeddings", json={"input": [[3], [3]]})
        client.gate.set()
        return [await first, second, await http.post("/v1/embeddings", json={"input": [[3]] * 4})]

    first, second, third = served(service, ask)
    assert first.status_code == 200
    assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
    assert (third.status_code, third.json()["error"]["param"]) == (400, "input")
    assert service.idle.is_set()


@pytest.mark.parametrize(
    ("client", "status", "code", "reason"),
    [
        (FakeEncoderClient(error="the step failed"), 500, "engine_error", "error"),
        (FakeEncoderClient(error="it died", dies=True), 503, "engine_unavailable", "error"),
    ],
)
def test_an_engine_that_fails_is_an_error(client: FakeEncoderClient, status: int, code: str, reason: str) -> None:
    service = encoder_service(client)
    answer = served(service, lambda http: http.post("/v1/embeddings", json={"input": [3]}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert service.metrics.finished[reason] == 1
    assert service.idle.is_set()


def test_a_request_that_takes_too_long_is_taken_back() -> None:
    client = FakeEncoderClient()
    client.gate.clear()
    service = encoder_service(client, request_timeout_s=0.01)
    answer = served(service, lambda http: http.post("/v1/embeddings", json={"input": [3]}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert client.cancelled == 1
    assert service.metrics.finished["abort"] == 1


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_others_are_answered_while_many_vectors_are_written(encoding_format: str) -> None:
    client = FakeEncoderClient()
    service = encoder_service(client, max_queue=1000)
    body = {"input": [[3]] * 1000, "encoding_format": encoding_format}

    async def ask(http: httpx.AsyncClient) -> tuple[int, httpx.Response]:
        client.gate.clear()
        answer = asyncio.create_task(http.post("/v1/embeddings", json=body))
        while service.idle.is_set():
            await asyncio.sleep(0)
        client.gate.set()
        turns = 0
        while not answer.done():
            await asyncio.sleep(0)
            turns += 1
        return turns, await answer

    turns, answer = served(service, ask)
    assert len(answer.json()["data"]) == 1000
    assert turns > 1000


def test_metrics_count_inputs_and_tokens() -> None:
    service = encoder_service(FakeEncoderClient())
    served(service, lambda http: http.post("/v1/embeddings", json={"input": [[3, 4], [5]]}))
    assert service.metrics.finished["stop"] == 2
    assert service.metrics.request_prompt_tokens.sum == 3
    assert sum(service.metrics.e2e_latency_s.counts) == sum(service.metrics.queue_time_s.counts) == 1


def test_a_model_that_generates_gives_no_embeddings() -> None:
    async def run() -> httpx.Response:
        app = make_app(make_service(FakeEngineClient()), HttpLimits())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            assert "/v1/embeddings" not in (await http.get("/openapi.json")).json()["paths"]
            return await http.post("/v1/embeddings", json={"input": "x"})

    answer = asyncio.run(run())
    assert answer.status_code == 404
    assert "generates text and gives no embeddings" in answer.json()["error"]["message"]
