"""tritonclient over HTTP and gRPC, unchanged, and curl, against the real server on the model that ships."""

import contextlib
import json
import queue
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from grpc_load import check_streams
from serve_process import MODEL, ServeProcess
from tritonclient.utils import InferenceServerException

from hasten.pipeline.config import GenerateConfig
from hasten.pipeline.generate import generate

PROMPT = "The model"


def http_client(server: ServeProcess, **options: Any) -> Any:
    return triton_http.InferenceServerClient(server.url.partition("://")[2], **options)


def grpc_client(server: ServeProcess, **options: Any) -> Any:
    return triton_grpc.InferenceServerClient(server.grpc_address, **options)


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: ServeProcess) -> Iterator[Any]:
    with contextlib.closing((http_client if request.param == "http" else grpc_client)(server)) as made:
        yield made


def inputs(client: Any, max_tokens: int, prompt: str = PROMPT) -> list[Any]:
    module = triton_http if isinstance(client, triton_http.InferenceServerClient) else triton_grpc
    text = module.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([prompt.encode()], np.object_))
    limit = module.InferInput("max_tokens", [1], "INT32")
    limit.set_data_from_numpy(np.array([max_tokens], np.int32))
    return [text, limit]


def kv_usage(server: ServeProcess) -> float:
    [usage] = re.findall(
        r"^hasten:kv_cache_usage_perc\S* (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE
    )
    return float(usage)


class Stream:
    """A stream of tritonclient, and what came on it."""

    def __init__(self, client: Any, headers: dict[str, str] | None = None) -> None:
        self.came: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: self.came.put(error or result.get_response()), headers=headers)

    def responses(self, num_requests: int) -> dict[str, list[Any]]:
        """By id, until so many requests have had their last."""
        found: dict[str, list[Any]] = {}
        while num_requests:
            response = self.came.get(timeout=60)
            if isinstance(response, Exception):
                raise response
            found.setdefault(response.id, []).append(response)
            num_requests -= response.parameters["triton_final_response"].bool_param
        return found


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny-llama")
    assert client.is_model_ready("tiny-llama_tokens", "1")
    options = {"as_json": True} if isinstance(client, triton_grpc.InferenceServerClient) else {}
    assert client.get_server_metadata(**options)["name"] == "hasten"
    metadata = client.get_model_metadata("tiny-llama", **options)
    assert metadata["inputs"][0]["name"] == "text_input"
    assert [output["name"] for output in metadata["outputs"]][:2] == ["text_output", "finish_reason"]
    config = client.get_model_config("tiny-llama_tokens", **options)
    assert config.get("config", config)["model_transaction_policy"] == {"decoupled": True}
    index = client.get_model_repository_index(**options)
    assert len(index["models"] if isinstance(index, dict) else index) == 2


def test_an_answer_is_what_generate_prints(client: Any) -> None:
    result = client.infer("tiny-llama", inputs(client, 24), request_id="mine")
    [expected] = generate(GenerateConfig(model=str(MODEL), prompt=PROMPT, max_tokens=24, scheme="fp32", device="cpu"))
    assert result.as_numpy("text_output")[0].decode() == expected.text
    assert result.as_numpy("finish_reason")[0].decode() == expected.finish_reason


def test_tokens_in_and_tokens_out(client: Any) -> None:
    module = triton_http if isinstance(client, triton_http.InferenceServerClient) else triton_grpc
    answers = []
    for tokens in (np.array([[5, 6, 7]], np.int64), np.array([5, 6, 7], np.int32)):
        given = module.InferInput("input_ids", list(tokens.shape), "INT64" if tokens.dtype == np.int64 else "INT32")
        given.set_data_from_numpy(tokens)
        result = client.infer("tiny-llama_tokens", [given], parameters={"max_tokens": 9, "ignore_eos": True})
        answers.append(result.as_numpy("output_ids").tolist())
    assert answers[0] == answers[1]
    assert len(answers[0]) == 9


def test_errors_are_the_clients_own(client: Any) -> None:
    for asked, pattern in (
        (lambda: client.infer("other", inputs(client, 3)), "there is no model 'other'"),
        (lambda: client.infer("tiny-llama", inputs(client, 0)), "max_tokens: "),
        (lambda: client.infer("tiny-llama", inputs(client, 9**9)), "lower max_tokens to"),
        (lambda: client.infer("tiny-llama", inputs(client, 3)[1:]), "text_input: Field required"),
    ):
        with pytest.raises(InferenceServerException, match=pattern) as caught:
            asked()
        assert caught.value.status() in ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")


