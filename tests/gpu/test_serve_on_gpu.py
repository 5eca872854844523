"""`hasten serve` with its engine on the GPU: what only a device can break, over HTTP as clients see it."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from serve_process import ServeProcess

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

MESSAGES = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
LONG = {"prompt": "The", "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    started = ServeProcess("--device", "cuda", "--max-num-seqs", "16")
    try:
        yield started.wait_until_ready()
        assert started.process.poll() is None, "".join(started.lines)
    finally:
        started.close()


def events(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an answer that is streamed to its end."""
    with httpx.stream("POST", f"{url}{path}", json=body, timeout=120) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert answer.status_code == 200, lines
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def metric(url: str, name: str, label: str = "") -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    found = (line for line in lines if line.startswith(f"hasten:{name}{{") and label in line)
    return float(next(found).rpartition(" ")[2])


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def test_a_chat_streams_each_token_once(server: ServeProcess) -> None:
    body = {"messages": MESSAGES, "max_tokens": 40, "ignore_eos": True, "stream": True}
    for temperature in (0, 1):  # in a captured step without sampling, and in one with it
        got = events(
            server.url,
            "/v1/chat/completions",
            body | {"temperature": temperature, "seed": 3, "stream_options": {"include_usage": True}},
        )
        assert got[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(each["choices"][0]["delta"].get("content") or "" for each in got if each["choices"])
        assert got[-2]["choices"][0]["finish_reason"] == "length"
        assert got[-1]["usage"]["completion_tokens"] == 40


def test_schemas_hold_beside_requests_without_one(server: ServeProcess) -> None:
    guided = {
        "messages": MESSAGES,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
        "max_tokens": 80,
    }
    with ThreadPoolExecutor(8) as pool:
        plain = [pool.submit(events, server.url, "/v1/completions", LONG | {"max_tokens": 200}) for _ in range(4)]
        answers = [
            pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=guided | {"seed": seed}, timeout=120)
            for seed in range(4)
        ]
        for answer in answers:
            choice = answer.result().json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            found = json.loads(choice["message"]["content"])
            assert found.keys() == {"ok", "size"}
            assert isinstance(found["ok"], bool)
            assert 0 <= found["size"] <= 99
        assert all(each.result()[-1]["choices"][0]["finish_reason"] == "length" for each in plain)


def test_a_client_that_leaves_frees_its_blocks(server: ServeProcess) -> None:
    before = metric(server.url, "generation_tokens_total")
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"n": 16}, timeout=120) as answer:
        next(answer.iter_lines())
    wait_for(lambda: metric(server.url, "request_success_total", 'finished_reason="abort"') > 0)
    wait_for(lambda: metric(server.url, "num_requests_running") == 0, 10)
    assert metric(server.url, "kv_cache_usage_perc") == 0
    assert metric(server.url, "generation_tokens_total") - before < 16 * 1500


def test_a_killed_engine_gives_its_memory_back_and_sigterm_drains() -> None:
    before = free_bytes()
    server = ServeProcess("--device", "cuda", "--max-num-seqs", "1")  # so that most requests wait
    try:
        url = server.wait_until_ready().url
        loaded = before - free_bytes()
        with ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(httpx.post, f"{url}/v1/completions", json=LONG, timeout=120) for _ in range(16)]
            wait_for(lambda: metric(url, "num_requests_waiting") >= 8)
            [engine] = psutil.Process(server.process.pid).children()
            engine.kill()
            texts = [answer.result().text for answer in answers]
        lost = [text for text in texts if '"code":"engine_unavailable"' in text]
        assert len(lost) >= 8
        assert all(text.endswith("data: [DONE]\n\n") for text in texts if text not in lost)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, 120)
        assert before - free_bytes() < 1.5 * loaded
        with ThreadPoolExecutor(16) as pool:
            accepted = [pool.submit(events, url, "/v1/completions", LONG) for _ in range(16)]
            wait_for(lambda: metric(url, "num_requests_waiting") >= 8)
            time.sleep(0.2)  # for those that are on their way
            server.process.send_signal(signal.SIGTERM)
            assert all(each.result()[-1]["choices"][0]["finish_reason"] == "length" for each in accepted)
        assert server.wait() == 0
        wait_for(lambda: before - free_bytes() < 0.1 * loaded)
    finally:
        server.close()
