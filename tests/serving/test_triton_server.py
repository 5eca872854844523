"""`hasten serve --with triton`: NVIDIA's own tritonserver, installed and started for real; never skipped."""

import contextlib
import json
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
from grpc_load import check_streams
from serve_process import MODEL
from triton_venv import triton_environment

from hasten.errors import UsageError
from hasten.pipeline.bench_online import bench_online
from hasten.pipeline.config import GenerateConfig, OnlineConfig, TritonConfig
from hasten.pipeline.export import export_triton
from hasten.pipeline.generate import generate
from hasten.request import Completion

START_TIMEOUT_S = 120
PROMPTS = [f"The story number {number} is about" for number in range(8)]
NUM_TOKENS = 40


class TritonProcess:
    """`hasten serve --with triton`, as users start it.

    Attributes:
        http, grpc, metrics: addresses.
        lines: of its stderr so far.
    """

    def __init__(self, model: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "hasten", "serve", str(model), "--with", "triton", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=triton_environment())
        self.lines: list[str] = []
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> "TritonProcess":
        assert self._is_ready.wait(START_TIMEOUT_S), self.log
        self.http, self.grpc, self.metrics = (
            re.search(rf"^{name} +(\S+)$", self.log, re.MULTILINE).group(1)  # type: ignore[union-attr]
            for name in ("HTTP", "gRPC", "metrics")
        )
        return self

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def metric(self, name: str) -> float:
        page = httpx.get(self.metrics).text
        return float(next(line.split()[-1] for line in page.splitlines() if line.startswith(f"hasten:{name}{{")))

    def generate(self, model: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.http}/models/{model}/generate", json=body, timeout=60)

    def wait(self, timeout_s: float = 60) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("try it"):
                self._is_ready.set()
        self._is_ready.set()