def test_20_requests_on_one_stream_are_each_what_generate_prints(server: ServeProcess, tmp_path: Path) -> None:
    words = (MODEL / "heldout.txt").read_text().split()
    prompts = [" ".join(words[7 * i : 7 * i + 4 + i % 5]) for i in range(20)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    expected = generate(GenerateConfig(model=str(MODEL), file=path, max_tokens=30, scheme="fp32", device="cpu"))
    with contextlib.closing(grpc_client(server)) as client:
        stream = Stream(client)
        for number, prompt in enumerate(prompts):
            client.async_stream_infer(
                "tiny-llama", inputs(client, 30, prompt), request_id=str(number), enable_empty_final_response=True
            )
        found = stream.responses(20)
        client.stop_stream()
    assert found.keys() == {str(number) for number in range(20)}
    for number, one in enumerate(expected):
        results = [triton_grpc.InferResult(each) for each in found[str(number)]]
        assert "".join(each.as_numpy("text_output")[0].decode() for each in results) == one.text
        reasons = [each.as_numpy("finish_reason") for each in results]
        assert reasons[-1].tolist() == [one.finish_reason.encode()]
        assert reasons[:-1] == [None] * (len(reasons) - 1)


def test_cancelling_a_stream_frees_its_blocks(server: ServeProcess) -> None:
    with contextlib.closing(grpc_client(server)) as client:
        stream = Stream(client)
        for number in range(20):
            client.async_stream_infer(
                "tiny-llama", inputs(client, 900), request_id=str(number), parameters={"ignore_eos": True}
            )
        running: set[str] = set()
        while len(running) < 20:
            running.add(stream.came.get(timeout=60).id)
        assert kv_usage(server) > 0
        client.stop_stream(cancel_requests=True)
    end_s = time.monotonic() + 10
    while kv_usage(server) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert kv_usage(server) == 0


def test_curl_generates_and_streams(server: ServeProcess) -> None:
    url = f"{server.url}/v2/models/tiny-llama"
    asked = json.dumps({"text_input": PROMPT, "parameters": {"max_tokens": 12, "temperature": "0"}})

    def curl(path: str) -> str:
        return subprocess.run(
            ["curl", "-sN", url + path, "-d", asked], capture_output=True, text=True, check=True
        ).stdout

    answer = json.loads(curl("/generate"))
    assert answer.keys() == {"model_name", "model_version", "text_output", "finish_reason"}
    lines = [line for line in curl("/versions/1/generate_stream").split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert "".join(json.loads(line[6:])["text_output"] for line in lines) == answer["text_output"]


def test_keys_and_tls_and_draining(tmp_path: Path) -> None:
    keys, cert, key = tmp_path / "keys", tmp_path / "cert.pem", tmp_path / "key.pem"
    keys.write_text("one\n")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", str(key)]
    subprocess.run([*make, "-out", str(cert), *subject], check=True, capture_output=True)
    options = ["--api-key-file", str(keys), "--tls-cert", str(cert), "--tls-key", str(key), "--drain-timeout-s", "240"]
    server = ServeProcess("--grpc-port", "0", *options).wait_until_ready()
    right = {"authorization": "Bearer one"}
    try:
        client = grpc_client(server, ssl=True, root_certificates=str(cert))
        for headers in (None, {"authorization": "Bearer two"}):
            with pytest.raises(InferenceServerException, match="no valid API key"):
                client.infer("tiny-llama", inputs(client, 3), headers=headers)
        assert client.is_server_ready(headers=right)
        stream = Stream(client, right)
        for number in range(4):  # they must last longer than it takes to be refused
            client.async_stream_infer(
                "tiny-llama", inputs(client, 1900), request_id=str(number), parameters={"ignore_eos": True}
            )
        first = stream.came.get(timeout=60)
        assert not first.parameters["triton_final_response"].bool_param
        server.process.terminate()
        with pytest.raises(InferenceServerException, match="shutting down") as caught:
            while True:
                client.infer("tiny-llama", inputs(client, 1), headers=right)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        for rest in stream.responses(4).values():
            assert triton_grpc.InferResult(rest[-1]).as_numpy("finish_reason").tolist() == [b"length"]
        client.stop_stream()
        assert server.wait() == 0
        client.close()
    finally:
        server.close()


def test_perf_analyzer_takes_the_server_for_a_triton(server: ServeProcess, tmp_path: Path) -> None:
    """NVIDIA's perf_analyzer, unchanged; test_triton_server has it against tritonserver."""
    check_streams(server.grpc_address, tmp_path)
