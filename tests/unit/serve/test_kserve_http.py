"""KServe v2 over HTTP on a made-up engine: forms, statuses, and bodies that are none; tests/serving has a real one."""

import asyncio
import contextlib
import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fake_engine import TEXT, TEXT_IDS, FakeEngineClient, make_service
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import RequestError
from hasten.serve.access import ApiKeys
from hasten.serve.app import HttpLimits, make_app
from hasten.serve.kserve_format import read_generate, read_infer
from hasten.serve.kserve_generation import generating_models
from hasten.serve.service import Service

GENERATE = "/v2/models/tiny/generate"
INFER = "/v2/models/tiny/infer"


def served(service: Service, ask: Callable[[httpx.AsyncClient], Awaitable[Any]], **limits: Any) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(make_app(service, HttpLimits(**limits)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await ask(client)

    return asyncio.run(run())


def get(path: str, client: FakeEngineClient | None = None) -> httpx.Response:
    return served(make_service(client or FakeEngineClient()), lambda http: http.get(path))


def post(
    path: str, body: Any, client: FakeEngineClient | None = None, headers: Any = None, limits: Any = None
) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    service = make_service(client or FakeEngineClient(), **(limits or {}))
    return served(service, lambda http: http.post(path, content=content, headers=headers))


def infer_body(*inputs: Any, **fields: Any) -> dict[str, Any]:
    text = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}
    return {"inputs": [text, *inputs], **fields}


def test_health_and_metadata() -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready"):
        assert get(path).status_code == 200
    assert get("/v2").json()["name"] == "hasten"
    assert get("/v2/models/tiny/versions/1").json() == get("/v2/models/tiny").json()
    assert get("/v2/models/tiny/config").json()["backend"] == "hasten"


def test_a_server_that_is_not_ready_answers_400_as_triton_does() -> None:
    client = FakeEngineClient()
    client.is_ready = False
    for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
        assert get(path, client).status_code == 400
    assert get("/v2/health/live", client).status_code == 200
    answer = post(GENERATE, {"text_input": "Hi"}, client)
    assert answer.status_code == 503
    assert set(answer.json()) == {"error"}
    assert answer.headers["retry-after"] == "1"


def test_generate_takes_fields_and_parameters() -> None:
    for body in (
        {"text_input": "Hi", "max_tokens": len(TEXT_IDS), "id": "a"},
        {"text_input": "Hi", "parameters": {"max_tokens": str(len(TEXT_IDS))}, "id": "a"},
    ):
        assert post(GENERATE, body).json() == {
            "id": "a",
            "model_name": "tiny",
            "model_version": "1",
            "text_output": TEXT,
            "finish_reason": "length",
        }


def test_a_model_of_tokens() -> None:
    answer = post("/v2/models/tiny_tokens/generate", {"input_ids": [5, 6], "max_tokens": 3}).json()
    assert answer["output_ids"] == TEXT_IDS[:3]


@pytest.mark.parametrize("tokens_at_once", [1, 5])
def test_a_stream_is_an_event_a_read_and_joined_it_is_the_answer(tokens_at_once: int) -> None:
    body = {"text_input": "Hi", "max_tokens": len(TEXT_IDS)}
    answer = post(GENERATE + "_stream", body, FakeEngineClient(tokens_at_once=tokens_at_once))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(each.removeprefix("data: ")) for each in answer.text.split("\n\n") if each]
    assert "".join(event["text_output"] for event in events) == TEXT
    assert [event.get("finish_reason") for event in events] == [None] * (len(events) - 1) + ["length"]
    assert len(events) == -(-len(TEXT_IDS) // tokens_at_once)


def test_a_stream_may_be_one_event_but_one_answer_no_stream() -> None:
    body = {"text_input": "Hi", "max_tokens": 5, "stream": False}
    assert post(GENERATE + "_stream", body).text.count("data: ") == 1
    refused = post(GENERATE, body | {"stream": True})
    assert refused.status_code == 400
    assert "generate_stream" in refused.json()["error"]


def test_an_error_in_a_stream_is_its_last_event() -> None:
    answer = post(GENERATE + "_stream", {"text_input": "Hi"}, FakeEngineClient(fails_after=2))
    assert json.loads(answer.text.split("\n\n")[-2].removeprefix("data: ")) == {"error": "the step failed"}
    assert post(GENERATE, {"text_input": "Hi"}, FakeEngineClient(fails_after=2)).status_code == 500


def test_infer_in_json_and_in_binary() -> None:
    max_tokens = {"name": "max_tokens", "shape": [1], "datatype": "INT32", "data": [3]}
    answer = post(INFER, infer_body(max_tokens, id="a")).json()
    output = {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["The model read"]}
    assert answer["outputs"][0] == output
    assert answer["id"] == "a"

    raw = struct.pack("<I", 2) + b"Hi" + struct.pack("<i", 3)
    header = json.dumps(
        {
            "inputs": [
                {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}},
                {"name": "max_tokens", "shape": [1], "datatype": "INT32", "parameters": {"binary_data_size": 4}},
            ],
            "outputs": [{"name": "text_output", "parameters": {"binary_data": True}}, {"name": "finish_reason"}],
        }
    ).encode()
    binary = post(INFER, header + raw, headers={"inference-header-content-length": str(len(header))})
    num_json_bytes = int(binary.headers["inference-header-content-length"])
    text, reason = json.loads(binary.content[:num_json_bytes])["outputs"]
    assert binary.content[num_json_bytes:] == struct.pack("<I", 14) + b"The model read"
    assert text["parameters"] == {"binary_data_size": 18}
    assert reason["data"] == ["length"]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {}),
        (b"{", {}),
        (b"[]", {}),
        (b"\xff\xfe{}", {}),
        (b'{"inputs": "\xc3\x28"}', {}),
        (b'{"inputs": []}', {}),
        (b"[" * 100_000, {}),
        (infer_body(surprise=1), {}),
        (infer_body(outputs=[{"name": "logits"}]), {}),
        (infer_body(outputs=[{"name": "text_output", "parameters": {"classification": 3}}]), {}),
        (infer_body(parameters={"binary_data_output": "yes"}), {}),
        (infer_body({"name": "max_tokens", "shape": [1], "datatype": "INT32"}), {}),
        (infer_body({"name": "max_tokens", "shape": [-1], "datatype": "INT32", "data": [3]}), {}),
        (infer_body({"name": "max_tokens", "shape": [2**80], "datatype": "INT32", "data": [3]}), {}),
        (
            infer_body(
                {"name": "max_tokens", "shape": [1], "datatype": "INT32", "parameters": {"binary_data_size": -4}}
            ),
            {},
        ),
        (
            infer_body(
                {"name": "max_tokens", "shape": [1], "datatype": "INT32", "parameters": {"shared_memory_region": "r"}}
            ),
            {},
        ),
        (infer_body(), {"inference-header-content-length": "3"}),
        (infer_body(), {"inference-header-content-length": "-1"}),
        (infer_body(), {"inference-header-content-length": "9" * 30}),
        (infer_body(), {"inference-header-content-length": "x"}),
    ],
)
def test_bodies_that_are_none_are_answered_with_400(body: Any, headers: dict[str, str]) -> None:
    client = FakeEngineClient()
    answer = post(INFER, body, client, headers)
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json()["error"], str)
    assert not client.requests


