"""The machine that hasten runs on: what of it this process may use, and how fast its memory is.

Figures honour CPU affinity and the limits of control groups (versions 1 and 2), so in a
container they are the container's. Nothing here imports torch. What the system does not
tell is None, never a guess.
"""

import csv
import math
import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

CPU_FLAGS = (  # those that choose the speed of inference, in the spelling of /proc/cpuinfo
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
CPU_TREE = Path("sys/devices/system/cpu")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits")
MIN_BUFFER_BYTES = 256 << 20
MAX_BUFFER_BYTES = 2 << 30
READ_REPEATS = 12
PARTS_PER_THREAD = 8


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    name: str
    memory_bytes: int
    compute_capability: str
    driver: str


@dataclass(frozen=True)
class Hardware:
    """What this process may use.

    Args:
        num_cpus: physical cores, not more than affinity and the control group's quota allow.
        cpu_flags: those of CPU_FLAGS that the CPU has.
        memory_bytes: installed, or the control group's limit if that is less.
        available_memory_bytes: what can be allocated now without swapping.
        gpus: without those that CUDA_VISIBLE_DEVICES hides.
        read_bandwidth_bytes_per_s: measured with num_cpus threads; None if it was not asked for.
    """

    cpu: str
    num_cpus: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    available_memory_bytes: int
    os: str
    gpus: tuple[Gpu, ...]
    read_bandwidth_bytes_per_s: float | None


def probe(*, with_bandwidth: bool = True) -> Hardware:
    """Looks at this machine; measuring the bandwidth takes about a second."""
    root = Path("/")
    name, flags = _cpu_name_and_flags(root)
    num_cpus = count_cpus(root)
    memory_bytes, available_bytes = memory(root)
    buffer_bytes = min(max(MIN_BUFFER_BYTES, 4 * _last_cache_bytes(root)), MAX_BUFFER_BYTES, available_bytes // 4)
    return Hardware(
        cpu=name,
        num_cpus=num_cpus,
        cpu_flags=flags,
        memory_bytes=memory_bytes,
        available_memory_bytes=available_bytes,
        os=_os_name(),
        gpus=_gpus(),
        read_bandwidth_bytes_per_s=measure_read_bandwidth(num_cpus, buffer_bytes) if with_bandwidth else None,
    )


def measure_read_bandwidth(num_threads: int, buffer_bytes: int = MIN_BUFFER_BYTES) -> float:
    """The highest rate, in bytes a second, at which threads together read memory.

    Each thread takes the maximum over its parts of one buffer: numpy releases the GIL, the
    reduction is vectorized, and the buffer is larger than the caches. It is a limit, so the
    best of the repeats counts, as in STREAM (McCalpin 1995).
    """
    buffer = np.zeros(buffer_bytes // 4, dtype=np.uint32)
    buffer.fill(1)  # pages that were never written all map to one page of zeros
    parts = np.array_split(buffer, num_threads * PARTS_PER_THREAD)
    times_s = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(READ_REPEATS):
            start_s = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            times_s.append(time.perf_counter() - start_s)
    return buffer.nbytes / min(times_s)


def free_disk_bytes(path: Path) -> int:
    """What may be written below `path`, which need not exist yet."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def count_cpus(root: Path = Path("/")) -> int:
    """Physical cores that this process may use, not more than its CPU quota.

    Args:
        root: where /proc and /sys are.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = {_siblings(root, cpu) for cpu in cpus}
    quotas = [_cpu_quota(group) for group in _control_groups(root, "cpu")]
    quota = min((quota for quota in quotas if quota is not None), default=math.inf)
    return max(1, min(len(cores), math.ceil(quota) if quota < math.inf else len(cores)))


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Total and available bytes of memory, not more than the control groups allow."""
    system = psutil.virtual_memory()
    total, available = system.total, system.available
    for group in _control_groups(root, "memory"):
        limit = _first_int(group / "memory.max", group / "memory.limit_in_bytes")
        used = _first_int(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= system.total:
            continue
        total = min(total, limit)
        available = min(available, max(0, limit - used + _reclaimable_bytes(group)))
    return total, available


def _cpu_name_and_flags(root: Path) -> tuple[str, tuple[str, ...]]:
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    present = (fields.get("flags") or fields.get("Features") or "").split()
    return name, tuple(flag for flag in CPU_FLAGS if flag in present)


def _siblings(root: Path, cpu: int) -> str:
    """The CPUs that share a core with this one: the same text for each of them."""
    return _text(root / CPU_TREE / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)


def _last_cache_bytes(root: Path) -> int:
    """All last-level caches of the machine together, 0 if the system does not tell."""
    caches: dict[str, int] = {}
    for cache in (root / CPU_TREE).glob("cpu[0-9]*/cache/index3"):
        size = _text(cache / "size").strip()
        if size.endswith("K") and size[:-1].isdigit():
            caches[_text(cache / "shared_cpu_list").strip()] = int(size[:-1]) << 10
    return sum(caches.values())


def _control_groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of all above it, versions 1 and 2."""
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = mount / path.strip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]
    return folders


def _cpu_quota(group: Path) -> float | None:
    """CPUs' worth of time that a control group may take, None for no limit."""
    words = _text(group / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota, period = _first_int(group / "cpu.cfs_quota_us"), _first_int(group / "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _reclaimable_bytes(group: Path) -> int:
    """File cache counted as used that the kernel gives back when it is needed."""
    fields = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    value = fields.get("total_inactive_file", fields.get("inactive_file", "0")).strip()
    return int(value) if value.isdigit() else 0


def _gpus() -> tuple[Gpu, ...]:
    """() where there is no NVIDIA driver, or where its tool fails or hangs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return ()
    command = NVIDIA_SMI if visible is None else (*NVIDIA_SMI, f"--id={visible}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = csv.reader(answer.stdout.splitlines(), skipinitialspace=True)
    return tuple(Gpu(row[0], int(row[1]) << 20, row[2], row[3]) for row in rows if len(row) == 4 and row[1].isdigit())


def _os_name() -> str:
    if platform.system() != "Linux":
        return platform.platform()
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = "Linux"
    return f"{name}, kernel {platform.release()}"


def _first_int(*paths: Path) -> int | None:
    for path in paths:
        text = _text(path).strip()
        if text.lstrip("-").isdigit():
            return int(text)
    return None


def _text(path: Path) -> str:
    """A system file's text, "" where this system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
