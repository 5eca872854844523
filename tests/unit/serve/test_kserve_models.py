"""What the two models of the Open Inference Protocol take and give, where they generate."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
from fake_engine import TOKENIZER, FakeEngineClient, make_service

from hasten.errors import RequestError
from hasten.request import SamplingParams
from hasten.serve.kserve_generation import GenerationAnswer, generating_models
from hasten.serve.kserve_models import KServeModel, Outputs
from hasten.serve.kserve_tensors import Tensor
from hasten.serve.openai_errors import ApiException
from hasten.serve.pieces import Piece

PROMPT = Tensor("text_input", "BYTES", (1,), ["Hi"])


def model(name: str = "tiny") -> KServeModel[Any]:
    return generating_models(make_service(FakeEngineClient())).find(name)


def outputs(pieces: Sequence[Piece], name: str = "tiny", **values: Any) -> Outputs:
    async def run() -> Outputs:
        asked = model(name)
        async with aclosing(await asked.open(asked.read_values(values), is_stream=False)) as answer:
            assert isinstance(answer, GenerationAnswer)
            return answer.outputs(pieces)

    return asyncio.run(run())


def test_there_is_a_model_of_text_and_one_of_tokens() -> None:
    models = generating_models(make_service(FakeEngineClient()))
    assert [each["name"] for each in models.index()] == ["tiny", "tiny_tokens"]
    assert models.find("tiny", "1") is models.find("tiny")
    for name, version in (("other", ""), ("tiny", "2"), ("tiny", "one"), ("", "")):
        with pytest.raises(ApiException, match="there is no model"):
            models.find(name, version)


@pytest.mark.parametrize(
    ("name", "prompt", "output"), [("tiny", "text_input", "text_output"), ("tiny_tokens", "input_ids", "output_ids")]
)
def test_metadata_and_config_say_the_same(name: str, prompt: str, output: str) -> None:
    metadata, config = model(name).metadata(), model(name).config()
    assert metadata["inputs"][0]["name"] == prompt
    assert metadata["outputs"][0]["name"] == output
    assert [each["name"] for each in metadata["inputs"]] == [each["name"] for each in config["input"]]
    assert [each["name"] for each in config["input"] if not each["optional"]] == [prompt]
    assert ("stop_words" in [each["name"] for each in metadata["inputs"]]) == (name == "tiny")
    assert config["model_transaction_policy"] == {"decoupled": True}


def test_a_value_may_come_as_a_tensor_a_parameter_or_in_sampling_parameters() -> None:
    told = [
        model().read([PROMPT, Tensor("temperature", "FP32", (1, 1), [0.5])], {}),
        model().read([PROMPT], {"temperature": 0.5}),
        model().read([PROMPT], {"sampling_parameters": '{"temperature": "0.5"}'}),
        model().read([PROMPT, Tensor("sampling_parameters", "BYTES", (1,), ['{"temperature": 0.5}'])], {}),
        model().read_values({"text_input": "Hi"}, {"temperature": "0.5"}),
    ]
    assert {each.temperature for each in told} == {0.5}
    assert {each.prompt for each in told} == {"Hi"}


def test_all_sampling_inputs_reach_the_engine() -> None:
    values: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 5,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "min_tokens": 4,
    }
    told = model().read_values({"text_input": "Hi", "stop_words": ["a", "b"]}, values)
    expected = SamplingParams(**(values | {"stop": ("a", "b"), "stop_token_ids": (3,), "max_tokens": 9}))
    assert told.sampling(9) == expected
    assert model().read_values({"text_input": "Hi"}).sampling(128) == SamplingParams()


def test_names_of_tritons_other_models_are_known() -> None:
    told = model().read_values(
        {"text_input": "Hi", "stop": "a", "random_seed": 3, "request_output_len": 4, "min_length": 2}
    )
    assert (told.sampling(4).stop, told.seed, told.max_tokens, told.min_tokens) == (("a",), 3, 4, 2)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (Tensor("max_tokens", "FP32", (1,), [3.0]), "max_tokens is FP32 and must be INT32 or INT64"),
        (Tensor("temperature", "INT32", (1,), [1]), "must be FP32 or FP64"),
        (Tensor("max_tokens", "INT32", (2,), [3, 4]), r"has the shape \[2\], not \[1\]"),
        (Tensor("max_tokens", "INT32", (0,), []), r"has the shape \[0\]"),
        (Tensor("stop_words", "BYTES", (2, 1), ["a", "b"]), r"has the shape \[2, 1\], not \[-1\]"),
        (Tensor("max_token", "INT32", (1,), [3]), "no input 'max_token': did you mean max_tokens"),
        (Tensor("text_input", "BYTES", (1,), ["again"]), "text_input is given twice"),
        (Tensor("temperature", "FP32", (1,), [float("nan")]), "temperature: Input should be a finite number"),
        (Tensor("top_p", "FP32", (1,), [1.5]), "top_p: Input should be less than or equal to 1"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said(tensor: Tensor, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        model().read([PROMPT, tensor], {})


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"max_token": 3}, "no input or parameter 'max_token': did you mean max_tokens"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": "many"}, "max_tokens: "),
        ({"stop": "a", "stop_words": "b"}, "stop_words is given twice"),
        ({"exclude_input_in_output": False}, "exclude_input_in_output must be true"),
        ({"sampling_parameters": "{"}, "sampling_parameters is no JSON"),
        ({"sampling_parameters": "[1]"}, "sampling_parameters must be a JSON object"),
        ({"sampling_parameters": "[" * 100_000}, "sampling_parameters is no JSON"),
        ({"sampling_parameters": 3}, "sampling_parameters is no JSON"),
        ({"timeout": -1}, "timeout: "),
        ({"sequence_id": 5}, "no input or parameter 'sequence_id'"),
    ],
)
def test_what_is_wrong_with_a_parameter_is_said(parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        model().read([PROMPT], parameters)


def test_a_missing_prompt_is_said() -> None:
    with pytest.raises(RequestError, match="text_input: Field required"):
        model().read([], {})
    with pytest.raises(RequestError, match="input_ids"):
        model("tiny_tokens").read_values({"input_ids": [1, True]})


def test_token_ids_are_taken_with_and_without_a_leading_dimension() -> None:
    for shape in ((3,), (1, 3)):
        for datatype in ("INT32", "INT64"):
            told = model("tiny_tokens").read([Tensor("input_ids", datatype, shape, [5, 6, 7])], {})
            assert told.prompt == [5, 6, 7]


def test_the_last_pieces_have_the_finish_reason() -> None:
    pieces = [Piece(0, "a", (1, 2)), Piece(0, "b", (3,))]
    assert outputs(pieces, text_input="Hi") == {"text_output": ["ab"]}
    last = [Piece(0, "c", (4,), finish_reason="stop")]
    assert outputs(last, text_input="Hi") == {"text_output": ["c"], "finish_reason": ["stop"]}
    assert outputs(pieces, "tiny_tokens", input_ids=[5]) == {"output_ids": [1, 2, 3]}


def test_tokens_are_counted_for_who_asks() -> None:
    pieces = [Piece(0, "a", (1, 2)), Piece(0, "b", (3,))]
    counted = outputs(pieces, text_input="Hi", return_num_output_tokens=True, return_num_input_tokens="true")
    num_input_tokens = len(TOKENIZER.encode("Hi"))
    assert counted == {"text_output": ["ab"], "num_input_tokens": [num_input_tokens], "num_output_tokens": [3]}
    assert outputs(pieces[:1], text_input="Hi", return_num_output_tokens=True)["num_output_tokens"] == [2]
