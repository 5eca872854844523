"""KServe v2 of an encoder, over HTTP and gRPC, on made-up vectors; tests/serving has a real one."""

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from fake_encoder import SIZE, FakeEncoderClient, encoder_service
from fake_engine import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from hasten.serve.app import HttpLimits, make_embedding_app
from hasten.serve.kserve_embeddings import embedding_models
from hasten.serve.kserve_format import json_numbers
from hasten.serve.kserve_grpc import grpc_serving
from hasten.serve.openai_models import MAX_INPUTS
from hasten.serve.server import Listen
from hasten.serve.service import Service

INFER = "/v2/models/tiny/infer"
INFER_TOKENS = "/v2/models/tiny_tokens/infer"
TEXTS = ["Hi", "The model reads"]
VECTORS = [[len(ids), ids[0], 0, 0] for ids in map(TOKENIZER.encode, TEXTS)]


def http(service: Service, ask: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(make_embedding_app(service, HttpLimits()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await ask(client)

    return asyncio.run(run())


def rpc(service: Service, ask: Callable[[GRPCInferenceServiceStub], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with grpc_serving(embedding_models(service), Listen(grpc_port=0), HttpLimits()) as address:
            assert address is not None
            async with grpc.aio.insecure_channel(address) as channel:
                return await asyncio.wait_for(ask(GRPCInferenceServiceStub(channel)), 30)

    return asyncio.run(run())


def get(path: str, client: FakeEncoderClient | None = None) -> httpx.Response:
    return http(encoder_service(client or FakeEncoderClient()), lambda asked: asked.get(path))


def post(path: str, body: Any, service: Service | None = None, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    service = service or encoder_service(FakeEncoderClient())
    return http(service, lambda asked: asked.post(path, content=content, headers=headers))


def tensor(data: Any, name: str = "text_input", datatype: str = "BYTES", **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)], "datatype": datatype, "data": data, **fields}


def infer_request(*texts: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="tiny", id="mine")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
    request.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text.encode() for text in texts))
    return request


def test_the_models_say_what_they_take_and_give() -> None:
    for name, given_input in (
        ("tiny", {"name": "text_input", "datatype": "BYTES", "shape": [-1]}),
        ("tiny_tokens", {"name": "input_ids", "datatype": "INT32", "shape": [-1]}),
    ):
        metadata = get(f"/v2/models/{name}").json()
        assert metadata["inputs"] == [given_input]
        assert metadata["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, SIZE]}]
        config = get(f"/v2/models/{name}/config").json()
        assert config["output"] == [{"name": "embedding", "data_type": "TYPE_FP32", "dims": [-1, SIZE]}]
        assert config["model_transaction_policy"] == {"decoupled": False}
    assert "generate" not in get("/v2").json()["extensions"]


def test_each_text_has_a_row() -> None:
    answer = post(INFER, {"inputs": [tensor(TEXTS)], "id": "mine"}).json()
    [output] = answer.pop("outputs")
    assert answer == {"id": "mine", "model_name": "tiny", "model_version": "1"}
    assert output["shape"] == [2, SIZE]
    assert output["data"] == [number for row in VECTORS for number in row]


def test_vectors_in_binary() -> None:
    body = {"inputs": [tensor([7, 8, 9], "input_ids", "INT32")], "parameters": {"binary_data_output": True}}
    answer = post(INFER_TOKENS, body)
    num_json_bytes = int(answer.headers["inference-header-content-length"])
    [output] = json.loads(answer.content[:num_json_bytes])["outputs"]
    assert (output["shape"], output["parameters"]) == ([1, SIZE], {"binary_data_size": 4 * SIZE})
    assert answer.content[num_json_bytes:] == struct.pack("<4f", 3, 7, 0, 0)


def test_grpc_gives_the_same() -> None:
    async def ask(stub: GRPCInferenceServiceStub) -> Any:
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
        return metadata.outputs[0].shape, await stub.ModelInfer(infer_request(*TEXTS))

    shape, response = rpc(encoder_service(FakeEncoderClient()), ask)
    assert shape == [-1, SIZE]
    assert (response.id, response.outputs[0].name, response.outputs[0].shape) == ("mine", "embedding", [2, SIZE])
    vectors = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(2, SIZE)
    np.testing.assert_array_equal(vectors, VECTORS)


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (INFER, {"inputs": []}, "text_input: Field required"),
        (INFER, {"inputs": [tensor([])]}, "text_input: List should have at least 1 item"),
        (INFER, {"inputs": [tensor(["Hi", ""])]}, "text_input: String should have at least 1 character"),
        (INFER, {"inputs": [tensor(["Hi"] * (MAX_INPUTS + 1))]}, f"at most {MAX_INPUTS} items"),
        (INFER, {"inputs": [tensor(["a"] * 7)]}, "the request has 7 sequences, and the server holds at most 6"),
        (INFER, {"inputs": [tensor(["Hi", "a " * 300])]}, "input 1 has "),
        (INFER, {"inputs": [tensor(["a", "b"], shape=[2, 1])]}, "not [-1]"),
        (INFER, {"inputs": [tensor([5], datatype="INT32")]}, "text_input is INT32 and must be BYTES"),
        (INFER, {"inputs": [tensor(["Hi"]), tensor([3], "max_tokens", "INT32")]}, "has no input 'max_tokens'"),
        (INFER, {"inputs": [tensor(["Hi"])], "parameters": {"sampling_parameters": "{"}}, "no input or parameter"),
        (INFER, {"inputs": [tensor(["Hi"])], "outputs": [{"name": "text_output"}]}, "only embedding"),
        (INFER_TOKENS, {"inputs": [tensor([], "input_ids", "INT32")]}, "input 0 has no token"),
        (INFER_TOKENS, {"inputs": [tensor([-1], "input_ids", "INT32")]}, "greater than or equal to 0"),
        (INFER_TOKENS, {"inputs": [tensor([10**6], "input_ids", "INT32")]}, "token ids must be between"),
        (INFER_TOKENS, {"inputs": [tensor([3, 4], "input_ids", "INT32", shape=[2, 1])]}, "not [-1]"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(path: str, body: Any, reason: str) -> None:
    answer = post(path, body, encoder_service(FakeEncoderClient(), max_queue=4))
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_nothing_is_generated() -> None:
    for path in ("/v2/models/tiny/generate", "/v2/models/tiny/versions/1/generate_stream"):
        answer = post(path, {"text_input": "Hi"})
        assert answer.status_code == 404
        assert "gives embeddings" in answer.json()["error"]

    async def ask(stub: GRPCInferenceServiceStub) -> list[Any]:
        return [each async for each in stub.ModelStreamInfer(iter([infer_request("Hi")]))]

    [response] = rpc(encoder_service(FakeEncoderClient()), ask)
    assert "gives embeddings" in response.error_message
    assert response.infer_response.id == "mine"
    assert response.infer_response.parameters["triton_final_response"].bool_param


def test_before_the_model_is_loaded_its_tensors_are_not_known() -> None:
    client = FakeEncoderClient()
    del client.facts
    client.is_ready = False
    assert get("/v2/models/tiny", client).status_code == 503
    assert get("/v2/models/tiny/config", client).status_code == 503
    assert post(INFER, {"inputs": [tensor(["Hi"])]}, encoder_service(client)).status_code == 503
    assert get("/v2/models/tiny/ready", client).status_code == 400
    assert get("/v2/health/live", client).status_code == 200

    async def ask(stub: GRPCInferenceServiceStub) -> list[Any]:
        calls = [stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny")), stub.ModelInfer(infer_request("Hi"))]
        return [await call.code() for call in calls]

    assert rpc(encoder_service(client), ask) == [grpc.StatusCode.UNAVAILABLE] * 2


def test_what_was_accepted_is_answered_while_the_server_drains() -> None:
    client = FakeEncoderClient()
    client.gate.clear()
    service = encoder_service(client)

    async def ask(asked: httpx.AsyncClient) -> list[int]:
        body = {"inputs": [tensor(TEXTS)]}
        accepted = asyncio.create_task(asked.post(INFER, json=body))
        while service.idle.is_set():
            await asyncio.sleep(0)
        service.drain()
        late = await asked.post(INFER, json=body)
        client.gate.set()
        return [(await accepted).status_code, late.status_code]

    assert http(service, ask) == [200, 503]


def test_limits_have_the_statuses_that_they_have_elsewhere() -> None:
    body = {"inputs": [tensor(["Hi"])]}
    slow = FakeEncoderClient()
    slow.gate.clear()
    for client, limits, status in (
        (FakeEncoderClient(error="the step failed"), {}, 500),
        (FakeEncoderClient(error="it died", dies=True), {}, 503),
        (slow, {"request_timeout_s": 0.01}, 504),
    ):
        service = encoder_service(client, **limits)
        assert post(INFER, body, service).status_code == status
        assert service.idle.is_set()


def test_a_full_queue_and_a_client_that_goes_away() -> None:
    client = FakeEncoderClient()
    client.gate.clear()
    service = encoder_service(client, max_queue=0)  # 2 run

    async def ask(stub: GRPCInferenceServiceStub) -> grpc.StatusCode:
        first = stub.ModelInfer(infer_request(*TEXTS))
        while service.idle.is_set():
            await asyncio.sleep(0.01)
        refused: grpc.StatusCode = await stub.ModelInfer(infer_request("Hi")).code()
        first.cancel()
        await asyncio.wait_for(service.idle.wait(), 5)
        return refused

    assert rpc(service, ask) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.cancelled == 1
    assert service.metrics.finished["abort"] == 2


def test_a_request_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "hasten"):
        rpc(encoder_service(FakeEncoderClient()), lambda stub: stub.ModelInfer(infer_request(*TEXTS)))
    [fields] = [record.fields for record in caplog.records]  # type: ignore[attr-defined]
    assert (fields["status"], fields["completion_tokens"], fields["finish_reason"]) == ("OK", 0, "stop")
    assert fields["prompt_tokens"] == sum(row[0] for row in VECTORS)
    assert "prompts" not in fields


JSON = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
INPUTS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["text_input", "input_ids", "max_tokens"]),
            "shape": st.lists(st.integers(-1, 3), max_size=2),
            "datatype": st.sampled_from(["BYTES", "INT32", "FP32"]),
        },
        optional={"data": st.lists(JSON, max_size=3) | JSON, "parameters": st.dictionaries(st.text(max_size=4), JSON)},
    ),
    max_size=2,
)


@given(st.sampled_from([INFER, INFER_TOKENS]), INPUTS, st.dictionaries(st.text(max_size=4), JSON, max_size=2))
def test_any_request_is_answered_or_refused(path: str, inputs: list[Any], parameters: dict[str, Any]) -> None:
    answer = post(path, {"inputs": inputs, "parameters": parameters})
    assert answer.status_code in (200, 400), answer.text


def test_others_are_answered_while_many_vectors_are_written() -> None:
    vectors = np.random.default_rng(0).standard_normal(300_001).astype(np.float32)

    async def write() -> tuple[int, bytes]:
        written = asyncio.create_task(json_numbers(vectors))
        turns = 0
        while not written.done():
            await asyncio.sleep(0)
            turns += 1
        return turns, bytes(await written)

    turns, text = asyncio.run(write())
    assert np.array_equal(np.array(json.loads(text), dtype=np.float32), vectors)
    assert turns > 50
