"""`hasten bench online` against a server that computes nothing, and over gRPC against hasten's own; real sockets."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from serve_process import MODEL, ServeProcess

from hasten.bench.endpoints import OnlineRequest, OpenAIEndpoint
from hasten.bench.http_stream import Address, Connection
from hasten.bench.load import LoadGenerator
from hasten.bench.metrics import itl_s, median, summarize, tpot_s
from hasten.bench.result import BenchResult, read_result
from hasten.cli.main import run
from hasten.errors import EndpointError, UsageError
from hasten.pipeline.bench_online import bench_online
from hasten.pipeline.config import OnlineConfig

ROOT = Path(__file__).parents[2]
NULL_SERVER = ROOT / "benchmarks" / "serving" / "null_server.py"


@contextmanager
def null_server(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address and its process."""
    command = [sys.executable, str(NULL_SERVER), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def measure(url: str, **fields: object) -> BenchResult:
    small = {"concurrency": (2,), "runs": 1, "warmup": 0, "requests": 3, "new_tokens": "6", "prompt_tokens": "32"}
    return bench_online(OnlineConfig(url=url, **(small | fields)))  # type: ignore[arg-type]


def errors_of(result: BenchResult) -> Counter[str | None]:
    return Counter(request.error for each in result.runs for request in each.requests)


@pytest.mark.parametrize(
    ("server", "fields", "is_counted"),
    [
        ((), {"api": "completions"}, True),
        ((), {"api": "chat"}, True),
        (("--strict",), {"api": "chat"}, True),
        (("--merge", "2", "--no-token-ids"), {}, True),
        (("--no-usage",), {}, True),
        (("--no-usage", "--no-token-ids"), {}, False),
        ((), {"api": "kserve", "model": "null"}, True),
        (("--merge", "2"), {"api": "kserve", "model": "null"}, True),
        (("--no-token-ids",), {"api": "kserve", "model": "null"}, False),
        ((), {"tokenizer": MODEL, "prompts": "random"}, True),
    ],
)
def test_every_api_gives_the_tokens_that_were_asked_for(
    server: tuple[str, ...], fields: dict, is_counted: bool
) -> None:
    with null_server(*server) as (url, _):
        result = measure(url, **fields)
    assert result.failure is None
    assert [len(request.token_times_s) for request in result.runs[0].requests] == [6] * 6
    assert errors_of(result) == {None: 6}
    assert ("token_count" in result.missing) is not is_counted


def test_prompts_that_a_server_knows_already_are_told(server: ServeProcess, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "online", server.url, "--concurrency", "1", "--requests", "2", "--runs", "1", "--warmup", "0"]
    for seed, known in (("97", ""), ("97", r"had [78]\d(\.\d)? % of the prompts' tokens"), ("98", "")):
        assert run([*asked, "--prompt-tokens", "64", "--new-tokens", "2", "--seed", seed]) == 0
        printed = capsys.readouterr().out
        assert re.search(known, printed) if known else "prefix cache" not in printed, printed


def test_times_are_those_of_the_server() -> None:
    """The server sends a token every 20 ms after 60 ms; medians, because the machine is shared."""
    with null_server("--step-ms", "20", "--ttft-ms", "60") as (url, _):
        result = measure(url, concurrency=(1, 4), new_tokens="12", runs=2)
    [alone, four] = summarize(result)
    for speed in (alone, four):
        assert 0.058 <= speed.ttft_s.p50 < 0.095  # a timer may fire early by a part of a millisecond
        assert speed.itl_s is not None and speed.tpot_s is not None
        assert speed.itl_s.p50 == pytest.approx(0.020, abs=0.004)
        assert speed.tpot_s.p50 == pytest.approx(0.020, abs=0.004)
        assert speed.cpu_cores is not None
    assert four.scaling_efficiency == pytest.approx(1.0, abs=0.15)
    assert [(each.concurrency, len(each.requests)) for each in result.runs] == [(1, 3), (4, 12)] * 2
    assert result.memory is not None and result.memory.peak_rss_bytes > 1 << 20
    assert "gpu" in result.missing or result.runs[0].gpu is not None


def test_no_token_is_lost_or_doubled_under_load() -> None:
    requests = [OnlineRequest(str(index), "x", 1, 100) for index in range(300)]
    with null_server() as (url, _), LoadGenerator(Address.from_url(url), OpenAIEndpoint("null"), 2) as generator:
        for _ in range(2):
            made = generator.run(requests, 64, timeout_s=60.0)
            assert {record.request_id for record in made.records} == {request.request_id for request in requests}
            assert {(record.error, len(record.token_times_s)) for record in made.records} == {(None, 100)}
            assert all(made.start_s <= record.submitted_s <= record.token_times_s[0] for record in made.records)
            assert made.end_s >= max(record.token_times_s[-1] for record in made.records)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("dies", "the server closed the connection in the middle of the answer"),
        ("stops-short", "the answer has another number of tokens than was asked for"),
        ("no-done", "the stream ended without [DONE]"),
        ("status-429", "the server answered 429 Too Many Requests"),
        ("status-500", "the server answered 500 Internal Server Error"),
        ("silent", "no whole answer within 1 s"),
    ],
)
def test_a_fault_is_counted_with_its_reason_and_the_others_are_measured(fault: str, error: str) -> None:
    with null_server("--fault", fault, "--every", "3") as (url, _):
        began_s = time.perf_counter()
        result = measure(url, timeout=1.0)
        took_s = time.perf_counter() - began_s
    assert errors_of(result) == {None: 4, error: 2}
    assert result.failure is None
    if fault == "status-429":
        assert took_s > 1.0, "a client keeps away for as long as Retry-After says"


