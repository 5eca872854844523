import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hasten.errors import RequestError, TokenizerError
from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.fake import FakeRuntime
from hasten.runtimes.process import RuntimeProcess
from hasten.runtimes.text import Detokenizer, StopMatcher, complete, load_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZER = byte_tokenizer()
SHIPPED = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"


@given(st.text(max_size=60))
def test_detokenizer_never_emits_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in TOKENIZER.encode(text)]
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.lists(st.integers(0, 255), max_size=60))
def test_detokenizer_ends_with_the_tokenizers_own_text(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    text = "".join(detokenizer.add(token) for token in token_ids) + detokenizer.flush()
    assert text == TOKENIZER.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_detokenizer_drops_special_tokens() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    tokens = [*TOKENIZER.encode("ab"), TOKENIZER.eos_token_id, *TOKENIZER.encode("c")]
    assert "".join(detokenizer.add(token) for token in tokens) == "abc"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_matcher_cuts_before_the_stop_string_that_is_complete_first(text: str, stop: list[str]) -> None:
    ends = ((end, end - len(each)) for end in range(len(text) + 1) for each in stop if text[:end].endswith(each))
    first = min(ends, default=None)
    for size in (1, 3, 12):
        matcher = StopMatcher(stop)
        pieces = [matcher.add(text[start : start + size]) for start in range(0, len(text), size)]
        assert "".join(pieces) + matcher.flush() == (text if first is None else text[: first[1]])
        assert matcher.is_stopped == (first is not None)


def test_stop_matcher_holds_back_only_a_possible_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.add(piece) for piece in ("xE", "N", "x", "E")] == ["x", "", "ENx", ""]
    assert matcher.flush() == "E"


def test_completions_come_in_the_order_of_the_requests_with_streamed_text() -> None:
    runtime = FakeRuntime(RuntimeConfig(Path("unused"), "fp32"))
    requests = [Request(name, (ord(name),), SamplingParams(max_tokens=20)) for name in "zab"]
    streamed: dict[str, str] = {}

    def on_text(request_id: str, index: int, piece: str) -> None:
        streamed[request_id] = streamed.get(request_id, "") + piece

    completions = complete(runtime, requests, TOKENIZER, on_text)
    assert [each.request_id for each in completions] == ["z", "a", "b"]
    assert all(len(each.token_ids) == 20 and each.finish_reason == "length" for each in completions)
    assert {each.request_id: each.text for each in completions} == streamed


def test_a_stop_string_ends_the_request_and_is_not_in_the_text() -> None:
    runtime = FakeRuntime(RuntimeConfig(Path("unused"), "fp32"))
    plain = complete(runtime, [Request("r", (1,), SamplingParams(max_tokens=40))], TOKENIZER)[0]
    stop = next(plain.text[at : at + 2] for at in range(8, 30) if plain.text[at : at + 2].isascii())
    request = Request("r", (1,), SamplingParams(max_tokens=40, stop=(stop,)))
    stopped = complete(runtime, [request], TOKENIZER)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert len(stopped.token_ids) < 40


def test_completes_through_a_process_and_cancels_there() -> None:
    runtime = FakeRuntime(RuntimeConfig(Path("unused"), "fp32"))
    text = complete(runtime, [Request("r", (1,), SamplingParams(max_tokens=40))], TOKENIZER)[0].text
    stop = next(text[at : at + 2] for at in range(8, 30) if text[at : at + 2].isascii())
    endless = Request("r", (1,), SamplingParams(max_tokens=10**9, stop=(stop,), ignore_eos=True))
    with RuntimeProcess("fake", RuntimeConfig(Path("unused"), "fp32", max_model_tokens=10**9)) as process:
        (completion,) = complete(process, [endless], TOKENIZER)
    assert (completion.finish_reason, completion.text) == ("stop", text[: text.index(stop)])


def test_one_stopped_continuation_leaves_its_siblings_running() -> None:
    runtime = FakeRuntime(RuntimeConfig(Path("unused"), "fp32"))
    completions = complete(runtime, [Request("r", (1,), SamplingParams(max_tokens=5, n=3))], TOKENIZER)
    assert [(each.index, len(each.token_ids)) for each in completions] == [(0, 5), (1, 5), (2, 5)]


def test_a_stop_token_is_no_text() -> None:
    runtime = FakeRuntime(RuntimeConfig(Path("unused"), "fp32"))
    third = complete(runtime, [Request("r", (1,), SamplingParams(max_tokens=3))], TOKENIZER)[0].token_ids[2]
    sampling = SamplingParams(max_tokens=9, stop_token_ids=(third,))
    completion = complete(runtime, [Request("r", (1,), sampling)], TOKENIZER)[0]
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == third
    assert completion.text == TOKENIZER.decode(completion.token_ids[:-1])


def test_a_refused_request_completes_with_its_error() -> None:
    runtime = FakeRuntime(RuntimeConfig(Path("unused"), "fp32", max_model_tokens=4))
    long, short = complete(runtime, [Request("long", (1,) * 9), Request("short", (1,))], TOKENIZER)
    assert long.finish_reason == "error"
    assert long.error is not None
    assert "9 tokens" in long.error
    assert short.finish_reason == "length"


def test_requests_with_the_same_id_are_refused() -> None:
    runtime = FakeRuntime(RuntimeConfig(Path("unused"), "fp32"))
    with pytest.raises(RequestError, match="same id"):
        complete(runtime, [Request("r", (1,)), Request("r", (2,))], TOKENIZER)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("añ") == TOKENIZER.encode("añ")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "PreTrainedTokenizerFast", "LlamaTokenizer", None])
def test_a_tokenizer_is_the_one_that_transformers_chooses(
    tmp_path: Path, model_type: str, tokenizer_class: str | None
) -> None:
    config = json.loads((SHIPPED / "tokenizer_config.json").read_bytes()) | {"tokenizer_class": tokenizer_class}
    (tmp_path / "tokenizer.json").write_bytes((SHIPPED / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    text = "def add(a, b):\n    return a + b  # añ <|user|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
