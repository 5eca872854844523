"""What this machine can run, each problem with its cure.

Libraries are imported in processes of their own, so that one that is broken is a line in
the answer instead of a crash, and nothing here imports torch. The model is looked at by
`doctor_model`, which does.
"""

import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from hasten.extras import EXTRAS, Extra, installed_version
from hasten.hardware import Hardware, free_disk_bytes

Status = Literal["ok", "warning", "problem"]

GIB = 1 << 30
IMPORT_TIMEOUT_S = 120
LOW_MEMORY_BYTES = 2 * GIB
LOW_DISK_BYTES = 2 * GIB
NOISY_CPUS = 0.25
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PINNING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        status: "problem" keeps hasten from working, "warning" costs speed, accuracy of
            measurement or an optional part.
        cure: what to do about it, None where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    cure: str | None = None


def check_machine(hardware: Hardware, folder: Path) -> tuple[Check, ...]:
    """Looks at the machine and at what is installed; takes a few seconds.

    Args:
        folder: where results would be written.
    """
    conditions = check_conditions(hardware, folder)  # before the checks below make noise of their own
    with ThreadPoolExecutor() as pool:
        torch = pool.submit(_torch, hardware)
        transformers = pool.submit(_library, "transformers")
        extras = [pool.submit(_extra, extra) for extra in EXTRAS.values()]
        return (_python(), torch.result(), transformers.result(), *(each.result() for each in extras), *conditions)


def check_conditions(hardware: Hardware, folder: Path) -> tuple[Check, ...]:
    """Looks at what measuring depends on: processor, memory, disk, thread settings, other programs; half a second.

    Args:
        folder: where results would be written.
    """
    return (_cpu(hardware), _memory(hardware), _disk(folder), _threads(hardware), _noise(hardware))


def _python() -> Check:
    detail = f"{platform.python_version()}, {sys.executable}"
    if sys.maxsize < 2**32:
        return Check("Python", "problem", f"{detail}, 32 bits", "install a 64-bit Python")
    return Check("Python", "ok", detail)


def _torch(hardware: Hardware) -> Check:
    check = _library("torch", "import torch; print(torch.version.cuda, torch.cuda.is_available())")
    if check.status == "problem":
        return check
    version, _, answer = check.detail.partition("; ")
    cuda, _, is_usable = answer.partition(" ")
    gpus = ", ".join(gpu.name for gpu in hardware.gpus)
    if is_usable == "True":
        return Check("torch", "ok", f"{version}, CUDA {cuda}, {gpus}")
    if gpus and cuda == "None":
        return Check(
            "torch",
            "warning",
            f"{version} is a CPU build, and this machine has {gpus}",
            "install a CUDA build of torch to use it; everything works on the CPU without",
        )
    if gpus:
        return Check(
            "torch",
            "warning",
            f"{version} for CUDA {cuda} cannot use {gpus} with driver {hardware.gpus[0].driver}",
            "install a newer driver, or a torch built for an older CUDA",
        )
    return Check("torch", "ok", f"{version}, on the CPU: no NVIDIA GPU found")


def _library(distribution: str, code: str | None = None) -> Check:
    """Imports a dependency; the detail is its version and, after "; ", what `code` printed."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Check(distribution, "problem", "not installed", f"pip install {distribution}")
    printed, failure = _run_python(code or f"import {distribution}")
    if failure:
        cure = f"pip install --force-reinstall {distribution}"
        return Check(distribution, "problem", f"{version} is installed but cannot be imported: {failure}", cure)
    return Check(distribution, "ok", f"{version}; {printed}" if printed else version)


def _extra(extra: Extra) -> Check:
    name = f"{extra.distribution}, for {extra.needed_by}"
    cure = f"pip install 'hasten[{extra.name}]'"
    version = installed_version(extra.module)
    if version is None:
        return Check(name, "warning", "not installed (optional)", cure)
    if _numbers(version) < _numbers(extra.min_version):
        return Check(name, "warning", f"{version} is older than {extra.min_version}", f"{cure} --upgrade")
    _, failure = _run_python(f"import {extra.module}")
    if failure:
        return Check(name, "warning", f"{version} is installed but cannot be imported: {failure}", cure)
    return Check(name, "ok", version)


def _cpu(hardware: Hardware) -> Check:
    flags = set(hardware.cpu_flags)
    detail = (
        f"{hardware.cpu}, {hardware.num_cpus} cores, {' '.join(hardware.cpu_flags) or 'no vector extensions listed'}"
    )
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        return Check("CPU", "warning", f"{detail}: without AVX2 all runtimes are slow", "use a machine with AVX2")
    if not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Check(
            "CPU", "ok", f"{detail}; it has no bf16 arithmetic, so expect more of w8a16 and w4a16 than of bf16"
        )
    return Check("CPU", "ok", detail)


def _memory(hardware: Hardware) -> Check:
    detail = f"{hardware.available_memory_bytes / GIB:.1f} of {hardware.memory_bytes / GIB:.1f} GiB available"
    if hardware.read_bandwidth_bytes_per_s is not None:
        detail += f", read at {hardware.read_bandwidth_bytes_per_s / 1e9:.0f} GB/s"
    if hardware.available_memory_bytes < LOW_MEMORY_BYTES:
        return Check(
            "memory", "warning", detail, "close other programs, or keep to models of less than 0.5 B parameters"
        )
    return Check("memory", "ok", detail)


def _disk(folder: Path) -> Check:
    free_bytes = free_disk_bytes(folder)
    detail = f"{free_bytes / GIB:.1f} GiB free at {folder.absolute()}"
    if free_bytes < LOW_DISK_BYTES:
        return Check("disk", "warning", detail, "free some, or write to another disk with -o")
    return Check("disk", "ok", detail)


def _threads(hardware: Hardware) -> Check:
    pinned = [f"{name}={os.environ[name]}" for name in PINNING_VARIABLES if name in os.environ]
    limited = [
        f"{name}={os.environ[name]}"
        for name in THREAD_VARIABLES
        if os.environ.get(name, str(hardware.num_cpus)) != str(hardware.num_cpus)
    ]
    if pinned or limited:
        names = " ".join(setting.partition("=")[0] for setting in (*pinned, *limited))
        detail = f"{' '.join((*pinned, *limited))} may keep threads from the {hardware.num_cpus} cores"
        return Check("threads", "warning", detail, f"unset {names}")
    return Check("threads", "ok", f"one for each of {hardware.num_cpus} cores")


def _noise(hardware: Hardware) -> Check:
    busy_cpus = psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)
    detail = f"other programs use {busy_cpus:.1f} CPUs, load average {os.getloadavg()[0]:.1f}"
    if busy_cpus > NOISY_CPUS * hardware.num_cpus:
        return Check(
            "noise", "warning", f"{detail}: speed would be measured low and uneven", "stop them while measuring"
        )
    return Check("noise", "ok", detail)


def _run_python(code: str) -> tuple[str, str | None]:
    """Runs code in a new interpreter: what it printed, and why it failed or None."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"it did not finish within {IMPORT_TIMEOUT_S} s"
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        return "", lines[-1] if lines else f"exit status {run.returncode}"
    return run.stdout.strip(), None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: enough to compare releases."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))