def test_a_server_that_dies_ends_the_measurement_with_the_reason() -> None:
    with null_server("--step-ms", "20") as (url, process):
        ended: list[float] = []

        def kill_in_the_second_run(progress: object) -> None:
            if "run 2 of" in getattr(progress, "detail", ""):
                process.kill()
                ended.append(time.perf_counter())

        config = OnlineConfig(url=url, concurrency=(2,), runs=9, warmup=0, requests=2, new_tokens="8")
        result = bench_online(config, kill_in_the_second_run)
    assert ended and len(result.runs) == 2
    assert errors_of(result)[None] == 4
    assert result.failure is not None and "no connection" in result.failure


def test_an_open_loop_keeps_its_times_whatever_the_server_does() -> None:
    with null_server("--step-ms", "20", "--ttft-ms", "100") as (url, _):
        result = measure(url, rate=50.0, arrivals="constant", requests=50, new_tokens="4", slo_ttft_ms=1000.0)
    [each] = result.runs
    gaps = [after.submitted_s - before.submitted_s for before, after in pairwise(each.requests)]
    assert len(each.requests) == 50 and errors_of(result) == {None: 50}
    assert sum(gaps) == pytest.approx(49 / 50, abs=0.02)
    assert median(gaps) == pytest.approx(0.020, abs=0.003)
    assert result.config.arrivals == "open loop, constant, 50 requests/s"


def test_who_waits_for_a_connection_waits_from_its_arrival_on() -> None:
    requests = [OnlineRequest(str(index), "x", 1, 1, arrival_s=0.0) for index in range(3)]
    with (
        null_server("--ttft-ms", "100") as (url, _),
        LoadGenerator(Address.from_url(url), OpenAIEndpoint("null"), 1) as generator,
    ):
        made = generator.run(requests, 1, timeout_s=10.0)
    waited = sorted(record.token_times_s[0] - record.submitted_s for record in made.records)
    assert waited == [pytest.approx(each, abs=0.09) for each in (0.1, 0.2, 0.3)]


def test_merged_tokens_come_at_one_time() -> None:
    with null_server("--merge", "3", "--step-ms", "5") as (url, _):
        result = measure(url)
    for request in result.runs[0].requests:
        assert len(request.token_times_s) == 6 and len(set(request.token_times_s)) <= 2
        assert min(itl_s(request)) == 0.0 and tpot_s(request) is not None


