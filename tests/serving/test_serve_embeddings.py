"""Embeddings of the real server, through the official openai client and tritonclient, on a tiny random BERT."""

import asyncio
import contextlib
import queue
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from openai import AsyncOpenAI, OpenAI
from serve_process import ServeProcess
from tritonclient.utils import InferenceServerException

from hasten.models.encoder import Encoder, load_encoder
from tiny_encoders import make_encoder, write_modules, write_tokenizer

KEY = "secret"
NAME = "tiny-bert"
LIMIT = 40
SIZE = 48
NUM_CLIENTS = 64
NUM_INPUTS = 2048  # the most that a request may have


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / NAME
    make_encoder(path, matryoshka_dimensions=[16, 32])
    write_modules(path, {"pooling_mode_mean_tokens": True}, max_seq_length=LIMIT)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServeProcess]:
    keys = folder.parent / "keys.txt"
    keys.write_text(KEY)
    options = ("--api-key-file", str(keys), "--max-queue", "20000", "--grpc-port", "0")
    started = ServeProcess(*options, model=folder).wait_until_ready()
    yield started
    started.close()


@pytest.fixture(scope="module")
def client(server: ServeProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(params=[triton_http, triton_grpc], ids=["http", "grpc"])
def triton(request: pytest.FixtureRequest) -> Any:
    """tritonclient's module for one of the protocols."""
    return request.param


@pytest.fixture
def triton_client(triton: Any, server: ServeProcess) -> Iterator[Any]:
    address = server.grpc_address if triton is triton_grpc else server.url.partition("://")[2]
    with contextlib.closing(triton.InferenceServerClient(address)) as made:
        yield made


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(folder, "fp32", "cpu")


def alone(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Each text's vector, computed without the others; a word's token id is its number and 4."""
    inputs = [[2, *(int(word[1:]) + 4 for word in text.split()), 3] for text in texts]
    return np.concatenate([encoder.embed([each]).numpy() for each in inputs])


def made_up_texts(count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(f"w{chosen.randrange(100)}" for _ in range(chosen.randint(1, LIMIT - 2))) for _ in range(count)]


def vectors_of(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [each.index for each in answer.data] == [*range(len(answer.data))]
    return np.array([each.embedding for each in answer.data], dtype=np.float32)


def headers() -> dict[str, str]:
    """With the key; tritonclient puts others into them."""
    return {"authorization": f"Bearer {KEY}"}


def texts_input(triton: Any, texts: Sequence[str]) -> Any:
    made = triton.InferInput("text_input", [len(texts)], "BYTES")
    made.set_data_from_numpy(np.array([text.encode() for text in texts], np.object_))
    return made


def metric(url: str, line_start: str) -> float:
    text = httpx.get(f"{url}/metrics", headers=headers()).text
    return float(next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"hasten:{line_start}")))


def test_64_concurrent_requests_get_the_vectors_that_each_has_alone(server: ServeProcess, encoder: Encoder) -> None:
    texts = made_up_texts(3 * NUM_CLIENTS, seed=1)

    async def ask_all() -> list[np.ndarray]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            asked = [texts[number::NUM_CLIENTS] for number in range(NUM_CLIENTS)]
            answers = await asyncio.gather(*(client.embeddings.create(model=NAME, input=each) for each in asked))
            return [vectors_of(answer) for answer in answers]

    vectors = asyncio.run(ask_all())
    expected = alone(encoder, texts)
    for number, each in enumerate(vectors):
        np.testing.assert_allclose(each, expected[number::NUM_CLIENTS], rtol=0, atol=1e-5)


def test_forms_of_input_and_answer(client: OpenAI, encoder: Encoder) -> None:
    text = "w1 w2 w3"
    [expected] = alone(encoder, [text])
    as_base64 = client.embeddings.create(model=NAME, input=text, user="somebody")
    assert (as_base64.model, as_base64.usage.prompt_tokens, as_base64.usage.total_tokens) == (NAME, 5, 5)
    inputs: list[Any] = [text, [text], [2, 5, 6, 7, 3], [[2, 5, 6, 7, 3]]]
    for each in inputs:
        [vector] = vectors_of(client.embeddings.create(model=NAME, input=each, encoding_format="float"))
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-6)
    np.testing.assert_array_equal(vector, vectors_of(as_base64)[0])


def test_a_matryoshka_model_gives_shorter_vectors(client: OpenAI, encoder: Encoder) -> None:
    [expected] = alone(encoder, ["w9"])
    [vector] = vectors_of(client.embeddings.create(model=NAME, input="w9", dimensions=16))
    np.testing.assert_allclose(vector, expected[:16] / np.linalg.norm(expected[:16]), rtol=0, atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="it must be one of 16, 32") as refused:
        client.embeddings.create(model=NAME, input="w9", dimensions=20)
    assert refused.value.param == "dimensions"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": ""}, "at least 1 character"),
        ({"input": []}, "at least 1 item"),
        ({"input": ["w1", ""]}, "at least 1 character"),
        ({"input": [[5], []]}, "at least 1 item"),
        ({"input": [120]}, "token ids must be between 0 and 119"),
        ({"input": ["w1", "w2 " * 50]}, f"input 1 has 52 tokens, and the model takes at most {LIMIT}"),
        ({"input": "w1", "extra_body": {"encoding": "float"}}, "did you mean encoding_format"),
        ({"input": "w1", "encoding_format": "int8"}, "'float' or 'base64'"),
    ],
)
def test_bad_input_is_refused(client: OpenAI, body: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.embeddings.create(model=NAME, **body)


def test_who_may_ask_what(client: OpenAI, server: ServeProcess) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").embeddings.create(model=NAME, input="w1")
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.embeddings.create(model="other", input="w1")
    with pytest.raises(openai.NotFoundError, match="is an encoder, which gives embeddings and generates nothing"):
        client.completions.create(model=NAME, prompt="w1")
    with httpx.Client(base_url=server.url, headers=headers()) as http:
        assert "is an encoder" in http.post(f"/v2/models/{NAME}/generate", json={"text_input": "w1"}).json()["error"]
        paths = http.get("/openapi.json").json()["paths"]
        assert "/v1/embeddings" in paths
        assert "/v2/models/{model}/infer" in paths
        assert not {path for path in paths if "generate" in path or path.endswith("completions")}
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] == LIMIT
        assert http.post("/tokenize", json={"prompt": "w1"}).json()["tokens"] == [2, 5, 3]


def test_tritonclient_learns_what_there_is(triton: Any, triton_client: Any) -> None:
    options: dict[str, Any] = {"headers": headers()} | ({"as_json": True} if triton is triton_grpc else {})
    assert triton_client.is_server_live(headers=headers())
    assert triton_client.is_server_ready(headers=headers())
    assert "generate" not in triton_client.get_server_metadata(**options)["extensions"]
    index = triton_client.get_model_repository_index(**options)
    models = index["models"] if isinstance(index, dict) else index
    assert [each["name"] for each in models] == [NAME, f"{NAME}_tokens"]
    for name, input_name in ((NAME, "text_input"), (f"{NAME}_tokens", "input_ids")):
        assert triton_client.is_model_ready(name, headers=headers())
        metadata = triton_client.get_model_metadata(name, **options)
        assert [each["name"] for each in metadata["inputs"]] == [input_name]
        [output] = metadata["outputs"]
        assert (output["name"], [int(each) for each in output["shape"]]) == ("embedding", [-1, SIZE])
        config = triton_client.get_model_config(name, **options)
        assert config.get("config", config)["output"][0]["data_type"] == "TYPE_FP32"


def test_tritonclient_gets_the_same_vectors(triton: Any, triton_client: Any, client: OpenAI, encoder: Encoder) -> None:
    texts = made_up_texts(100, seed=2)
    outputs = [triton.InferRequestedOutput("embedding")]
    given = [texts_input(triton, texts)]
    vectors = triton_client.infer(NAME, given, outputs=outputs, headers=headers()).as_numpy("embedding")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, alone(encoder, texts), rtol=0, atol=1e-5)
    np.testing.assert_allclose(vectors, vectors_of(client.embeddings.create(model=NAME, input=texts)), atol=1e-6)
    one = texts_input(triton, ["w1 w2 w3"])
    from_text = triton_client.infer(NAME, [one], headers=headers()).as_numpy("embedding")
    ids = triton.InferInput("input_ids", [5], "INT32")
    ids.set_data_from_numpy(np.array([2, 5, 6, 7, 3], np.int32))
    from_ids = triton_client.infer(f"{NAME}_tokens", [ids], headers=headers()).as_numpy("embedding")
    np.testing.assert_array_equal(from_ids, from_text)
    assert from_ids.shape == (1, SIZE)


def test_tensors_in_json_are_those_in_binary(server: ServeProcess, client: OpenAI) -> None:
    with contextlib.closing(triton_http.InferenceServerClient(server.url.partition("://")[2])) as asked:
        given = triton_http.InferInput("text_input", [2], "BYTES")
        given.set_data_from_numpy(np.array([b"w1", b"w2 w3"], np.object_), binary_data=False)
        vectors = [
            asked.infer(
                NAME, [given], outputs=[triton_http.InferRequestedOutput("embedding", binary)], headers=headers()
            ).as_numpy("embedding")
            for binary in (False, True)
        ]
    np.testing.assert_array_equal(*vectors)


def test_tritonclient_is_told_what_is_wrong(triton: Any, triton_client: Any) -> None:
    def infer(*texts: str, model: str = NAME, key: Any = headers, **options: Any) -> Any:
        return triton_client.infer(model, [texts_input(triton, texts)], headers=key(), **options)

    for asked, pattern in (
        (lambda: infer("w1", model="other"), "there is no model 'other'"),
        (lambda: infer("w1", ""), "at least 1 character"),
        (lambda: infer("w1", "w2 " * 50), f"input 1 has 52 tokens, and the model takes at most {LIMIT}"),
        (lambda: infer(*["w1"] * (NUM_INPUTS + 1)), f"at most {NUM_INPUTS} items"),
        (lambda: infer("w1", parameters={"max_tokens": 3}), "no input or parameter 'max_tokens'"),
        (lambda: infer("w1", key=dict), "no valid API key"),
    ):
        with pytest.raises(InferenceServerException, match=pattern) as caught:
            asked()
        assert caught.value.status() not in ("500", "StatusCode.INTERNAL")


def test_a_stream_is_told_that_nothing_is_generated(server: ServeProcess) -> None:
    came: queue.Queue[Any] = queue.Queue()
    with contextlib.closing(triton_grpc.InferenceServerClient(server.grpc_address)) as asked:
        asked.start_stream(lambda result, error: came.put(error or result), headers=headers())
        asked.async_stream_infer(NAME, [texts_input(triton_grpc, ["w1"])])
        assert "gives embeddings and generates nothing" in str(came.get(timeout=30))
        asked.stop_stream()


def test_clients_that_go_away_leave_nothing_behind(server: ServeProcess, client: OpenAI) -> None:
    aborted = 'request_success_total{finished_reason="abort"'
    before = metric(server.url, aborted)

    async def ask_and_go() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as http:
            inputs = [[5] * LIMIT] * NUM_INPUTS
            asked = [asyncio.create_task(http.embeddings.create(model=NAME, input=inputs)) for _ in range(8)]
            while not await asyncio.to_thread(metric, server.url, "num_requests_waiting"):
                assert not all(each.done() for each in asked)
            for each in asked:
                each.cancel()
            await asyncio.wait(asked)

    asyncio.run(ask_and_go())
    end_s = time.monotonic() + 20
    while metric(server.url, "num_requests_waiting") or metric(server.url, aborted) == before:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert client.embeddings.create(model=NAME, input="w1").usage.prompt_tokens == 3


def test_a_killed_engine_fails_its_requests_and_comes_back(server: ServeProcess, client: OpenAI) -> None:
    expected = vectors_of(client.embeddings.create(model=NAME, input="w1 w2"))
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(client.embeddings.create, model=NAME, input=[[5] * LIMIT] * NUM_INPUTS) for _ in range(4)
        ]
        while not metric(server.url, "num_requests_waiting"):
            assert not all(each.done() for each in running)
        [engine] = psutil.Process(server.process.pid).children()
        engine.kill()
        failures = [each.exception() for each in running]
    assert any(isinstance(each, openai.InternalServerError) for each in failures)
    assert all(each is None or getattr(each, "code", None) == "engine_unavailable" for each in failures)
    end_s = time.monotonic() + 60
    while httpx.get(f"{server.url}/ready").status_code != 200:
        assert time.monotonic() < end_s
        time.sleep(0.1)
    np.testing.assert_array_equal(vectors_of(client.embeddings.create(model=NAME, input="w1 w2")), expected)
    server.process.terminate()
    assert server.wait() == 0
