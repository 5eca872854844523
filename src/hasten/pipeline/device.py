"""Which device a command runs on, decided in one place, and the machine as that device sees it."""

import dataclasses
import subprocess
import sys

import torch

from hasten.config import Device
from hasten.errors import ResourceError, RuntimeFailedError, UsageError
from hasten.hardware import Hardware, probe
from hasten.runtimes.registry import runtime_class

BANDWIDTH_TIMEOUT_S = 120


def resolve_device(asked: Device, runtime: str | None = None) -> str:
    """ "cuda" or "cpu", as torch names them.

    Args:
        asked: "auto" is the GPU where there is one that the runtime can use.
        runtime: whose capabilities are asked; None for a choice that every runtime must live with.

    Raises:
        UsageError: a GPU was asked for by name and the runtime uses none, or there is no such runtime.
        ResourceError: a GPU was asked for by name and torch finds none.
    """
    devices = ("cpu", "cuda") if runtime is None else runtime_class(runtime).capabilities.devices
    if asked == "cuda":
        if "cuda" not in devices:
            raise UsageError(f"the {runtime} runtime runs on the CPU only: leave out --device, or name another runtime")
        if not torch.cuda.is_available():
            raise ResourceError(
                f"torch {torch.__version__} finds no GPU that it can use: "
                "hasten doctor says why, and --device cpu runs without one"
            )
    if asked == "auto":
        return "cuda" if "cuda" in devices and torch.cuda.is_available() else "cpu"
    return asked


def probe_for(device: str) -> Hardware:
    """As `hardware.probe`, with the read bandwidth of the memory that the device computes from.

    Raises:
        RuntimeFailedError: the GPU cannot be measured.
    """
    if device == "cpu":
        return probe()
    hardware = probe(with_bandwidth=False)
    return dataclasses.replace(hardware, read_bandwidth_bytes_per_s=_measure_elsewhere(device))


def _measure_elsewhere(device: str) -> float:
    """Measures the GPU's bandwidth in a process of its own, which leaves nothing on the GPU."""
    command = [sys.executable, "-P", "-m", "hasten.profiling.device_memory", device]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=BANDWIDTH_TIMEOUT_S, check=False)
        return float(run.stdout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailedError(f"the GPU did not answer within {BANDWIDTH_TIMEOUT_S} s: run nvidia-smi") from error
    except ValueError as error:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeFailedError(f"the GPU's memory cannot be measured: {lines[-1]}") from error
