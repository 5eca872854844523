"""Routes with a JSON body are answered without the framework's own way, and nobody can tell."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient, make_service
from fastapi import FastAPI

from hasten.serve.app import HttpLimits, make_app

REQUESTS = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}


@pytest.fixture
def framework_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the requests that FastAPI was handed."""
    found: list[str] = []
    handle = FastAPI.__call__

    async def noted(app: FastAPI, scope: Any, receive: Any, send: Any) -> None:
        found.append(scope["path"])
        await handle(app, scope, receive, send)

    monkeypatch.setattr(FastAPI, "__call__", noted)
    return found


def ask(method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> httpx.Response:
    async def run() -> httpx.Response:
        app = make_app(make_service(FakeEngineClient()), HttpLimits())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, content=body, headers={"content-type": content_type})

    return asyncio.run(run())


@pytest.mark.parametrize("path", REQUESTS)
def test_a_json_route_is_answered_without_the_framework(path: str, framework_paths: list[str]) -> None:
    assert ask("POST", path, json.dumps(REQUESTS[path]).encode()).status_code == 200
    assert framework_paths == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models", 200),
        ("POST", "/v1/nothing", 404),
        ("GET", "/health", 200),
    ],
)
def test_the_rest_is_the_frameworks(method: str, path: str, status: int, framework_paths: list[str]) -> None:
    assert ask(method, path).status_code == status
    assert framework_paths == [path]


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        (b"{", "application/json", "invalid_body"),
        (b'{"max_tokens": 1}', "application/json", "missing_parameter"),
        (b'{"prompt": "x", "model": "other"}', "application/json", "model_not_found"),
        (b'{"prompt": "x"}', "text/plain", "invalid_body"),
    ],
)
def test_errors_are_those_of_the_framework(
    body: bytes, content_type: str, code: str, framework_paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = ask("POST", "/v1/completions", body, content_type)
    assert framework_paths == []
    monkeypatch.setattr("hasten.serve.app.JsonRoutes", lambda app, routers, answer_error: app)
    framework = ask("POST", "/v1/completions", body, content_type)
    assert framework_paths == ["/v1/completions"]
    assert direct.json()["error"]["code"] == code
    assert (direct.status_code, direct.content) == (framework.status_code, framework.content)
