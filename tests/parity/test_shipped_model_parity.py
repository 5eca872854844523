"""The model that ships: the same logits and the same 64 greedy tokens in transformers, native and ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hasten.request import Request, SamplingParams
from hasten.runtimes.base import Runtime, RuntimeConfig
from hasten.runtimes.registry import load_runtime, runtime_class
from hasten.runtimes.text import load_tokenizer

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 48, 64


@pytest.fixture(scope="module")
def text_ids() -> list[int]:
    tokenizer = load_tokenizer(MODEL)
    return tokenizer.encode((MODEL / "heldout.txt").read_text(), add_special_tokens=False)


@pytest.fixture(scope="module")
def baseline() -> Runtime:
    return load_runtime("transformers", RuntimeConfig(MODEL, "fp32"))


@pytest.fixture(scope="module", params=["native", "onnxruntime"])
def candidate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    out = tmp_path_factory.mktemp("parity") / request.param
    artifact = runtime_class(request.param).prepare(MODEL, "fp32", out)
    return load_runtime(request.param, RuntimeConfig(artifact, "fp32"))


def greedy(runtime: Runtime, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [Request(str(index), tuple(prompt), sampling) for index, prompt in enumerate(prompts)]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for event in runtime.generate(requests):
        assert event.error is None
        if event.token_id is not None:
            tokens[event.request_id].append(event.token_id)
    return list(tokens.values())


def test_log_probabilities_equal_transformers(baseline: Runtime, candidate: Runtime, text_ids: list[int]) -> None:
    window = text_ids[:200]
    [expected], [actual] = baseline.score([window]), candidate.score([window])
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_greedy_tokens_equal_transformers_alone_and_together(
    baseline: Runtime, candidate: Runtime, text_ids: list[int]
) -> None:
    distance = len(text_ids) // NUM_PROMPTS
    prompts = [text_ids[index * distance :][:PROMPT_TOKENS] for index in range(NUM_PROMPTS)]
    alone = [greedy(baseline, [prompt])[0] for prompt in prompts]
    assert all(len(tokens) == NEW_TOKENS for tokens in alone)
    assert [greedy(candidate, [prompt])[0] for prompt in prompts] == alone
    assert greedy(candidate, prompts) == alone
