"""Tools in /v1/chat/completions, on an engine that writes what a test says."""

import json
from typing import Any

import pytest
from fake_engine import TOKENIZER, FakeEngineClient
from test_openai_api import events_of, post

EOS = 3
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
    "{{ message.tool_call_id or '' }}\n{% endfor %}"
)
PARAMETERS = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
ADD: Any = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}
NOW: Any = {"type": "function", "function": {"name": "now", "strict": True}}
CHAT: Any = {"messages": [{"role": "user", "content": "Hi"}], "tools": [ADD, NOW]}
NAMED = {"tool_choice": {"type": "function", "function": {"name": "add"}}}


@pytest.fixture(autouse=True)
def _template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)


def writes(text: str) -> FakeEngineClient:
    script = [*TOKENIZER.encode(text, add_special_tokens=False), EOS]
    return FakeEngineClient(script=script, max_model_tokens=2048)


def answered(body: Any, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice of a whole answer, and the one that the chunks of a stream add up to."""
    whole = post("/v1/chat/completions", body, writes(text))
    assert whole.status_code == 200, whole.text
    added: dict[str, Any] = {"content": "", "tool_calls": []}
    for event in events_of(post("/v1/chat/completions", body | {"stream": True}, writes(text))):
        [choice] = event["choices"]
        added["content"] += choice["delta"].get("content") or ""
        added["tool_calls"] += choice["delta"].get("tool_calls", [])
        added["finish_reason"] = choice["finish_reason"]
    [choice] = whole.json()["choices"]
    return choice, added


def called(calls: list[Any]) -> list[Any]:
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    return [[call["function"]["name"], json.loads(call["function"]["arguments"])] for call in calls]


def test_a_call_between_text_and_tags() -> None:
    text = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    choice, added = answered(CHAT, text)
    assert choice["finish_reason"] == added["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == added["content"].strip() == "I add."
    assert called(choice["message"]["tool_calls"]) == called(added["tool_calls"]) == [["add", {"a": 1}]]
    assert [call["index"] for call in added["tool_calls"]] == [0]


@pytest.mark.parametrize("is_parallel", [True, False])
def test_calls_alone_are_the_whole_answer(is_parallel: bool) -> None:
    text = '[{"name": "add", "parameters": {"a": 1}}, {"name": "now", "parameters": {}}]'
    choice, added = answered(CHAT | {"parallel_tool_calls": is_parallel}, text)
    assert choice["message"]["content"] is None
    assert added["content"] == ""
    expected = [["add", {"a": 1}], ["now", {}]][: 2 if is_parallel else 1]
    assert called(choice["message"]["tool_calls"]) == called(added["tool_calls"]) == expected


def test_an_answer_without_calls_is_text() -> None:
    choice, added = answered(CHAT, '{"name": "other", "arguments": {}} is no tool')
    assert choice["finish_reason"] == added["finish_reason"] == "stop"
    assert choice["message"]["content"] == added["content"] == '{"name": "other", "arguments": {}} is no tool'
    assert "tool_calls" not in choice["message"]
    assert added["tool_calls"] == []


def test_a_named_tool_gets_what_is_written_as_its_arguments() -> None:
    choice, added = answered(CHAT | NAMED, '{"a": 7}')
    assert choice["finish_reason"] == added["finish_reason"] == "stop"  # as OpenAI has it
    assert called(choice["message"]["tool_calls"]) == called(added["tool_calls"]) == [["add", {"a": 7}]]


def test_what_must_be_called_is_a_grammar() -> None:
    def grammar(extra: Any) -> Any:
        client = writes("x")
        assert post("/v1/chat/completions", CHAT | extra, client).status_code == 200
        return client.requests[0].sampling.grammar

    assert grammar({}) is None
    assert grammar({"tool_choice": "none"}) is None
    assert (grammar(NAMED).kind, json.loads(grammar(NAMED).text)) == ("json_schema", PARAMETERS)
    lark = grammar({"tool_choice": "required"}).text.splitlines()
    assert lark[0] == 'start: "[" call (", " call)* "]"'
    assert lark[2:4] == [
        r'call0: "{\"name\": \"add\", \"arguments\": " arguments0 "}"',
        f"arguments0: %json {json.dumps(PARAMETERS)}",
    ]
    assert grammar({"tool_choice": "required", "parallel_tool_calls": False}).text.startswith('start: "[" call "]"\n')


def test_the_template_gets_tools_calls_and_their_answers() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 5}'}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
    ]
    client = writes("x")
    assert post("/v1/chat/completions", CHAT | {"messages": messages}, client).status_code == 200
    told = TOKENIZER.decode(client.requests[0].prompt_token_ids)
    add, end = json.JSONDecoder().raw_decode(told)
    now, end = json.JSONDecoder().raw_decode(told, end)
    assert add == ADD
    assert now == {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    assert told[end:] == "user: Hi\nassistant: add(5)\ntool: 5c1\n"
    client = writes("x")
    assert post("/v1/chat/completions", CHAT | {"tool_choice": "none"}, client).status_code == 200
    assert TOKENIZER.decode(client.requests[0].prompt_token_ids) == "user: Hi\n"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [{"type": "search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"structured_outputs": {"regex": "a"}}, "tools"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {}}]}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]}
                ]
            },
            "messages",
        ),
    ],
)
def test_what_cannot_be_is_refused(extra: Any, param: str) -> None:
    answer = post("/v1/chat/completions", CHAT | extra)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_template_without_tools_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ messages[0].content }}")
    answer = post("/v1/chat/completions", CHAT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert post("/v1/chat/completions", CHAT | {"tool_choice": "none"}).status_code == 200


def test_variables_of_the_template_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE + "{{ 'I think' if enable_thinking else 'No' }}")

    def told(options: Any) -> str:
        body = CHAT | {"tool_choice": "none", "chat_template_kwargs": options}
        client = writes("x")
        assert post("/v1/chat/completions", body, client).status_code == 200
        text: str = TOKENIZER.decode(client.requests[0].prompt_token_ids)
        del body["tools"], body["tool_choice"]
        assert tuple(post("/tokenize", body).json()["tokens"]) == client.requests[0].prompt_token_ids
        return text

    assert told({"enable_thinking": True}) == "user: Hi\nI think"
    assert told({"enable_thinking": False}) == told({}) == "user: Hi\nNo"
    for name in ("thinking", "messages", "tools", "tokenize", "chat_template", "bos_token", "", "a b"):
        answer = post("/v1/chat/completions", CHAT | {"chat_template_kwargs": {name: "x"}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_tokenize_counts_tools() -> None:
    counts = [
        post("/tokenize", {"messages": CHAT["messages"], "tools": tools}).json()["count"] for tools in ([], [ADD])
    ]
    assert counts[0] < counts[1]
    assert post("/tokenize", {"prompt": "x", "tools": [ADD]}).status_code == 400
