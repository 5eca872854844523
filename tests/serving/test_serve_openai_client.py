"""The official openai client, unchanged, against the real server on the model that ships."""

import asyncio
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from serve_process import MODEL, ServeProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.pipeline.config import GenerateConfig
from hasten.pipeline.generate import generate

MESSAGES: Any = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
GREEDY: Any = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(server: ServeProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-llama"]
    assert client.models.retrieve("tiny-llama").owned_by == "hasten"


def test_completion_is_what_generate_prints(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny-llama", prompt="The model", **GREEDY)
    [expected] = generate(
        GenerateConfig(model=str(MODEL), prompt="The model", max_tokens=24, scheme="fp32", device="cpu")
    )
    assert answer.choices[0].text == expected.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_chat_stream_is_the_chat_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny-llama", messages=MESSAGES, **GREEDY)
    stream = client.chat.completions.create(
        model="tiny-llama", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    first, again = answer.usage, chunks[-1].usage
    assert first is not None and again is not None
    assert (again.prompt_tokens, again.completion_tokens) == (first.prompt_tokens, first.completion_tokens)


def test_usage_says_what_the_prefix_cache_had(client: OpenAI) -> None:
    prompt = list(range(500, 541))
    cached = []
    for _ in range(2):
        usage = client.completions.create(model="tiny-llama", prompt=prompt, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 32]  # whole blocks of 16, and never the last token


def test_n_seed_and_stop(client: OpenAI) -> None:
    options: Any = {"model": "tiny-llama", "messages": MESSAGES, "n": 3, "seed": 7, "max_completion_tokens": 12}
    first, again = (client.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    whole = client.completions.create(model="tiny-llama", prompt="The", **GREEDY).choices[0].text
    stop = whole[10:14]
    stopped = client.completions.create(model="tiny-llama", prompt="The", stop=[stop, "zzz"], **GREEDY).choices[0]
    assert stopped.text == whole.partition(stop)[0]
    assert stopped.finish_reason == "stop"


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-llama", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert answer.usage is not None
    assert len(content) == answer.usage.completion_tokens
    for each in content:
        assert each.logprob <= 0
        assert each.top_logprobs[0].token == each.token  # greedy takes the most probable
        assert len(each.top_logprobs) == 3
    completion = client.completions.create(model="tiny-llama", prompt="The", logprobs=2, **GREEDY)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text


def test_logit_bias_and_min_tokens(client: OpenAI) -> None:
    def token_ids(logit_bias: dict[str, int], **extra: Any) -> list[int]:
        answer = client.completions.create(
            model="tiny-llama",
            prompt="The",
            logit_bias=logit_bias,
            extra_body={"return_token_ids": True, **extra},
            **GREEDY,
        )
        return answer.choices[0].token_ids  # type: ignore[attr-defined,no-any-return]

    first = token_ids({})[0]
    assert token_ids({str(first): 100}) == [first] * GREEDY["max_tokens"]
    assert first not in token_ids({str(first): -100})
    assert token_ids({}, stop_token_ids=[first]) == [first]
    late = token_ids({}, stop_token_ids=[first], min_tokens=8)
    assert len(late) > 8
    assert first not in late[:8]
    with pytest.raises(openai.BadRequestError, match="logit_bias: token ids must be between 0 and 4095"):
        token_ids({"999999": 1})


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_echoed_prompt_has_the_logprobs_of_transformers(client: OpenAI, *, is_stream: bool) -> None:
    """As evaluation harnesses ask for the likelihood of a text."""
    text = "The model is loaded from a file.\n\nimport os\n" * 12
    answer: Any = client.completions.create(
        model="tiny-llama", prompt=text, max_tokens=2, temperature=0, echo=True, logprobs=1, stream=is_stream
    )
    choices = [chunk.choices[0] for chunk in answer] if is_stream else [answer.choices[0]]
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    logprobs, top = (
        [each for one in found for each in getattr(one, name)] for name in ("token_logprobs", "top_logprobs")
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    token_ids = tokenizer.encode(text)
    assert len(token_ids) > 128
    assert "".join(choice.text for choice in choices).startswith(text)
    assert logprobs[0] is None and top[0] is None
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        expected = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    targets = torch.tensor(token_ids[1:])
    likelihoods = expected[:-1].gather(1, targets.unsqueeze(1)).squeeze(1)
    assert logprobs[1 : len(token_ids)] == pytest.approx(likelihoods.tolist(), abs=1e-3)
    assert [max(each.values()) for each in top[1 : len(token_ids)]] == pytest.approx(
        expected[:-1].max(-1).values.tolist(), abs=1e-3
    )
    assert len(logprobs) == len(top) == len(token_ids) + 2


def test_several_prompts_and_token_ids(client: OpenAI) -> None:
    prompts = ["The model", "A list"]
    both = client.completions.create(model="tiny-llama", prompt=prompts, **GREEDY)
    alone = [client.completions.create(model="tiny-llama", prompt=prompt, **GREEDY) for prompt in prompts]
    assert [choice.text for choice in both.choices] == [each.choices[0].text for each in alone]
    tokens = [5, 6, 7]
    assert client.completions.create(model="tiny-llama", prompt=tokens, **GREEDY).usage.prompt_tokens == 3  # type: ignore[union-attr]


def test_json_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny-llama",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        max_tokens=64,
        temperature=0,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)


def test_errors_are_the_clients_own_classes(client: OpenAI, server: ServeProcess) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny-llama", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="there is no parameter 'max_token'"):
        client.completions.create(model="tiny-llama", prompt="x", extra_body={"max_token": 3})


def test_async_client_streams_at_the_same_time(server: ServeProcess) -> None:
    async def ask(client: AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="tiny-llama", prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in ("A", "B", "C", "D")))

    assert all(asyncio.run(run()))


def test_50_streams_at_the_same_time_are_each_what_generate_prints(client: OpenAI, tmp_path: Any) -> None:
    """With fewer places than clients, so that requests wait, join and leave while others run."""
    words = (MODEL / "heldout.txt").read_text().split()
    prompts = [" ".join(words[20 * i : 20 * i + 3 + i % 17]) for i in range(50)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    expected = generate(GenerateConfig(model=str(MODEL), file=path, max_tokens=40, scheme="fp32", device="cpu"))

    def ask(prompt: str) -> tuple[str, str | None, int]:
        chunks = list(
            client.completions.create(
                model="tiny-llama",
                prompt=prompt,
                stream=True,
                stream_options={"include_usage": True},
                temperature=0,
                max_tokens=40,
            )
        )
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        [reason] = [each.choices[0].finish_reason for each in chunks if each.choices and each.choices[0].finish_reason]
        assert chunks[-1].usage is not None
        return text, reason, chunks[-1].usage.completion_tokens

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [(each.text, each.finish_reason, len(each.token_ids)) for each in expected]


def test_the_example_that_is_printed_works(server: ServeProcess) -> None:
    position = next(number for number, line in enumerate(server.lines) if line.startswith("try it"))
    run = subprocess.run(server.lines[position + 1], shell=True, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("data: {")
    assert run.stdout.endswith("data: [DONE]\n\n")
