"""Which schemes a device runs, and how one that is missing or too old is refused."""

import pytest
import torch

from hasten.config import scheme_named
from hasten.engine.device import Device, check_scheme, find_device
from hasten.errors import ResourceError, UsageError


def gpu(major: int, minor: int) -> Device:
    return Device("cuda", "NVIDIA Test", (major, minor), 1 << 34)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = find_device()
    assert device.kind == "cpu"
    assert device.free_bytes > 0
    assert device.hardware["device"] == "cpu"
    with pytest.raises(ResourceError, match="hasten doctor"):
        find_device("cuda")
    with pytest.raises(UsageError, match="cpu, cuda"):
        find_device("tpu")


def test_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    device = find_device()
    assert device == Device("cuda", "NVIDIA Test", (9, 0), 5)
    assert device.hardware["compute_capability"] == "9.0"
    assert find_device("cpu").kind == "cpu"


@pytest.mark.parametrize(
    ("device", "scheme", "message"),
    [
        (gpu(8, 6), "fp8", "8.9 or newer; allowed: fp32, fp16, bf16, w8a16$"),
        (gpu(9, 0), "w4a16", "no GPU kernels; allowed: fp32, fp16, bf16, w8a16, fp8$"),
        (gpu(7, 5), "bf16", "too old"),
        (Device("cpu", "AVX512", None, 1), "fp8", "use w8a16 on a CPU"),
    ],
)
def test_a_scheme_that_the_device_cannot_run(device: Device, scheme: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_scheme(device, scheme_named(scheme))


def test_schemes_that_it_can_run() -> None:
    check_scheme(gpu(9, 0), scheme_named("fp8"))
    check_scheme(gpu(8, 0), scheme_named("w8a16"))
    check_scheme(Device("cpu", "AVX512", None, 1), scheme_named("w4a16"))