def test_compressed_bodies_are_refused() -> None:
    assert post(INFER, b"x", headers={"content-encoding": "gzip"}).status_code == 415


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["text_input", "max_tokens", "stop", "stream", "seed", "sampling_parameters", "id", "parameters"]
)


INPUTS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["text_input", "max_tokens"]),
            "shape": st.lists(st.integers(-1, 3), max_size=2),
            "datatype": st.sampled_from(["BYTES", "INT32", "BOOL"]),
        },
        optional={"data": JSON, "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-4, 16)})},
    ),
    max_size=3,
)


@given(INPUTS, st.binary(max_size=24), st.integers(-3, 3))
def test_any_infer_body_is_read_or_refused(inputs: list[Any], raw: bytes, length_error: int) -> None:
    header = json.dumps({"inputs": inputs}).encode()
    model = generating_models(make_service(FakeEngineClient())).find("tiny")
    with contextlib.suppress(RequestError):
        message, tensors = read_infer(header + raw, str(len(header) + length_error))
        assert length_error >= 0
        model.read(tensors, message.parameters)


@given(st.dictionaries(NAMES, JSON, max_size=4))
def test_any_generate_body_is_read_or_refused(values: dict[str, Any]) -> None:
    model = generating_models(make_service(FakeEngineClient())).find("tiny")
    with contextlib.suppress(RequestError):
        _, inference = read_generate(model, json.dumps(values).encode())
        assert inference.prompt == values["text_input"]


def test_errors_before_the_route_have_the_same_form() -> None:
    service = make_service(FakeEngineClient())

    async def ask(http: httpx.AsyncClient) -> list[httpx.Response]:
        key = {"authorization": "Bearer right"}
        return [
            await http.get("/v2/health/ready"),
            await http.get("/v2/nothing", headers=key),
            await http.post(GENERATE, content=b"x" * 101, headers=key),
            await http.get("/v2/models/other", headers=key),
        ]

    answers = served(service, ask, keys=ApiKeys(["right"]), max_body_bytes=100)
    assert [answer.status_code for answer in answers] == [401, 404, 413, 404]
    assert all(isinstance(answer.json()["error"], str) for answer in answers)
    assert service.metrics.errors.total() == 4


def test_a_full_queue_is_429_with_retry_after() -> None:
    service = make_service(FakeEngineClient(max_num_seqs=1, step_s=0.05), max_queue=0)

    async def ask(http: httpx.AsyncClient) -> list[httpx.Response]:
        body = {"text_input": "Hi", "max_tokens": 5}
        return await asyncio.gather(*(http.post(GENERATE, json=body) for _ in range(2)))

    first, second = served(service, ask)
    assert first.status_code == 200
    assert second.status_code == 429
    assert int(second.headers["retry-after"]) >= 1


def test_a_timeout_of_the_request_is_504() -> None:
    answer = post(GENERATE, {"text_input": "Hi", "timeout": 30_000}, FakeEngineClient(step_s=0.02))
    assert answer.status_code == 504
