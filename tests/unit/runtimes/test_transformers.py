from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from hasten.errors import ModelError, UnsupportedModelError, WeightsError
from hasten.request import Request, SamplingParams, TokenEvent
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.transformers import TransformersRuntime

WriteModel = Callable[..., Path]
PROMPT = (5, 6, 7, 8)


@pytest.fixture
def runtime(write_model: WriteModel) -> Iterator[TransformersRuntime]:
    loaded = TransformersRuntime(RuntimeConfig(write_model(), "fp32", num_threads=1))
    yield loaded
    loaded.close()


def tokens(events: list[TokenEvent], request_id: str = "r") -> list[int | None]:
    return [event.token_id for event in events if event.request_id == request_id]


def test_equals_plain_generate(runtime: TransformersRuntime) -> None:
    expected = runtime._model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)[0, 4:].tolist()
    events = list(runtime.generate([Request("r", PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))]))
    assert tokens(events) == expected


def test_log_probabilities_are_the_models_own(runtime: TransformersRuntime) -> None:
    sampling = SamplingParams(max_tokens=5, temperature=0.7, seed=4, logprobs=3, ignore_eos=True)
    events = list(runtime.generate([Request("r", PROMPT, sampling)]))
    sequence = (*PROMPT, *(event.token_id for event in events))
    (rows,) = runtime.score([sequence])
    for event, row in zip(events, rows[len(PROMPT) - 1 :], strict=False):
        assert event.logprob == pytest.approx(row[event.token_id], abs=1e-4)
        best = np.argsort(-row)[:3].tolist()
        assert [token for token, _ in event.top_logprobs] == best
        assert [value for _, value in event.top_logprobs] == pytest.approx(row[best].tolist(), abs=1e-4)


def test_a_seed_draws_the_same_tokens_alone_and_beside_others(runtime: TransformersRuntime) -> None:
    drawn = Request("r", PROMPT, SamplingParams(max_tokens=12, temperature=1.0, seed=11, ignore_eos=True))
    other = Request("other", PROMPT, SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True))
    alone = tokens(list(runtime.generate([drawn])))
    assert tokens(list(runtime.generate([other, drawn]))) == alone
    greedy = Request("r", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
    assert tokens(list(runtime.generate([greedy]))) != alone


def test_padding_is_not_a_repeated_token(runtime: TransformersRuntime) -> None:
    sampling = SamplingParams(max_tokens=12, repetition_penalty=1.5, ignore_eos=True)
    short, long = Request("r", PROMPT, sampling), Request("long", PROMPT * 3, sampling)
    assert tokens(list(runtime.generate([long, short]))) == tokens(list(runtime.generate([short])))


def test_penalties_that_the_library_lacks_are_refused_alone(runtime: TransformersRuntime) -> None:
    sampling = SamplingParams(max_tokens=3, presence_penalty=0.5, n=2)
    good = Request("good", PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
    events = list(runtime.generate([Request("r", PROMPT, sampling), good]))
    assert [(e.index, e.finish_reason) for e in events if e.request_id == "r"] == [(0, "error"), (1, "error")]
    assert len(tokens(events, "good")) == 3


def test_weights_that_a_step_reads(runtime: TransformersRuntime) -> None:
    layers = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert runtime.weight_bytes_per_token == 4 * (layers + 160 * 64)


def test_a_trace_has_the_matrix_products(runtime: TransformersRuntime) -> None:
    samples = runtime.trace([Request("r", PROMPT, SamplingParams(max_tokens=4, ignore_eos=True))])
    assert sum(sample.calls for sample in samples if sample.operator in ("aten::mm", "aten::addmm")) >= 4 * 15


def test_missing_weights_are_not_made_up(write_model: WriteModel) -> None:
    folder = write_model()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        TransformersRuntime(RuntimeConfig(folder, "fp32"))


def test_weights_of_another_shape_are_one_sentence(write_model: WriteModel) -> None:
    folder = write_model()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(65)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError):
        TransformersRuntime(RuntimeConfig(folder, "fp32"))


@pytest.mark.parametrize(
    ("content", "error"), [(None, ModelError), ("{}", ModelError), ('{"model_type": "odd"}', UnsupportedModelError)]
)
def test_a_folder_that_is_no_model(tmp_path: Path, content: str | None, error: type[ModelError]) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error):
        TransformersRuntime(RuntimeConfig(tmp_path, "fp32"))
