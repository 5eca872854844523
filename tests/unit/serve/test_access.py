"""Keys, sizes, vanished clients and the log, in front of every route."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient, make_service
from test_openai_api import post, served

from hasten.errors import UsageError
from hasten.serve.access import ApiKeys
from hasten.serve.app import HttpLimits, make_app

COMPLETION = {"prompt": "a secret prompt", "max_tokens": 8}
PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/no-such-path"),
    ("OPTIONS", "/v1/completions"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "second", "Basic second", "Bearer ", "Bearer \xff"])
def test_no_path_opens_without_a_key(method: str, path: str, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    keys = ApiKeys(["first", "second"])
    answer = served(
        make_service(FakeEngineClient()), lambda http: http.request(method, path, headers=headers), keys=keys
    )
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["first", "second"])
def test_every_key_opens(key: str) -> None:
    headers = {"authorization": f"bearer {key}"}
    service = make_service(FakeEngineClient())
    keys = ApiKeys(["first", "second"])
    assert served(service, lambda http: http.get("/v1/models", headers=headers), keys=keys).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(path: str) -> None:
    service = make_service(FakeEngineClient())
    assert served(service, lambda http: http.get(path), keys=ApiKeys(["k"])).status_code == 200


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\n  second  \n")
    keys = ApiKeys.read(path)
    assert keys.admits("Bearer first")
    assert keys.admits("Bearer second")
    assert not keys.admits("Bearer # ours")
    path.write_text("# none\n")
    with pytest.raises(UsageError, match="no API key"):
        ApiKeys.read(path)
    with pytest.raises(UsageError, match="cannot read"):
        ApiKeys.read(tmp_path / "nothing")


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_not_read(is_announced: bool) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    content: Any = b"x" * 100_000 if is_announced else chunks()
    client = FakeEngineClient()
    service = make_service(client)
    answer = served(service, lambda http: http.post("/v1/completions", content=content), max_body_bytes=5000)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert service.metrics.errors["body_too_large"] == 1


def test_another_origin_reads_nothing_unless_it_is_allowed() -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    service = make_service(FakeEngineClient())
    closed = served(service, lambda http: http.get("/v1/models", headers=headers))
    assert "access-control-allow-origin" not in closed.headers
    keys = ApiKeys(["k"])
    origins = ["https://a.example"]
    preflight = served(
        service, lambda http: http.options("/v1/completions", headers=headers), cors_origins=origins, keys=keys
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"


class Connection:
    """A client at the level of ASGI, which may go away while it is answered."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.is_gone = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "scheme": "http",
        }

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("prompt", ["one", [[5], [6]]])
def test_a_client_that_goes_away_ends_its_requests(
    is_stream: bool, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hasten")

    async def run() -> tuple[FakeEngineClient, Any]:
        client = FakeEngineClient(step_s=0.005)
        service = make_service(client)
        connection = Connection({"prompt": prompt, "max_tokens": 200, "stream": is_stream})
        app = make_app(service, HttpLimits())
        answering = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
        await asyncio.sleep(0.1)
        assert client.running
        connection.is_gone.set()
        await asyncio.wait_for(answering, 1)
        assert not client.running
        assert service.idle.is_set()
        return client, service

    client, service = asyncio.run(run())
    assert len(client.aborted) == (1 if prompt == "one" else 2)
    assert service.metrics.finished["abort"] == len(client.aborted)
    [record] = [record for record in caplog.records if record.message == "request"]
    assert record.fields["status"] == 499  # type: ignore[attr-defined]


def test_a_reader_that_is_slow_gets_longer_pieces_and_all_of_them() -> None:
    async def run() -> Connection:
        connection = Connection({"prompt": "x", "max_tokens": 200, "stream": True})
        engine_is_done = asyncio.Event()

        async def send_slowly(message: Any) -> None:
            if len(connection.sent) == 3:
                await engine_is_done.wait()
            connection.sent.append(message)

        class Queueing(FakeEngineClient):
            """Keeps what was not taken, as the engine's client does."""

            async def stream(self, request: Any) -> Any:
                events: list[Any] = []
                changed = asyncio.Event()

                async def fill() -> None:
                    async for some in FakeEngineClient.stream(self, request):
                        events.extend(some)
                        changed.set()
                    engine_is_done.set()

                filling = asyncio.create_task(fill())
                while not (filling.done() and not events):
                    await changed.wait()
                    changed.clear()
                    some, events[:] = list(events), []
                    yield some

        app = make_app(make_service(Queueing()), HttpLimits())  # type: ignore[arg-type]
        await asyncio.wait_for(app(connection.scope, connection.receive, send_slowly), 5)
        return connection

    connection = asyncio.run(run())
    body = b"".join(message.get("body", b"") for message in connection.sent).decode()
    events = [json.loads(line[6:]) for line in body.split("\n\n") if line.startswith("data: {")]
    whole = post("/v1/completions", {"prompt": "x", "max_tokens": 200}).json()["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    assert len(events) < 10


def test_the_log_has_what_happened_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hasten")
    answer = post("/v1/completions", COMPLETION)
    [record] = [record for record in caplog.records if record.message == "request"]
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
    assert fields["request_id"] == answer.headers["x-request-id"]
    assert answer.json()["id"].endswith(fields["request_id"])
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/v1/completions", 200)
    assert (fields["completion_tokens"], fields["finish_reason"], fields["stream"]) == (8, "length", False)
    assert 0 < fields["ttft_s"] < fields["duration_s"]
    assert "secret" not in str(fields)
    caplog.clear()
    post("/v1/completions", COMPLETION, log_prompts=True)
    assert caplog.records[-1].fields["prompts"] == "a secret prompt"  # type: ignore[attr-defined]


def test_an_error_of_our_own_is_a_500_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(FakeEngineClient())
    monkeypatch.setattr(service, "open", None)
    answer: httpx.Response = served(service, lambda http: http.post("/v1/completions", json=COMPLETION))
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "NoneType" not in answer.text