@pytest.mark.parametrize(
    ("server", "options", "code", "message"),
    [
        (("--key", "k"), (), 2, "give the server's key with --api-key-file"),
        ((), ("--model", "nul"), 2, "did you mean null?"),
        ((), ("--api", "kserve"), 2, "name one with --model"),
        ((), ("--api", "kserve", "--model", "x"), 2, "no such path"),
        ((), ("--new-tokens", "9000"), 1, "ends at 8192"),
        ((), ("--api-key-file", "no-such-file"), 2, "cannot read the API key"),
        ((), ("--trace", "no-such-file"), 2, "cannot read the trace"),
    ],
)
def test_a_mistake_is_one_sentence(
    server: tuple[str, ...], options: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with null_server(*server) as (url, _):
        assert run(["bench", "online", url, *options]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hasten: ") and message in error


def test_an_address_where_nothing_listens_or_nothing_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with null_server() as (url, _):
        assert run(["bench", "online", f"{url}/elsewhere"]) == 2
        assert "has no /v1/models" in capsys.readouterr().err
    assert run(["bench", "online", url]) == 1
    assert "connection refused" in capsys.readouterr().err


def test_the_key_is_sent_and_is_not_in_the_result(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame-open\n")
    with null_server("--key", "sesame-open") as (url, _):
        result = measure(url, api_key_file=key)
    assert errors_of(result) == {None: 6}
    assert "sesame-open" not in repr(result)


def test_results_are_compared_and_reported_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, step in (("slow", "8"), ("fast", "2")):
        files.append(str(tmp_path / f"{name}.json"))
        with null_server("--step-ms", step) as (url, _):
            options = ["--concurrency", "1,2", "--runs", "5", "--warmup", "0", "--requests", "1", "--new-tokens", "8"]
            assert run(["bench", "online", url, *options, "--name", name, "-o", files[-1]]) == 0
    assert "concurrency 2" in capsys.readouterr().out
    assert read_result(Path(files[0])).candidate.name == "slow"
    assert run(["compare", *files]) == 0
    assert "fast" in capsys.readouterr().out
    assert run(["report", *files, "-o", str(tmp_path / "report")]) == 0
    assert "closed loop" in (tmp_path / "report" / "report.html").read_text()


def test_ctrl_c_leaves_what_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    with null_server("--step-ms", "20") as (url, _):
        command = [sys.executable, "-m", "hasten", "bench", "online", url, "-o", str(out), "--concurrency", "2"]
        with subprocess.Popen(
            [*command, "--warmup", "0", "--runs", "500"], stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:  # a line every few seconds
                if line.startswith("speed") and "run 1 of" not in line:
                    break
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    result = read_result(out)
    assert 1 <= len(result.runs) < 500
    assert errors_of(result).keys() == {None}
    assert "stopped by Ctrl-C" in result.missing["runs"]


async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers once, unframed for /eof, and closes without a word."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b"/eof" in head:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
    elif b"/junk" in head:
        writer.write(b"hello\r\n\r\n")
    else:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    await writer.drain()
    await asyncio.sleep(0.01)
    writer.close()


def test_a_connection_survives_servers_that_close_it() -> None:
    async def exchange() -> list[tuple[bytes, str | None]]:
        server = await asyncio.start_server(rude, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        connection = Connection(address)
        made = []
        for path in ("/a", "/b", "/eof", "/junk", "/c"):
            answer = await connection.run(address.post(path, b""))
            made.append((b"".join(answer.parts), answer.error))
            await asyncio.sleep(0.03 if path == "/a" else 0)  # idle once, in a hurry else
        connection.close()
        server.close()
        return made

    assert asyncio.run(exchange()) == [
        (b"ok", None),
        (b"ok", None),
        (b"until the end", None),
        (b"", "the server's answer is not HTTP/1.1"),
        (b"ok", None),
    ]


def test_the_null_server_speaks_the_events_that_it_says() -> None:
    """What the other tests trust: a stream as OpenAI's API describes it."""
    body = {"model": "null", "prompt": "x", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}

    async def ask(url: str) -> list[bytes]:
        address = Address.from_url(url)
        answer = await Connection(address).run(address.post("/v1/completions", json.dumps(body).encode()))
        return b"".join(answer.parts).split(b"\n\n")

    with null_server() as (url, _):
        *events, done, nothing = asyncio.run(ask(url))
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert (done, nothing) == (b"data: [DONE]", b"")
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == [" null", " null", ""]
    assert chunks[-1]["usage"]["completion_tokens"] == 2


def measure_grpc(server: ServeProcess, scheme: str = "grpc", **fields: object) -> BenchResult:
    return measure(f"{scheme}://{server.grpc_address}", **({"api": "kserve", "model": "tiny-llama"} | fields))


def test_grpc_gives_the_same_tokens_as_http(server: ServeProcess) -> None:
    fields = {"api": "kserve", "model": "tiny-llama", "tokenizer": MODEL, "concurrency": (1, 4), "new_tokens": "5-9"}
    over_grpc, over_http = measure_grpc(server, **fields), measure(server.url, **fields)

    def lengths(result: BenchResult) -> list[list[tuple[int, int]]]:
        return [
            sorted((request.num_prompt_tokens, len(request.token_times_s)) for request in each.requests)
            for each in result.runs
        ]

    assert errors_of(over_grpc) == {None: 15}
    assert lengths(over_grpc) == lengths(over_http)
    assert over_grpc.missing.keys() == over_http.missing.keys()
    assert over_grpc.memory is not None and over_grpc.config.load is not None
    assert over_grpc.config.load.url == f"grpc://{server.grpc_address}"
    for each in over_grpc.runs:
        for request in each.requests:
            assert list(request.token_times_s) == sorted(request.token_times_s)
            assert each.start_s <= request.submitted_s < request.token_times_s[0]


def test_an_open_loop_over_grpc(server: ServeProcess) -> None:
    result = measure_grpc(server, rate=40.0, requests=12, new_tokens="4")
    assert errors_of(result) == {None: 12}
    assert [len(request.token_times_s) for request in result.runs[0].requests] == [4] * 12


def test_what_the_server_refuses_over_grpc_is_counted_with_its_reason(server: ServeProcess) -> None:
    result = measure_grpc(server, new_tokens="4000", prompt_tokens="8", requests=1)
    assert set(errors_of(result)) and all("must be at most 2048" in str(error) for error in errors_of(result))


def test_an_answer_over_grpc_that_takes_too_long_is_given_up(server: ServeProcess) -> None:
    result = measure_grpc(server, new_tokens="1900", prompt_tokens="8", requests=1, timeout=1.0)
    assert errors_of(result) == {"no whole answer within 1 s": 2}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "is gRPC, which only KServe has: add --api kserve --model NAME"),
        (("--api", "kserve"), 2, "name one with --model"),
        (("--api", "kserve", "--model", "nosuch"), 2, "there is no model 'nosuch'"),
        (("--api", "kserve", "--model", "tiny-llama_tokens"), 2, "has no input text_input"),
    ],
)
def test_a_mistake_over_grpc_is_one_sentence(
    server: ServeProcess, options: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "online", f"grpc://{server.grpc_address}", *options]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hasten: ") and message in error


def test_a_port_that_is_not_for_grpc_and_one_where_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--api", "kserve", "--model", "null")
    with null_server() as (url, _):
        address = url.replace("http://", "grpc://")
        assert run(["bench", "online", address, *options]) == 1
        assert "that it is the one for gRPC" in capsys.readouterr().err
    assert run(["bench", "online", address, *options]) == 1
    assert "Connection refused" in capsys.readouterr().err


def test_grpc_with_a_key_and_tls_until_the_server_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, cert, key, wrong = (tmp_path / name for name in ("keys", "cert.pem", "key.pem", "wrong"))
    keys.write_text("sesame-open\n")
    wrong.write_text("sesame-shut\n")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", str(key)]
    subprocess.run([*make, "-out", str(cert), *subject], check=True, capture_output=True)
    options = ("--api-key-file", str(keys), "--tls-cert", str(cert), "--tls-key", str(key))
    started = ServeProcess("--grpc-port", "0", *options).wait_until_ready()
    try:
        with pytest.raises(EndpointError, match="cannot be used"):
            measure_grpc(started, "grpcs", api_key_file=keys)  # its certificate is not trusted
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        for key_file, cure in ((None, "give the server's key"), (wrong, "check the key")):
            with pytest.raises(UsageError, match=f"UNAUTHENTICATED.*{cure}"):
                measure_grpc(started, "grpcs", api_key_file=key_file)
        assert errors_of(measure_grpc(started, "grpcs", api_key_file=keys)) == {None: 6}

        def kill_in_the_second_run(progress: object) -> None:
            if "run 2 of" in getattr(progress, "detail", ""):
                started.process.kill()

        config = OnlineConfig(
            url=f"grpcs://{started.grpc_address}",
            api="kserve",
            model="tiny-llama",
            api_key_file=keys,
            concurrency=(2,),
            runs=9,
            warmup=0,
            requests=2,
            new_tokens="50",
        )
        result = bench_online(config, kill_in_the_second_run)
    finally:
        started.close()
    assert len(result.runs) == 2 and errors_of(result)[None] == 4
    cut, gone = "the call ended with UNAVAILABLE: ", "no connection: no server that speaks gRPC answers at "
    assert all(str(request.error).startswith((cut, gone)) for request in result.runs[1].requests)
    assert result.failure is not None
    assert "sesame-open" not in repr(result)
