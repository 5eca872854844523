"""The native runtime as its callers see it, on a tiny model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyModel

from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.native import NativeRuntime

VARIANT = "llama3-gqa"
GetModel = Callable[[str], TinyModel]


@pytest.fixture(scope="module")
def runtime(tiny_model: GetModel) -> Iterator[NativeRuntime]:
    loaded = NativeRuntime(RuntimeConfig(tiny_model(VARIANT).path, "fp32", max_num_seqs=3))
    yield loaded
    loaded.close()


def request(request_id: str, num_prompt_tokens: int = 6, **sampling: object) -> Request:
    sampling = {"max_tokens": 20, "ignore_eos": True} | sampling
    return Request(request_id, tuple(range(5, 5 + num_prompt_tokens)), SamplingParams(**sampling))


def test_every_request_ends_and_one_that_cannot_run_does_not_disturb(runtime: NativeRuntime) -> None:
    requests = [request("a"), request("long", 128, n=2), request("b"), *(request(f"c{i}") for i in range(4))]
    events = list(runtime.generate(requests))
    ends = {(event.request_id, event.index): event for event in events if event.finish_reason is not None}
    assert len(ends) == len(requests) + 1
    assert {key for key, event in ends.items() if event.finish_reason == "error"} == {("long", 0), ("long", 1)}
    assert "prompt has 128 tokens" in (ends["long", 0].error or "")
    tokens = [event.token_id for event in events if event.request_id == "a"]
    assert len(tokens) == 20
    assert tokens == [event.token_id for event in events if event.request_id == "b"]


def test_cancel_between_events_ends_that_request_alone(runtime: NativeRuntime) -> None:
    counts = {"kept": 0, "cancelled": 0}
    reasons = {}
    for event in runtime.generate([request("kept"), request("cancelled")]):
        counts[event.request_id] += event.token_id is not None
        if event.finish_reason is not None:
            reasons[event.request_id] = event.finish_reason
        if counts["cancelled"] == 3 and not reasons:
            runtime.cancel("cancelled")
    assert counts == {"kept": 20, "cancelled": 3}
    assert reasons == {"kept": "length", "cancelled": "cancelled"}


def test_caller_that_stops_listening_leaves_nothing_behind(runtime: NativeRuntime) -> None:
    stream = runtime.generate([request("a", max_tokens=60), request("b", max_tokens=60)])
    next(stream)
    stream.close()
    engine = runtime._engine
    assert not engine.has_unfinished
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert len(list(runtime.generate([request("a")]))) == 20


def test_eos_token_of_the_folder_ends_a_request(runtime: NativeRuntime) -> None:
    # token 2 is the folder's eos
    sampling = {"max_tokens": 120, "temperature": 3.0, "seed": 0}
    ignored = [event.token_id for event in runtime.generate([request("a", **sampling)])]
    events = list(runtime.generate([request("a", **sampling, ignore_eos=False)]))
    assert 2 in ignored[:-1], "choose another seed"
    assert [event.token_id for event in events] == ignored[: ignored.index(2) + 1]
    assert events[-1].finish_reason == "stop"


def test_score_is_the_log_softmax_of_transformers(tiny_model: GetModel, runtime: NativeRuntime) -> None:
    rows = [[(i * j) % 150 for j in range(1, 129)] for i in (3, 7)]  # as long as the context
    scores = list(runtime.score(rows))
    for row, score in zip(rows, scores, strict=True):
        expected = tiny_model(VARIANT).logits(row).log_softmax(-1).numpy()
        assert score.dtype == np.float32
        np.testing.assert_allclose(score, expected, atol=1e-4)
    engine = runtime._engine
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


def test_trace_names_the_operators_that_took_the_time(runtime: NativeRuntime) -> None:
    samples = runtime.trace([request("a")])
    names = {sample.operator for sample in samples}
    assert names & {"aten::addmm", "aten::mm", "aten::linear", "mkldnn::_linear_pointwise"}
    assert all(sample.time_s > 0 and sample.calls > 0 for sample in samples)


def test_prepared_folder_gives_the_same_tokens(tiny_model: GetModel, tmp_path: Path) -> None:
    path = tiny_model(VARIANT).path
    tokens = []
    for folder in (path, NativeRuntime.prepare(path, "w8a16", tmp_path / "engine")):
        loaded = NativeRuntime(RuntimeConfig(folder, "w8a16"))
        tokens.append([event.token_id for event in loaded.generate([request("a")])])
    assert tokens[0] == tokens[1]
