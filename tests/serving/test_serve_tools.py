"""Tools with the official openai client, against the real server; grammars make the shipped model call them."""

import json
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field
from serve_process import MODEL, ServeProcess

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}<|assistant|>"
)
MESSAGES: Any = [{"role": "user", "content": "How warm is it?"}]
OPTIONS: Any = {"model": "told-of-tools", "messages": MESSAGES, "max_tokens": 200, "temperature": 0}


class Weather(BaseModel):
    """Says how warm it is."""

    city: Literal["Bern", "Oslo"]
    days: int = Field(ge=1, le=9)


class Clock(BaseModel):
    """Says how late it is."""

    is_short: bool


TOOLS: Any = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
KINDS: dict[str, type[BaseModel]] = {"Weather": Weather, "Clock": Clock}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    model = tmp_path_factory.mktemp("tools") / "told-of-tools"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    server = ServeProcess("--scheme", "fp32", model=model).wait_until_ready()
    yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    server.close()


def checked(call: Any) -> BaseModel:
    assert call.id.startswith("call_")
    return KINDS[call.function.name].model_validate_json(call.function.arguments, strict=True)


@pytest.mark.parametrize("seed", range(3))
def test_a_tool_that_must_be_called_is_called(client: OpenAI, seed: int) -> None:
    options = OPTIONS | {"temperature": 1.0, "seed": seed, "parallel_tool_calls": False}
    [choice] = client.chat.completions.create(tools=TOOLS, tool_choice="required", **options).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert checked(call)


def test_a_stream_has_the_calls_of_the_answer(client: OpenAI) -> None:
    chosen: Any = {"type": "function", "function": {"name": "Weather"}}
    options = OPTIONS | {"tools": TOOLS, "tool_choice": chosen}
    [choice] = client.chat.completions.create(**options).choices
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    weather = checked(call)
    assert isinstance(weather, Weather)
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion()
    [streamed] = final.choices[0].message.tool_calls or []
    assert streamed.function.parsed_arguments == weather


def test_the_answer_of_a_tool_goes_back_to_the_model(client: OpenAI) -> None:
    options = OPTIONS | {"tools": TOOLS, "parallel_tool_calls": False}
    first = client.chat.completions.create(**options | {"tool_choice": "required"})
    message = first.choices[0].message
    assert message.tool_calls is not None
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": json.dumps({"degrees": 21})}
    again = client.chat.completions.create(**options | {"messages": [*MESSAGES, message, answer], "max_tokens": 8})
    assert first.usage is not None and again.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens
    assert again.choices[0].message.content


def test_a_model_that_is_not_told_of_tools_says_so(server: ServeProcess) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="chat template does not tell it of tools"):
        client.chat.completions.create(**OPTIONS | {"model": "tiny-llama"}, tools=TOOLS)
