"""The OpenAI API's answers, streams and errors over a made-up engine; the real one is in tests/serving."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fake_engine import TEXT, TEXT_IDS, TOKENIZER, FakeEngineClient, make_service

from hasten.serve.app import HttpLimits, make_app
from hasten.serve.service import Service

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def served(service: Service, ask: Callable[[httpx.AsyncClient], Awaitable[Any]], **limits: Any) -> Any:
    """What `ask` returns of a client of this service."""

    async def run() -> Any:
        transport = httpx.ASGITransport(make_app(service, HttpLimits(**limits)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await ask(client)

    return asyncio.run(run())


def post(path: str, body: Any, client: FakeEngineClient | None = None, **limits: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    service = make_service(client or FakeEngineClient())
    return served(service, lambda http: http.post(path, content=content, headers=headers), **limits)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_has_text_and_usage() -> None:
    answer = post("/v1/completions", {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": len(TEXT_IDS)}).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 24,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_a_completion_has_16_tokens_unless_told_otherwise() -> None:
    assert post("/v1/completions", {"prompt": "x"}).json()["usage"]["completion_tokens"] == 16


def test_a_chat_completion_runs_to_the_models_limit() -> None:
    client = FakeEngineClient(max_model_tokens=64)
    answer = post("/v1/chat/completions", CHAT, client).json()
    prompt_tokens = answer["usage"]["prompt_tokens"]
    assert client.requests[0].prompt_token_ids == tuple(
        TOKENIZER.apply_chat_template(CHAT["messages"], add_generation_prompt=True)["input_ids"]
    )
    assert answer["usage"]["total_tokens"] == 64 == prompt_tokens + answer["usage"]["completion_tokens"]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert client.requests[0].sampling.temperature == 1.0


def test_parts_of_a_message_are_one_text() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    client = FakeEngineClient()
    for content in ("Hi", parts):
        post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 1}, client)
    assert client.requests[0].prompt_token_ids == client.requests[1].prompt_token_ids


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("tokens_at_once", [1, 4, 100])
def test_a_stream_joined_is_the_answer(path: str, tokens_at_once: int) -> None:
    body = (CHAT if "chat" in path else {"prompt": "x"}) | {"max_tokens": 30, "n": 2}
    whole = post(path, body).json()
    stream = post(path, body | {"stream": True}, FakeEngineClient(tokens_at_once=tokens_at_once))
    assert stream.headers["content-type"].startswith("text/event-stream")
    texts, reasons = ["", ""], [None, None]
    for event in events_of(stream):
        assert "usage" not in event
        [choice] = event["choices"]
        assert reasons[choice["index"]] is None
        texts[choice["index"]] += choice["delta"].get("content", "") if "chat" in path else choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    whole_texts = [each["message"]["content"] if "chat" in path else each["text"] for each in whole["choices"]]
    assert texts == whole_texts
    assert reasons == ["length", "length"]


def test_the_first_chunk_of_a_chat_says_the_role_and_the_last_has_the_usage() -> None:
    body = CHAT | {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    events = events_of(post("/v1/chat/completions", body))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_chunk_has_the_usage_so_far_if_asked_for(path: str) -> None:
    body = (CHAT if "chat" in path else {"prompt": "x"}) | {"max_tokens": 6, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [event["usage"] for event in events_of(post(path, body | {"stream_options": options}))]
    generated = [each["completion_tokens"] for each in counts]
    assert generated == sorted(generated) and generated[0] == 1 and generated[-1] == 6
    assert {each["total_tokens"] - each["completion_tokens"] for each in counts} == {counts[-1]["prompt_tokens"]}


def test_a_list_of_prompts_gives_n_choices_each_in_their_order() -> None:
    client = FakeEngineClient()
    body = {"prompt": [[5], [6, 7]], "n": 2, "max_tokens": 4}
    answer = post("/v1/completions", body, client).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert sorted(request.prompt_token_ids for request in client.requests) == [(5,), (6, 7)]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 16,
        "total_tokens": 19,
        "prompt_tokens_details": {"cached_tokens": 1},  # of each prompt once, whatever n is
    }
    streamed = events_of(post("/v1/completions", body | {"stream": True}))
    assert {event["choices"][0]["index"] for event in streamed} == {0, 1, 2, 3}


@pytest.mark.parametrize("tokens_at_once", [1, 5])
@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}])
def test_token_ids_stand_beside_the_text_of_completions(tokens_at_once: int, extra: dict[str, Any]) -> None:
    body = {"prompt": [[5], [6, 7]], "n": 2, "max_tokens": 7, "return_token_ids": True} | extra
    choices = post("/v1/completions", body).json()["choices"]
    assert [choice["token_ids"] for choice in choices] == [TEXT_IDS[:7]] * 4
    assert [choice["prompt_token_ids"] for choice in choices] == [[5], [5], [6, 7], [6, 7]]
    stream = post("/v1/completions", body | {"stream": True}, FakeEngineClient(tokens_at_once=tokens_at_once))
    streamed: list[list[dict[str, Any]]] = [[], [], [], []]
    for event in events_of(stream):
        streamed[event["choices"][0]["index"]].append(event["choices"][0])
    for whole, chunks in zip(choices, streamed, strict=True):
        assert [token for chunk in chunks for token in chunk["token_ids"]] == whole["token_ids"]
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        assert [chunk.get("prompt_token_ids") for chunk in chunks] == [whole["prompt_token_ids"]] + [None] * (
            len(chunks) - 1
        )


def test_token_ids_stand_beside_the_text_of_chats() -> None:
    body = CHAT | {"n": 2, "max_tokens": 7, "return_token_ids": True}
    prompt = TOKENIZER.apply_chat_template(CHAT["messages"], add_generation_prompt=True)["input_ids"]
    answer = post("/v1/chat/completions", body).json()
    assert answer["prompt_token_ids"] == prompt
    assert [choice["token_ids"] for choice in answer["choices"]] == [TEXT_IDS[:7]] * 2
    events = events_of(post("/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert events.pop()["usage"]["completion_tokens"] == 14
    assert all(event["usage"] is None for event in events)
    for index in range(2):
        mine = [event for event in events if event["choices"][0]["index"] == index]
        assert [event.get("prompt_token_ids") for event in mine] == [prompt] + [None] * (len(mine) - 1)
        token_ids = [token for event in mine for token in event["choices"][0].get("token_ids", ())]
        assert token_ids == TEXT_IDS[:7]


def test_token_ids_of_a_stop_string_are_all_that_were_generated() -> None:
    body = {"prompt": "x", "max_tokens": 24, "stop": "text", "return_token_ids": True, "stream": True}
    chunks = [event["choices"][0] for event in events_of(post("/v1/completions", body))]
    token_ids = [token for chunk in chunks for token in chunk["token_ids"]]
    assert token_ids == TEXT_IDS[: len(token_ids)]
    assert "text" in TOKENIZER.decode(token_ids) and "text" not in "".join(chunk["text"] for chunk in chunks)


def test_log_probabilities_of_a_completion() -> None:
    body = {"prompt": "x", "max_tokens": 5, "logprobs": 2}
    found = post("/v1/completions", body).json()["choices"][0]["logprobs"]
    tokens = [TOKENIZER.decode([token_id]) for token_id in TEXT_IDS[:5]]
    assert found["tokens"] == tokens
    assert found["token_logprobs"] == [-0.5] * 5
    assert found["text_offset"] == [len("".join(tokens[:position])) for position in range(5)]
    assert all(len(top) == 2 for top in found["top_logprobs"])
    streamed = [
        event["choices"][0]["logprobs"] for event in events_of(post("/v1/completions", body | {"stream": True}))
    ]
    for name in found:
        assert [each for chunk in streamed for each in chunk[name]] == found[name]


def test_log_probabilities_of_a_chat() -> None:
    body = CHAT | {"max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    content = post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert [bytes(each["bytes"]).decode() for each in content] == [each["token"] for each in content]
    assert [len(each["top_logprobs"]) for each in content] == [2, 2, 2]


def test_sampling_parameters_reach_the_engine() -> None:
    client = FakeEngineClient()
    body = {
        "prompt": "x",
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "seed": -5,
        "stop": "END",
        "stop_token_ids": [9],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "logit_bias": {"5": 1, "07": -100.0},
        "priority": -3,
        "user": "somebody",
        "logprobs": None,
        "suffix": None,
        "tools": [],
    }
    assert post("/v1/completions", body, client).status_code == 200
    [request] = client.requests
    sampling = request.sampling
    assert request.priority == -3
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, None, 0.1)
    assert (sampling.seed, sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (-5, ("END",), (9,), True)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (sampling.min_tokens, sampling.logit_bias) == (2, ((5, 1.0), (7, -100.0)))


@pytest.mark.parametrize(
    ("extra", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}, "json_schema", "{}"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
    ],
)
def test_formats_are_grammars_of_the_engine(extra: dict[str, Any], kind: str, text: str) -> None:
    client = FakeEngineClient()
    assert post("/v1/chat/completions", CHAT | extra, client).status_code == 200
    grammar = client.requests[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.text) == (kind, text)


def test_a_grammar_that_the_engine_refuses_is_the_clients_fault() -> None:
    body = CHAT | {"structured_outputs": {"regex": "("}}
    answer = post("/v1/chat/completions", body, FakeEngineClient(fails_after=0))
    assert answer.status_code == 400


DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"7", 400, None),
        (b"", 400, None),
        (b'{"prompt": "\xff"}', 400, None),
        (DEEP, 400, None),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", 400, None),
        (b'{"prompt": "x", "seed": 1' + b"0" * 50 + b"}", 400, "seed"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": "x", "\\ud800": 1}', 400, None),
        (b'{"prompt": "\\ud800"}', 400, None),
        (b'{"prompt": "x", "stop": "\\ud800\\ud800"}', 400, None),
        ({}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"prompt": [99999]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt"),
        ({"prompt": "word " * 300}, 400, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": 256}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
        ({"prompt": "x", "max_token": 5}, 400, "max_token"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"prompt": "x", "n": 129}, 400, "n"),
        ({"prompt": "x", "n": True}, 400, "n"),
        ({"prompt": "x", "stop": [""]}, 400, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
        ({"prompt": "x", "echo": 1}, 400, "echo"),
        ({"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ({"prompt": "x", "best_of": 3}, 400, "best_of"),
        ({"prompt": "x", "stop_token_ids": [99999]}, 400, "stop_token_ids"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"-5": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"five": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": "1"}}, 400, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": 1, "05": 1}}, 400, None),
        ({"prompt": "x", "max_tokens": 5, "min_tokens": 6}, 400, None),
        ({"prompt": "x", "stream_options": {"x": 1}}, 400, "stream_options"),
        ({"prompt": "x", "stream_options": {"continuous_usage_stats": True}}, 400, "stream_options"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "response_format"),
        ({"prompt": "x", "structured_outputs": {}}, 400, "structured_outputs"),
        ({"prompt": "x", "structured_outputs": {"regex": ""}}, 400, None),
        ({"prompt": "x", "model": "other"}, 404, "model"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_bad_input_is_answered_with_the_fields_name(body: Any, status: int, param: str | None, is_stream: bool) -> None:
    if is_stream and isinstance(body, dict):
        body = body | {"stream": True}
    answer = post("/v1/completions", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert error["code"]


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.x+json", 200),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("json", 400),
        (None, 400),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_must_be_sent_as_json(path: str, content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    service = make_service(FakeEngineClient())
    answer = served(service, lambda http: http.post(path, content=b'{"prompt": "x"}', headers=headers))
    assert answer.status_code == status
    assert status == 200 or "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([{"role": "user"}], "messages"),
        ([{"role": "king", "content": "x"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ([{"role": "tool", "content": "x"}], "messages"),  # the template refuses it
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "messages"),
    ],
)
def test_bad_messages_are_refused(messages: Any, param: str) -> None:
    answer = post("/v1/chat/completions", {"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_answer_replayed_as_a_message_is_taken() -> None:
    """As the openai client dumps it, with its nulls."""
    replayed = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None}
    body = {"messages": [*CHAT["messages"], replayed, *CHAT["messages"]], "max_tokens": 1}
    assert post("/v1/chat/completions", body).status_code == 200


def test_chat_without_a_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    answer = post("/v1/chat/completions", CHAT)
    assert answer.status_code == 400
    assert "/v1/completions" in answer.json()["error"]["message"]


def test_a_failure_before_the_first_token_is_a_status_and_later_an_event() -> None:
    body = {"prompt": "x", "stream": True}
    assert post("/v1/completions", body, FakeEngineClient(fails_after=0)).status_code == 500
    assert post("/v1/completions", body, FakeEngineClient(fails_after=0, dies=True)).status_code == 503
    late = post("/v1/completions", body, FakeEngineClient(fails_after=3, dies=True))
    assert late.status_code == 200
    *_, last = [line for line in late.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert post("/v1/completions", {"prompt": "x"}, FakeEngineClient(fails_after=3)).status_code == 500


def test_nothing_is_taken_while_the_engine_restarts() -> None:
    client = FakeEngineClient()
    client.is_ready = False
    answer = post("/v1/completions", {"prompt": "x"}, client)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/tokenize")])
def test_what_depends_on_the_model_waits_until_it_is_loaded(method: str, path: str) -> None:
    client = FakeEngineClient()
    client.is_ready = False
    del client.facts
    service = make_service(client)
    body = {"prompt": "x"} if method == "POST" else None
    answer = served(service, lambda http: http.request(method, path, json=body))
    assert answer.status_code == 503
    assert served(service, lambda http: http.get("/health")).status_code == 200
    assert served(service, lambda http: http.get("/metrics")).status_code == 200


def test_tokenize_and_detokenize() -> None:
    tokens = post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
    assert tokens["tokens"] == TOKENIZER.encode(TEXT)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 256
    assert post("/detokenize", {"tokens": TEXT_IDS}).json() == {"prompt": TEXT}
    chat = post("/tokenize", CHAT).json()["tokens"]
    assert chat == TOKENIZER.apply_chat_template(CHAT["messages"], add_generation_prompt=True)["input_ids"]
    assert post("/tokenize", {"prompt": "x", **CHAT}).status_code == 400
    assert post("/detokenize", {"tokens": [10**6]}).json()["error"]["param"] == "tokens"


def test_models_are_listed_and_found() -> None:
    service = make_service(FakeEngineClient())
    listed = served(service, lambda http: http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert served(service, lambda http: http.get("/v1/models/tiny")).json() == listed["data"][0]
    assert served(service, lambda http: http.get("/v1/models/x")).json()["error"]["code"] == "model_not_found"


def test_a_path_that_is_none_is_an_error_in_openais_form() -> None:
    service = make_service(FakeEngineClient())
    assert served(service, lambda http: http.get("/v1/nothing")).json()["error"]["code"] == "not_found"
    assert served(service, lambda http: http.get("/v1/completions")).status_code == 405
    assert service.metrics.errors == {"not_found": 1, "method_not_allowed": 1}
