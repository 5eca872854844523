"""Power that a GPU draws, from the driver's energy counter (NVML), over a window that the caller sets.

The counter belongs to the whole GPU: other programs on it count too. It moves a few times in
100 ms, so a window should last a second or longer.
"""

import os
import time
from types import TracebackType
from typing import Any, Self

from hasten.errors import RuntimeFailedError
from hasten.extras import require

MIN_WINDOW_S = 1.0


class PowerMeter:
    """Mean power between `start` and `stop`. Use it in a `with` block.

    Raises:
        MissingExtraError: the library that asks the driver is not installed.
        RuntimeFailedError: the driver does not tell.
    """

    def __init__(self) -> None:
        self._nvml: Any = require("pynvml")
        self._start: tuple[int, float] | None = None
        self._stop: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        try:
            self._nvml.nvmlInit()
            self._gpu = _first_visible(self._nvml)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
        except self._nvml.NVMLError as error:
            raise RuntimeFailedError(f"the driver does not tell the GPU's power: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nvml.nvmlShutdown()

    def start(self) -> None:
        """Begins the window, if it has not begun."""
        self._start = self._start or self._read()

    def stop(self) -> None:
        """Ends the window, or moves its end."""
        self._stop = self._read()

    @property
    def mean_w(self) -> float | None:
        """None for a window that has not ended or is too short to tell."""
        if self._start is None or self._stop is None or self._stop[1] - self._start[1] < MIN_WINDOW_S / 2:
            return None
        return (self._stop[0] - self._start[0]) * 1e-3 / (self._stop[1] - self._start[1])

    def _read(self) -> tuple[int, float]:
        """Energy in millijoules, and when it was read."""
        energy_mj: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
        return energy_mj, time.perf_counter()


def _first_visible(nvml: Any) -> Any:
    """The GPU that CUDA calls 0 in this environment."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(visible)
    return nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)
