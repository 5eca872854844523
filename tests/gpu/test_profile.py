"""`hasten profile` and the baseline on a GPU: real CUPTI traces, the driver's energy counter, real memory."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from hasten.pipeline.config import ProfileConfig
from hasten.pipeline.profiling import profile_model
from hasten.profiling.device_memory import measure_device_read_bandwidth
from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.process import RuntimeProcess

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
STEPS = 16


def test_the_baseline_and_the_engine_side_by_side(tmp_path: Path) -> None:
    config = ProfileConfig(model=str(MODEL), device="cuda", steps=STEPS, output=tmp_path)
    found = profile_model(config)
    assert found.failures == {}
    assert [each.candidate.name for each in found.profiles] == ["transformers-bf16", "native-bf16"]
    for each in found.profiles:
        assert each.activity is not None
        assert each.activity.num_steps >= STEPS
        assert 0 < each.activity.busy_s <= each.activity.traced_step_s
        assert sum(part.time_s for part in each.parts) == pytest.approx(each.step_s)
        assert {"attention", "qkv", "o", "gate_up", "down", "head"} <= {group.group for group in each.activity.groups}
        names = {
            event.get("name")
            for event in json.loads(gzip.decompress((tmp_path / str(each.trace)).read_bytes()))["traceEvents"]
        }
        assert {"prefill", "decode"} <= names
    baseline, engine = (each.activity for each in found.profiles)
    assert baseline is not None and engine is not None
    assert baseline.launches > 100
    assert engine.launches <= 2.5


def test_power_is_plausible(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    config = ProfileConfig(
        model=str(MODEL), runtimes=("transformers",), device="cuda", prompt_tokens=16, steps=8, output=tmp_path
    )
    [baseline] = profile_model(config).profiles
    assert baseline.power_w is not None
    assert 10 < baseline.power_w < 2000


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_the_baseline_gives_the_same_tokens_as_on_a_cpu_and_tells_its_memory(scheme: str) -> None:
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    requests = [Request(str(length), tuple(range(5, 5 + length)), sampling) for length in (4, 9)]
    tokens = {}
    for device in ("cpu", "cuda"):
        config = RuntimeConfig(MODEL, "fp32" if device == "cpu" else scheme, num_threads=2, device=device)
        with RuntimeProcess("transformers", config) as process:
            events = sorted(process.generate(requests), key=lambda event: event.request_id)
            tokens[device] = [(event.request_id, event.token_id) for event in events]
            peak_bytes = process.peak_device_bytes()
            assert (peak_bytes is None) == (device == "cpu")
            if peak_bytes is not None:
                assert process.weight_bytes_per_token is not None
                assert peak_bytes > process.weight_bytes_per_token
    if scheme == "fp32":
        assert tokens["cpu"] == tokens["cuda"]


def test_bandwidth_is_that_of_a_gpu() -> None:
    assert 5e10 < measure_device_read_bandwidth() < 2e13
