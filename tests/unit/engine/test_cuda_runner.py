"""The GPU's runner on a CPU: kernels in Triton's interpreter, and for a graph what it would replay.

So the host's part of every kind of step is tested where there is no GPU; tests/gpu has the real one.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

if torch.cuda.is_available():
    pytest.skip("a GPU is there: tests/gpu runs the runner natively", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

from engines import Tokens, make_engine, run, tokens_of
from hasten.engine.config import EngineConfig
from hasten.engine.cuda_runner import CudaRunner
from hasten.engine.engine import Engine
from hasten.kernels.cuda.attention import CudaAttention
from hasten.kernels.kv_cache import KVCache
from hasten.models.decoder import Decoder
from hasten.models.load import load_decoder
from hasten.models.rotary import rotation
from hasten.request import Request, SamplingParams
from random_models import random_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


class GpuOnCpu(TorchFunctionMode):
    """Gives tensors of the host to whoever asks for the GPU's."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs |= {"device": "cpu"} if kwargs.get("device") == "cuda" else {}
        return func(*("cpu" if isinstance(each, str) and each == "cuda" else each for each in args), **kwargs)


class Replayed:
    """Stands for a StepGraph: runs the step's kernels when it is replayed."""

    def __init__(self, step: Callable[[], torch.Tensor]) -> None:
        self.graph, self._step = self, step

    def replay(self) -> None:
        self.logits = self._step()


def captured(runner: CudaRunner, step: Callable[[], torch.Tensor]) -> Replayed:
    runner._input.fill_(-1)  # as a capture does
    return Replayed(step)


class Event:
    """Stands for torch.cuda.Event, on a device where everything is done at once."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def _gpu_on_cpu(scalars_from_arrays: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch, GpuOnCpu():
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda _: None)
        monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
        monkeypatch.setattr(CudaRunner, "_captured", captured)
        yield


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Decoder]:
    """One model for the CPU, and the same with the GPU's attention."""
    path: Path = tmp_path_factory.mktemp("model")
    random_model("llama", SIZES, seed=0).save_pretrained(path)
    ours = load_decoder(path, "fp32", "cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:  # the GPU's kernels pair dimensions as they are published
        monkeypatch.setattr("hasten.models.cpu.interleave_rows", lambda rows, _: rows)
        theirs = load_decoder(path, "fp32", "cpu")
    config = theirs.config
    theirs.attention = CudaAttention(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        windows=config.layer_windows,
        qk_norms=(),
        eps=config.rms_norm_eps,
        rotation=rotation(config.rotary, "cpu"),
        dtype=torch.float32,
    )
    return ours, theirs


def gpu_engine(decoder: Decoder, **limits: Any) -> Engine:
    config = EngineConfig(**{"num_blocks": 64, "max_model_tokens": 256, "max_num_seqs": 4} | limits)
    assert config.num_blocks is not None
    shape = (config.num_blocks, config.block_size, decoder.config.num_kv_heads, decoder.config.head_dim)
    keys, values = (tuple(torch.full(shape, torch.nan) for _ in range(decoder.config.num_layers)) for _ in range(2))
    runner = CudaRunner(decoder, KVCache(keys, values), config)
    return Engine(runner, config, vocab_size=SIZES["vocab_size"], eos_token_ids=(2,))


def greedy(name: str, length: int, **sampling: Any) -> Request:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    prompt = tuple(torch.randint(4, 96, (length,), generator=generator).tolist())
    return Request(name, prompt, SamplingParams(**{"max_tokens": 5, "ignore_eos": True} | sampling))


REQUESTS = [
    greedy("a", 5),
    greedy("b", 33, logprobs=2),
    greedy("c", 17, temperature=1.0, seed=1, n=2),
    greedy("d", 40, repetition_penalty=1.3, max_tokens=1),
    greedy("e", 9, logit_bias=((7, 4.0), (8, -4.0)), temperature=0.7, seed=3),
    greedy("f", 21, min_tokens=3, stop_token_ids=tuple(range(4, 90)), max_tokens=9),
]


@pytest.fixture(scope="module")
def expected(decoders: tuple[Decoder, Decoder]) -> Tokens:
    return tokens_of(run(make_engine(decoders[0], max_model_tokens=256), REQUESTS))


LIMITS: tuple[dict[str, Any], ...] = (
    {},
    {"max_num_batched_tokens": 20},
    {"block_size": 4, "num_blocks": 18, "enable_prefix_cache": False},
)


@pytest.mark.parametrize("limits", LIMITS)
def test_tokens_are_those_of_the_cpu(
    decoders: tuple[Decoder, Decoder], expected: Tokens, limits: dict[str, Any]
) -> None:
    engine = gpu_engine(decoders[1], **limits)
    assert tokens_of(run(engine, REQUESTS)) == expected
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in limits)


def test_logprobs_of_a_prompt_are_those_of_the_cpu(decoders: tuple[Decoder, Decoder]) -> None:
    """Scored in two chunks, beside steps that are under way."""
    requests = [greedy("scored", 150, prompt_logprobs=1, max_tokens=2), greedy("other", 20)]
    found = []
    for engine in (make_engine(decoders[0], max_model_tokens=256), gpu_engine(decoders[1])):
        for request in requests:
            engine.add_request(request)
        events = []
        while engine.has_unfinished:
            events += engine.step()
        scored = [one for event in events for one in event.prompt_logprobs or ()]
        found.append(scored)
        assert [event.finish_reason for event in events if event.finish_reason] == ["length", "length"]
    ours, theirs = ([value for value, _ in each] for each in found)
    assert len(ours) == 149
    assert theirs == pytest.approx(ours, abs=1e-4)