@pytest.fixture(scope="module")
def triton() -> Iterator[TritonProcess]:
    """A server that tests share; SIGTERM ends it and all its processes."""
    options = ("--device", "cpu", "--scheme", "fp32", "--threads", "1", "--max-num-seqs", "8")
    server = TritonProcess(MODEL, *options).wait_until_ready()
    yield server
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0, server.log
    assert not psutil.wait_procs(children, 10)[1]
    assert "Exit timeout expired" not in server.log


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Completion]:
    """What `hasten generate` gives for each prompt."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    results = generate(GenerateConfig(model=str(MODEL), file=file, max_tokens=NUM_TOKENS, scheme="fp32", device="cpu"))
    return dict(zip(PROMPTS, results, strict=True))


@dataclass
class Stream:
    """One request over a gRPC stream of its own.

    Args:
        prompt: text, or token ids for the model that takes those.
        values: what came, one item for each response that has an output.
    """

    server: TritonProcess
    prompt: str | tuple[int, ...]
    max_tokens: int = NUM_TOKENS
    values: list[Any] = field(default_factory=list)
    _has_ended: bool = field(default=False, init=False)

    def __enter__(self) -> "Stream":
        is_text = isinstance(self.prompt, str)
        self._client = triton_grpc.InferenceServerClient(self.server.grpc)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._output = "text_output" if is_text else "output_ids"
        prompt = np.array([self.prompt.encode()], object) if is_text else np.array(self.prompt, np.int32)  # type: ignore[union-attr]
        inputs = [
            _input("text_input" if is_text else "input_ids", prompt, "BYTES" if is_text else "INT32"),
            _input("max_tokens", np.array([self.max_tokens], np.int32), "INT32"),
            _input("stream", np.array([True]), "BOOL"),
        ]
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))
        model = "tiny-llama" if is_text else "tiny-llama_tokens"
        self._client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        return self

    def __exit__(self, *error: object) -> None:
        # a stream that is cancelled right after its last response keeps tritonserver 2.51 from unloading its model
        self._client.stop_stream(cancel_requests=not self._has_ended)
        self._client.close()

    def read(self) -> bool:
        """Takes the next response; whether it is the last."""
        result, error = self._answers.get(timeout=60)
        if error is not None:
            self._has_ended = True
            raise error
        value = result.as_numpy(self._output)
        if value is not None:
            self.values.append(value.tolist())
        self._has_ended = result.get_response().parameters["triton_final_response"].bool_param
        return self._has_ended

    def read_all(self) -> list[Any]:
        while not self.read():
            pass
        return [value for values in self.values for value in values]


def _input(name: str, values: np.ndarray, datatype: str) -> triton_grpc.InferInput:
    tensor = triton_grpc.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def prompt_ids(prompt: str) -> tuple[int, ...]:
    from hasten.runtimes.text import load_tokenizer

    return tuple(load_tokenizer(MODEL).encode(prompt))


def test_nothing_runs_on_when_hasten_is_killed() -> None:
    server = TritonProcess(MODEL, "--device", "cpu", "--threads", "1").wait_until_ready()
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert {"tritonserver", "triton_python_backend_stub"} <= {child.name()[:26] for child in children}, children
    server.process.kill()
    assert not psutil.wait_procs(children, 30)[1]


def test_a_model_that_has_gone_is_told(tmp_path: Path) -> None:
    weights, repository = tmp_path / "weights", tmp_path / "repository"
    shutil.copytree(MODEL, weights)
    export_triton(TritonConfig(model=str(weights), output=repository, device="cpu", name="story"))
    weights.rename(tmp_path / "gone")
    server = TritonProcess(repository)
    assert server.wait() == 1
    assert f"story cannot be loaded: there is no folder {weights}" in server.log
    assert "tritonserver ended with code" in server.lines[-1]


def test_generate_gives_what_hasten_generate_gives(triton: TritonProcess, expected: dict[str, Completion]) -> None:
    prompt = PROMPTS[0]
    answer = triton.generate("tiny-llama", {"text_input": prompt, "max_tokens": NUM_TOKENS}).json()
    assert answer["text_output"] == expected[prompt].text
    assert answer["finish_reason"] == expected[prompt].finish_reason
    body = {"input_ids": prompt_ids(prompt), "request_output_len": NUM_TOKENS}
    answer = triton.generate("tiny-llama_tokens", body).json()
    assert tuple(answer["output_ids"]) == expected[prompt].token_ids


def test_generate_stream_streams_the_same_text(triton: TritonProcess, expected: dict[str, Completion]) -> None:
    counts = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    body = {"text_input": PROMPTS[1], "parameters": {"max_tokens": NUM_TOKENS, "stream": True, **counts}}
    with httpx.stream("POST", f"{triton.http}/models/tiny-llama/generate_stream", json=body, timeout=60) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == expected[PROMPTS[1]].text
    assert sum(event["num_output_tokens"] for event in events) == len(expected[PROMPTS[1]].token_ids)
    assert {event["num_input_tokens"] for event in events} == {len(prompt_ids(PROMPTS[1]))}


@pytest.mark.parametrize("is_text", [True, False], ids=["text", "tokens"])
def test_eight_grpc_streams_at_once(triton: TritonProcess, expected: dict[str, Completion], is_text: bool) -> None:
    def run(prompt: str) -> None:
        with Stream(triton, prompt if is_text else prompt_ids(prompt)) as stream:
            values = stream.read_all()
        if is_text:
            assert b"".join(values).decode() == expected[prompt].text
        else:
            assert tuple(values) == expected[prompt].token_ids

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        list(pool.map(run, PROMPTS))


@pytest.mark.parametrize("is_text", [True, False], ids=["text", "tokens"])
def test_a_cancelled_request_frees_its_blocks(triton: TritonProcess, is_text: bool) -> None:
    with contextlib.ExitStack() as streams:
        for prompt in PROMPTS:
            request = Stream(triton, prompt if is_text else prompt_ids(prompt), max_tokens=1900)
            streams.enter_context(request).read()
        wait_for(lambda: triton.metric("num_requests_running") == len(PROMPTS))
        assert triton.metric("kv_cache_usage_perc") > 0
    wait_for(lambda: triton.metric("num_requests_running") == 0, 5)
    wait_for(lambda: triton.metric("kv_cache_usage_perc") == 0, 5)  # gauges are set one after the other


def test_many_requests_of_both_models_at_once(triton: TritonProcess, expected: dict[str, Completion]) -> None:
    """A regression test: asking whether a request was cancelled that had just ended killed tritonserver."""

    def run(number: int) -> bool:
        prompt = PROMPTS[number % len(PROMPTS)]
        if number % 4 == 0:
            body: dict[str, Any] = {"input_ids": prompt_ids(prompt), "max_tokens": NUM_TOKENS}
            answer = triton.generate("tiny-llama_tokens", body).json()
            return tuple(answer["output_ids"]) == expected[prompt].token_ids
        with Stream(triton, prompt) as stream:
            return b"".join(stream.read_all()).decode() == expected[prompt].text

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(run, range(128)))


def test_perf_analyzer_gets_its_streams(triton: TritonProcess, tmp_path: Path) -> None:
    check_streams(triton.grpc, tmp_path)


def test_bench_online_measures_it_over_grpc_as_over_http(triton: TritonProcess) -> None:
    fields: dict[str, Any] = {"concurrency": (1, 4), "runs": 1, "warmup": 0, "requests": 2, "prompt_tokens": "32"}
    lengths = []
    for url in (f"grpc://{triton.grpc}", triton.http):
        config = OnlineConfig(url=url, api="kserve", model="tiny-llama", tokenizer=MODEL, new_tokens="5-9", **fields)
        requests = [request for each in bench_online(config).runs for request in each.requests]
        assert {request.error for request in requests} == {None}
        lengths.append(sorted((request.num_prompt_tokens, len(request.token_times_s)) for request in requests))
    assert lengths[0] == lengths[1]
    with pytest.raises(UsageError, match="unknown model"):
        bench_online(OnlineConfig(url=f"grpc://{triton.grpc}", api="kserve", model="other"))


def test_stop_words_end_the_text_before_them(triton: TritonProcess, expected: dict[str, Completion]) -> None:
    text = expected[PROMPTS[2]].text
    stop = text[20:26]
    for is_streamed in (False, True):
        body = {"text_input": PROMPTS[2], "max_tokens": NUM_TOKENS, "stop_words": [stop, "@@@"], "stream": is_streamed}
        with httpx.stream("POST", f"{triton.http}/models/tiny-llama/generate_stream", json=body, timeout=60) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
        assert "".join(event["text_output"] for event in events) == text[: text.index(stop)]
        assert events[-1]["finish_reason"] == "stop"
    wait_for(lambda: triton.metric("num_requests_running") == 0, 5)


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        ("tiny-llama", {"text_input": "a", "parameters": {"temprature": 1}}, "did you mean temperature?"),
        ("tiny-llama", {"text_input": "a", "temperature": -1}, "temperature must be between"),
        ("tiny-llama", {"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters is not valid JSON"),
        ("tiny-llama", {"text_input": "a " * 3000}, "2048"),
        ("tiny-llama_tokens", {"input_ids": [1, 999999]}, "token"),
        ("tiny-llama_tokens", {"input_ids": [1], "parameters": {"stop": "x"}}, "stop strings need text"),
    ],
)
def test_a_mistake_is_told(triton: TritonProcess, model: str, body: dict[str, Any], message: str) -> None:
    answer = triton.generate(model, body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_sampling_parameters_as_the_vllm_backend_takes_them(triton: TritonProcess) -> None:
    values = json.dumps({"temperature": "0.9", "seed": 7, "max_tokens": "12", "top_k": -1})
    vllm = triton.generate("tiny-llama", {"text_input": "A", "sampling_parameters": values}).json()
    own = triton.generate("tiny-llama", {"text_input": "A", "temperature": 0.9, "seed": 7, "max_tokens": 12}).json()
    assert vllm["text_output"] == own["text_output"]
    with_prompt = {"text_input": "A", "max_tokens": 3, "exclude_input_in_output": False}
    assert triton.generate("tiny-llama", with_prompt).json()["text_output"].startswith("A")


def test_metrics_count_what_the_engine_did(triton: TritonProcess) -> None:
    def counts() -> list[float]:
        time.sleep(0.5)  # the models report ten times a second
        return [triton.metric(name) for name in ("generation_tokens_total", "time_to_first_token_seconds_count")]

    before = counts()
    while (later := counts()) != before:
        before = later
    triton.generate("tiny-llama", {"text_input": "A", "max_tokens": 5, "ignore_eos": True})
    wait_for(lambda: counts() == [before[0] + 5, before[1] + 1], 5)


def test_a_killed_engine_fails_its_requests_and_comes_back(triton: TritonProcess) -> None:
    children = psutil.Process(triton.process.pid).children(recursive=True)
    [engine] = [child for child in children if "hasten.serve.engine_process" in child.cmdline()]
    with Stream(triton, PROMPTS[0], max_tokens=1900) as stream:
        stream.read()
        engine.kill()
        with pytest.raises(Exception, match="engine process was killed"):
            stream.read_all()
    wait_for(lambda: triton.generate("tiny-llama", {"text_input": "A", "max_tokens": 2}).status_code == 200, 60)
