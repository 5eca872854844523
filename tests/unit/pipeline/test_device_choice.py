import subprocess
from types import SimpleNamespace

import pytest
import torch

from hasten.errors import ResourceError, RuntimeFailedError, UsageError
from hasten.pipeline import device
from hasten.pipeline.device import probe_for, resolve_device


@pytest.fixture(params=[True, False], ids=["gpu", "no gpu"])
def has_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return bool(request.param)


def test_auto_is_the_gpu_where_there_is_one_that_the_runtime_uses(has_gpu: bool) -> None:
    assert resolve_device("auto") == ("cuda" if has_gpu else "cpu")
    assert resolve_device("auto", "transformers") == ("cuda" if has_gpu else "cpu")
    assert resolve_device("auto", "fake") == "cpu"
    assert resolve_device("cpu", "transformers") == "cpu"


def test_a_gpu_asked_for_by_name_must_be_there_and_usable(has_gpu: bool) -> None:
    with pytest.raises(UsageError, match="the fake runtime runs on the CPU only"):
        resolve_device("cuda", "fake")
    if has_gpu:
        assert resolve_device("cuda", "transformers") == "cuda"
    else:
        with pytest.raises(ResourceError, match="--device cpu"):
            resolve_device("cuda")


def test_the_bandwidth_is_that_of_the_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["4.2e12\n", ""])
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_, **__: SimpleNamespace(stdout=next(answers), stderr="CUDA error: out of memory\n", returncode=1),
    )
    monkeypatch.setattr(device, "probe", lambda **_: SAMPLE)
    assert probe_for("cuda").read_bandwidth_bytes_per_s == 4.2e12
    with pytest.raises(RuntimeFailedError, match="cannot be measured: CUDA error: out of memory"):
        probe_for("cuda")


SAMPLE = device.Hardware("a CPU", 2, (), 1 << 30, 1 << 30, "Linux", (), None)
