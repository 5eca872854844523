"""What a server on this machine uses: CPU, memory, and its GPUs' time, memory and power.

The server is found by the port that it listens on; its children count. Resident memory is added up over
processes, so pages that they share count more than once. The driver (NVML) is asked about the GPUs that
the server's processes are on; where its process ids are not this namespace's, as in a container, about those
that hold more than BUSY_GPU_BYTES. Other programs on the same GPU count too.
"""

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from hasten.bench.result import GpuUse
from hasten.extras import is_installed, require

BUSY_GPU_BYTES = 1 << 30
MIN_POWER_WINDOW_S = 0.5  # the energy counter moves a few times in 100 ms


class NotFoundError(Exception):
    """Why a server's processes cannot be looked at, in a few words."""


@dataclass(frozen=True)
class Usage:
    """Between `begin` and `end`."""

    cpu_s: float
    gpu: GpuUse | None


def find_server(host: str, port: int) -> list[psutil.Process]:
    """The processes of this machine that listen on the port.

    Raises:
        NotFoundError: the host is another machine, nothing listens, or this user may not see who does.
    """
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise NotFoundError(f"{host} has no address") from error
    local = {address.address.partition("%")[0] for each in psutil.net_if_addrs().values() for address in each}
    if not any(address in local or address.startswith("127.") for address in addresses):
        raise NotFoundError(f"{host} is another machine")
    try:
        listening = [
            each
            for each in psutil.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port
        ]
    except psutil.AccessDenied as error:
        raise NotFoundError("the system does not tell who listens on a port") from error
    pids = {each.pid for each in listening if each.pid is not None}
    if not pids:
        raise NotFoundError(
            f"the server on port {port} belongs to another user, a container or another machine"
            if listening
            else f"nothing on this machine listens on port {port}"
        )
    return [psutil.Process(pid) for pid in pids]


class ServerMeter:
    """Use of the server's processes. `begin`, `sample` now and then, `end`, then `usage`.

    `loaded_rss_bytes` and `peak_rss_bytes` are from when the meter was made on.
    """

    def __init__(self, roots: list[psutil.Process]) -> None:
        self._roots = roots
        self.gpus, self.why_no_gpu = _open_gpus({process.pid for process in self._tree()})
        self.usage: Usage | None = None
        self.loaded_rss_bytes = self.peak_rss_bytes = self._rss_bytes()

    def begin(self) -> None:
        self._cpu_before_s = self._cpu_s()
        if self.gpus is not None:
            self.gpus.begin()

    def sample(self) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes, self._rss_bytes())
        if self.gpus is not None:
            self.gpus.sample()

    def end(self) -> None:
        cpu_s = sum(max(0.0, after - self._cpu_before_s.get(pid, 0.0)) for pid, after in self._cpu_s().items())
        self.sample()
        self.usage = Usage(cpu_s, None if self.gpus is None else self.gpus.end())

    def _rss_bytes(self) -> int:
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def _tree(self) -> Iterator[psutil.Process]:
        seen = set()
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                for process in (root, *root.children(recursive=True)):
                    if process.pid not in seen:
                        seen.add(process.pid)
                        yield process

    def _cpu_s(self) -> dict[int, float]:
        used = {}
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
        return used


class _Gpus:
    """The GPUs that a server is on, as the driver sees them."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._busy: list[float] = []
        self._peak_bytes = 0
        self._before: tuple[float, float] | None = None

    def begin(self) -> None:
        self._busy, self._peak_bytes = [], 0
        self._before = self._energy()
        self.sample()

    def sample(self) -> None:
        busy = [self._nvml.nvmlDeviceGetUtilizationRates(each).gpu / 100 for each in self._handles]
        self._busy.append(sum(busy) / len(busy))
        taken = sum(self._nvml.nvmlDeviceGetMemoryInfo(each).used for each in self._handles)
        self._peak_bytes = max(self._peak_bytes, taken)

    def end(self) -> GpuUse:
        after, power_w = self._energy(), None
        if self._before is not None and after is not None and after[1] - self._before[1] >= MIN_POWER_WINDOW_S:
            power_w = (after[0] - self._before[0]) / (after[1] - self._before[1])
        return GpuUse(min(1.0, sum(self._busy) / len(self._busy)), self._peak_bytes, power_w)

    def _energy(self) -> tuple[float, float] | None:
        """Joules since the driver was loaded, and when they were read; None where it does not count them."""
        try:
            millijoules = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(each) for each in self._handles)
        except self._nvml.NVMLError:
            return None
        return millijoules * 1e-3, time.perf_counter()


def _open_gpus(pids: set[int]) -> tuple[_Gpus | None, str]:
    """The GPUs of these processes, or why there are none."""
    if not is_installed("pynvml"):
        return None, "nvidia-ml-py, which asks the GPU's driver, is not installed: pip install 'hasten[cuda]'"
    nvml = require("pynvml")
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        running = [{each.pid for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle)} for handle in handles]
        own = [handle for handle, on_it in zip(handles, running, strict=True) if on_it & pids]
        if not own and not any(map(psutil.pid_exists, set().union(*running))):
            own = [each for each in handles if nvml.nvmlDeviceGetMemoryInfo(each).used > BUSY_GPU_BYTES]
    except nvml.NVMLError as error:
        return None, f"no GPU: {error}"
    return (_Gpus(nvml, own), "") if own else (None, "the server uses no GPU of this machine")
