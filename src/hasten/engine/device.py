"""The device that an engine runs on: what it is, what it can compute, how much memory is free."""

from collections.abc import Mapping
from dataclasses import dataclass
from platform import machine

import torch

from hasten.config import Scheme
from hasten.errors import ResourceError, UsageError
from hasten.hardware import memory
from hasten.models.load import check_cpu_scheme

MIN_CAPABILITY = {"fp32": (8, 0), "fp16": (8, 0), "bf16": (8, 0), "w8a16": (8, 0), "fp8": (8, 9)}
"""The lowest compute capability of a GPU that runs a scheme."""


@dataclass(frozen=True)
class Device:
    """A device as it is now.

    Args:
        kind: "cpu" or "cuda".
        name: of the GPU; the instruction set of a CPU.
        capability: a GPU's compute capability, None for a CPU.
    """

    kind: str
    name: str
    capability: tuple[int, int] | None
    free_bytes: int

    @property
    def hardware(self) -> Mapping[str, str]:
        """What an engine's manifest says about the device."""
        if self.capability is None:
            return {"device": self.kind, "machine": machine(), "cpu_capability": self.name}
        major, minor = self.capability
        return {"device": self.kind, "machine": machine(), "gpu": self.name, "compute_capability": f"{major}.{minor}"}


def find_device(kind: str = "auto") -> Device:
    """The device of a kind, "cpu" or "cuda"; "auto" is the GPU if there is one.

    Raises:
        ResourceError: there is no GPU that torch can use.
        UsageError: an unknown kind.
    """
    if kind not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {kind!r}; allowed: auto, cpu, cuda")
    has_gpu = kind != "cpu" and torch.cuda.is_available()
    if kind == "cuda" and not has_gpu:
        raise ResourceError("there is no NVIDIA GPU that torch can use: hasten doctor says why, or use --device cpu")
    if not has_gpu:
        return Device("cpu", torch.backends.cpu.get_cpu_capability(), None, memory()[1])
    free_bytes, _ = torch.cuda.mem_get_info()
    return Device("cuda", torch.cuda.get_device_name(), torch.cuda.get_device_capability(), free_bytes)


def check_scheme(device: Device, scheme: Scheme) -> None:
    """Raises UsageError where the device cannot run the scheme, with those that it can."""
    if device.capability is None:
        check_cpu_scheme(scheme)
        return
    allowed = [name for name, lowest in MIN_CAPABILITY.items() if device.capability >= lowest]
    if scheme.name in allowed:
        return
    major, minor = device.capability
    what = f"{device.name} (compute capability {major}.{minor})"
    if not allowed:
        raise UsageError(f"{what} is too old: the native engine runs on GPUs of compute capability 8.0 or newer")
    needs = MIN_CAPABILITY.get(scheme.name)
    reason = f"which needs {needs[0]}.{needs[1]} or newer" if needs else "which has no GPU kernels"
    raise UsageError(f"{what} cannot run scheme {scheme.name}, {reason}; allowed: {', '.join(allowed)}")
