"""From bytes with times to tokens with times: events, chunks, answers, records."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.bench.endpoints import KServeEndpoint, OnlineRequest, OpenAIEndpoint, error_text
from hasten.bench.http_stream import Address, Exchange
from hasten.bench.load_client import make_record
from hasten.bench.sse import timed_events
from hasten.bench.token_times import Chunk, token_times_s
from hasten.errors import UsageError

REQUEST = OnlineRequest("r", "a prompt", 2, 3)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8), max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.data(),
)
def test_events_are_the_same_wherever_the_bytes_are_cut(texts: list[str], newline: str, data: st.DataObject) -> None:
    blocks = [f": a comment{newline}data: {text}{newline}{newline}".encode() for text in texts]
    whole = b"".join(blocks)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    bounds = [0, *cuts, len(whole)]
    parts = [whole[start:end] for start, end in pairwise(bounds)]
    events = list(timed_events([float(index) for index in range(len(parts))], parts))
    assert [event.decode() for _, event in events] == [text.lstrip(" ") for text in texts]
    end = 0
    for (time_s, _), block in zip(events, blocks, strict=True):
        end += len(block)
        read_up_to = bounds[int(time_s) + 1]
        assert read_up_to >= end, "an event is not known before its last byte was read"
        assert bounds[int(time_s)] < end, "and it is known with it"


def test_data_without_a_space_several_lines_and_an_unfinished_event() -> None:
    assert [data for _, data in timed_events([1.0], [b"data:x\n\nevent: e\n\ndata: y\ndata: z\n\ndata: cut"])] == [
        b"x",
        b"y\nz",
    ]


def test_what_the_server_counts_beside_the_text_is_taken_as_it_is() -> None:
    chunks = [Chunk(1.0, 5, 1), Chunk(2.0, 5, 3)]
    assert token_times_s(chunks, 4) == token_times_s(chunks, None) == (1.0, 2.0, 2.0, 2.0)


def test_a_count_at_the_end_is_spread_by_characters() -> None:
    assert token_times_s([Chunk(1.0, 10), Chunk(2.0, 30)], 6) == (1.0, 1.0, 2.0, 2.0, 2.0, 2.0)


def test_ids_that_do_not_add_up_to_the_usage_are_not_believed() -> None:
    assert token_times_s([Chunk(1.0, 1, 1), Chunk(2.0, 1, 1)], 4) == (1.0, 1.0, 2.0, 2.0)


def test_without_any_count_a_chunk_is_a_token() -> None:
    assert token_times_s([Chunk(1.0, 10), Chunk(2.0, 30)], None) == (1.0, 2.0)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.none() | st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(1, 100),
)
def test_a_spread_keeps_the_number_the_order_and_the_first_token(
    shapes: list[tuple[int, int | None]], num_tokens: int
) -> None:
    chunks = [Chunk(float(index), characters, count) for index, (characters, count) in enumerate(shapes)]
    times = token_times_s(chunks, num_tokens)
    assert len(times) == num_tokens
    assert list(times) == sorted(times)
    if any(count is None for _, count in shapes):
        assert times[0] == 0.0
        assert num_tokens < len(chunks) or set(times) == {chunk.time_s for chunk in chunks}


def stream(*events: object, done: bool = True) -> bytes:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {line}\n\n" for line in (*lines, *(["[DONE]"] if done else []))).encode()


def chunk(text: str, **fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, **fields}]}


def record_of(body: bytes, endpoint: OpenAIEndpoint | KServeEndpoint | None = None, **fields: object) -> tuple:
    exchange = Exchange(1.0, [2.0], [body], 2.0, status=200)
    for name, value in fields.items():
        setattr(exchange, name, value)
    made = make_record(endpoint or OpenAIEndpoint("m"), REQUEST, exchange)
    return len(made.token_times_s), made.num_prompt_tokens, made.finish_reason, made.error


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
CHAT_ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
CHAT_TEXT = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (stream(chunk("a b"), chunk("c", finish_reason="length"), USAGE), (3, 7, "length", None)),
        (stream(chunk("a", token_ids=[1, 2]), chunk("", token_ids=[3])), (3, 2, "length", None)),
        (stream(CHAT_ROLE, CHAT_TEXT), (1, 2, "stop", None)),
        (stream(chunk("a"), done=False), (1, 2, "error", "the stream ended without [DONE]")),
        (stream({"error": {"message": "out of\nblocks"}}), (0, 2, "error", "the server reported: out of blocks")),
        (stream("<html>"), (0, 2, "error", "the server sent an event that is not a chunk of OpenAI's API")),
        (stream(), (0, 2, "error", "the answer has no tokens")),
        (
            stream(chunk("a"), {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}),
            (2, 7, "error", "the answer has another number of tokens than was asked for"),
        ),
    ],
)
def test_what_an_answer_comes_to(body: bytes, expected: tuple) -> None:
    assert record_of(body) == expected


def test_a_short_answer_is_right_where_the_server_does_not_take_ignore_eos() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    body = stream(chunk("a", finish_reason="stop"), usage)
    assert record_of(body, OpenAIEndpoint("m", optional=("stream_options",))) == (2, 7, "stop", None)


def test_a_status_is_the_error_and_what_came_with_it_no_tokens() -> None:
    error = "the server answered 429 Too Many Requests"
    assert record_of(stream(chunk("a")), status=429) == (0, 2, "error", error)


def test_kserve_streams_end_without_a_word() -> None:
    body = stream({"text_output": "a"}, {"text_output": ["b"]}, {"text_output": ""}, done=False)
    assert record_of(body, KServeEndpoint("m")) == (2, 2, "length", None)
    assert record_of(stream({"error": "no"}, done=False), KServeEndpoint("m"))[3] == "the server reported: no"


def test_kserve_answers_say_how_many_tokens_they_have() -> None:
    events = [{"text_output": "", "num_output_tokens": 1}, {"text_output": "ab", "num_output_tokens": [2]}]
    body = stream(*({**event, "num_input_tokens": 7} for event in events), done=False)
    assert record_of(body, KServeEndpoint("m")) == (3, 7, "length", None)


@pytest.mark.parametrize("count", [-1, [], 1 << 40])
def test_a_count_that_cannot_be_is_not_believed(count: object) -> None:
    made = record_of(stream({"text_output": "a", "num_output_tokens": count}, done=False), KServeEndpoint("m"))
    error = None if count == [] else f"the server sent {count} as the number of tokens of one response"
    assert made[3] == error


@pytest.mark.parametrize(
    ("details", "expected"), [({}, None), (None, None), ({"cached_tokens": 5, "audio_tokens": 0}, 5)]
)
def test_a_server_may_tell_what_its_prefix_cache_had(details: object, expected: int | None) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": details}}
    body = stream(chunk("a b"), chunk("c", finish_reason="length"), usage)
    made = make_record(OpenAIEndpoint("m"), REQUEST, Exchange(1.0, [2.0], [body], 2.0, status=200))
    assert (made.error, made.num_cached_tokens) == (None, expected)


@pytest.mark.parametrize("count", [-1, 1 << 40])
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "cached_tokens"])
def test_a_usage_that_cannot_be_is_no_answer(name: str, count: int) -> None:
    is_detail = name == "cached_tokens"
    wrong = {"prompt_tokens_details": {name: count}} if is_detail else {name: count}
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1} | wrong}
    error = "the server sent an event that is not a chunk of OpenAI's API"
    assert record_of(stream(chunk("a"), usage)) == (1, 2, "error", error)


@pytest.mark.parametrize("count", [-1, 1 << 40])
def test_a_prompts_count_that_cannot_be_is_not_believed(count: int) -> None:
    """A regression test: a negative one was written, and the result could not be read again."""
    made = record_of(stream({"text_output": "a", "num_input_tokens": [count]}, done=False), KServeEndpoint("m"))
    assert made == (0, 2, "error", f"the server sent {count} as the number of tokens of a prompt")


def test_bodies_ask_for_exactly_the_tokens() -> None:
    completion = json.loads(OpenAIEndpoint("m").body(REQUEST))
    assert completion["max_tokens"] == 3 and completion["ignore_eos"] and completion["stream"]
    assert completion["stream_options"] == {"include_usage": True}
    chat = json.loads(OpenAIEndpoint("m", is_chat=True, optional=()).body(REQUEST))
    assert chat["messages"] == [{"role": "user", "content": "a prompt"}]
    assert "ignore_eos" not in chat and "stream_options" not in chat
    nested = json.loads(KServeEndpoint("m", is_nested=True).body(REQUEST))
    assert nested["text_input"] == "a prompt" and nested["parameters"]["max_tokens"] == 3
    assert nested["parameters"]["return_num_output_tokens"]
    assert "return_num_output_tokens" not in json.loads(KServeEndpoint("m", is_counted=False).body(REQUEST))


@pytest.mark.parametrize("error", [{"message": "no"}, {"error": {"message": "no"}}, {"detail": "no"}, "no"])
def test_errors_come_in_several_forms(error: object) -> None:
    assert error_text(error) == "no"


def test_addresses() -> None:
    assert Address.from_url("127.0.0.1:8000") == Address("127.0.0.1", 8000)
    assert Address.from_url("https://host/api/v1/") == Address("host", 443, True, "/api")
    assert Address.from_url("http://[::1]:80").netloc == "[::1]:80"
    assert Address.from_url("grpc://h:8001/") == Address("h", 8001, is_grpc=True)
    assert Address.from_url("grpcs://h") == Address("h", 443, True, is_grpc=True)
    request = Address.from_url("http://h:1/x", "secret").post("/v1/completions", b"{}")
    assert request.startswith(b"POST /x/v1/completions HTTP/1.1\r\nhost: h:1\r\n")
    assert b"authorization: Bearer secret\r\n" in request and request.endswith(b"content-length: 2\r\n\r\n{}")
    assert "secret" not in repr(Address.from_url("http://h:1", "secret"))
    for url in ("http://h:1/x", "https://h:1", "grpc://h:1", "grpcs://h:1"):
        assert Address.from_url(url).url == url
    wrong = ("ftp://h", "http://", "http://h:port", "http://user:word@h", "http://h/?key=1", "grpc://", "grpc://h/v2")
    for url in wrong:
        with pytest.raises(UsageError):
            Address.from_url(url)
