"""From the first connection to the last: loading, faults, keys, TLS, draining; the real server each time."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serve_process import MODEL, ServeProcess

from hasten.cli.main import run
from hasten.pipeline import serve as pipeline_serve

LONG = {"prompt": "The", "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[ServeProcess]:
    server = ServeProcess(*arguments)
    try:
        yield server.wait_until_ready()
    finally:
        server.close()


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"hasten:{name}{{")))


def wait_for(condition: Any, timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def stream(url: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status of a streamed completion, and all that came."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        return answer.status_code, answer.read().decode()


def num_tokens(text: str) -> int:
    usages = [json.loads(line[6:])["usage"] for line in text.split("\n\n") if line.startswith("data: {")]
    return usages[-1]["completion_tokens"]


def test_a_full_queue_says_when_to_come_again_and_sigterm_loses_nothing_that_was_accepted() -> None:
    with serving("--max-num-seqs", "4", "--max-queue", "8", "--drain-timeout-s", "240") as server:
        body = LONG | {"max_tokens": 200, "stream_options": {"include_usage": True}}
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(stream, server.url, body) for _ in range(12)]
            wait_for(lambda: metric(server.url, "num_requests_running") == 4)
            wait_for(lambda: metric(server.url, "num_requests_waiting") == 8)
            refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            late = httpx.post(f"{server.url}/v1/completions", json=body)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
            assert httpx.get(f"{server.url}/health").status_code == 200
            for answer in answers:
                status, text = answer.result()
                assert status == 200
                assert text.endswith("data: [DONE]\n\n")
                assert num_tokens(text) == 200
        assert server.wait() == 0
        assert not any(
            "Traceback" in line or "error" in line for line in server.lines if "503" not in line and "429" not in line
        )


def test_a_killed_engine_fails_its_requests_and_comes_back_and_a_second_signal_ends_at_once() -> None:
    with serving() as server:
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(stream, server.url, LONG) for _ in range(4)]
            wait_for(lambda: metric(server.url, "num_requests_running") == 4)
            [engine] = psutil.Process(server.process.pid).children()
            engine.send_signal(signal.SIGKILL)
            for answer in answers:
                _, text = answer.result()
                assert '"code":"engine_unavailable"' in text
                assert "[DONE]" not in text
        refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert httpx.get(f"{server.url}/health").status_code == 200
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 90)
        assert stream(server.url, LONG | {"max_tokens": 5})[1].endswith("data: [DONE]\n\n")
        assert metric(server.url, "kv_cache_usage_perc") == 0
        with ThreadPoolExecutor(1) as pool:
            pool.submit(stream, server.url, LONG)
            wait_for(lambda: metric(server.url, "num_requests_running") == 1)
            children = psutil.Process(server.process.pid).children(recursive=True)
            for _ in range(2):
                server.process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert server.wait(5) == 128 + signal.SIGINT
            assert not psutil.wait_procs(children, 5)[1]


def test_clients_that_vanish_free_their_blocks(server: ServeProcess) -> None:
    url = httpx.URL(server.url)
    before = len(psutil.Process(server.process.pid).net_connections())
    body = json.dumps(LONG).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    sockets = [socket.create_connection((url.host, url.port)) for _ in range(8)]
    for each in sockets:
        each.sendall(head.encode() + b"\r\n\r\n" + body)
    for each in sockets:
        assert each.recv(100)
    assert metric(server.url, "num_requests_running") > 0
    for each in sockets:
        each.close()
    wait_for(lambda: metric(server.url, "num_requests_running") == 0, 10)
    assert metric(server.url, "kv_cache_usage_perc") == 0
    wait_for(lambda: len(psutil.Process(server.process.pid).net_connections()) <= before, 10)


def test_a_reader_that_stops_does_not_stop_others(server: ServeProcess) -> None:
    url = httpx.URL(server.url)
    body = json.dumps(LONG).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((url.host, url.port))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        slow.sendall(head.encode() + b"\r\n\r\n" + body)
        assert slow.recv(10)
        status, text = stream(server.url, LONG | {"max_tokens": 100})
        assert status == 200
        assert text.endswith("data: [DONE]\n\n")
        wait_for(lambda: metric(server.url, "num_requests_running") == 0, 60)  # the engine did not wait for it
        received = b""
        slow.settimeout(30)
        while b"[DONE]" not in received:
            data = slow.recv(1 << 16)
            assert data
            received += data
    whole = stream(server.url, LONG)[1]
    assert _text_of_chunked(received) == _text_of(whole)


def _text_of(events: str) -> str:
    lines = [line[6:] for line in events.split("\n\n") if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def _text_of_chunked(received: bytes) -> str:
    """The text in what is left of a chunked answer whose first bytes were taken."""
    body = received.partition(b"\r\n\r\n")[2]
    chunks = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        chunks, body = chunks + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return _text_of(chunks.decode())


def test_keys_tls_and_a_timeout(tmp_path: Path) -> None:
    keys, cert, key = tmp_path / "keys", tmp_path / "cert.pem", tmp_path / "key.pem"
    keys.write_text("one\ntwo\n")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", str(key)]
    subprocess.run([*make, "-out", str(cert), *subject], check=True, capture_output=True)
    options = ["--api-key-file", str(keys), "--tls-cert", str(cert), "--tls-key", str(key)]
    with serving(*options, "--request-timeout-s", "0.2") as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=server.url, verify=context) as client:
            assert client.get("/ready").status_code == 200
            assert client.get("/v1/models").status_code == 401
            assert client.get("/metrics", headers={"authorization": "Bearer three"}).status_code == 401
            client.headers["authorization"] = "Bearer two"
            assert client.get("/v1/models").status_code == 200
            late = client.post("/v1/completions", json=LONG | {"stream": False})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")


def test_probes_answer_while_the_model_loads_and_what_does_not_end_in_time_is_cut() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = ServeProcess("--port", str(port), "--drain-timeout-s", "0.05", "--max-num-seqs", "4")
    seen: set[int] = set()
    try:
        end_s = time.monotonic() + 100
        while 200 not in seen and time.monotonic() < end_s:
            with contextlib.suppress(httpx.ConnectError):
                seen.add(httpx.get(f"{url}/ready").status_code)
                assert httpx.get(f"{url}/health").status_code == 200
            time.sleep(0.02)
        assert 200 in seen
        assert seen <= {200, 503}
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(stream, url, LONG) for _ in range(4)]
            wait_for(lambda: metric(url, "num_requests_running") == 4)
            waiting = [pool.submit(stream, url, LONG | {"stream": False}) for _ in range(4)]
            wait_for(lambda: metric(url, "num_requests_waiting") == 4)
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 0
            for answer in answers:
                assert '"code":"engine_unavailable"' in answer.result()[1]
                assert "the server shut down before this request was done" in answer.result()[1]
            for answer in waiting:
                status, text = answer.result()
                assert (status, json.loads(text)["error"]["code"]) == (503, "engine_unavailable")
        assert any("8 sequences had not ended after 0.05 s" in line for line in server.lines)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--api-key-file", "nothing"], 2, "cannot read the API keys"),
        (["--tls-cert", "x.pem"], 2, "--tls-cert and --tls-key"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], 2, "for TLS"),
        (["--host", "192.0.2.1"], 2, "cannot listen on 192.0.2.1"),
        (["--max-queue", "-1"], 2, "--max-queue must be at least 0"),
        (["--scheme", "fp9"], 2, "did you mean fp8?"),
    ],
)
def test_a_mistake_of_the_command_line_is_one_sentence(
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        pipeline_serve, "configure_logs", lambda log_format: None
    )  # those of the tests stay as they are
    assert run(["serve", str(MODEL), "--port", "0", "--device", "cpu", *arguments]) == status
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = ServeProcess("--port", str(taken.getsockname()[1]))
        assert server.wait(60) == 2
        assert "cannot listen on" in server.lines[-1]
