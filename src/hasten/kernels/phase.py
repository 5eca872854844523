"""Names the phases of a step, so that a profile can tell prefill, decode and sampling apart.

A phase is an NVTX range, which Nsight Systems shows, where the device is a GPU, and a range in
torch's profiler while that runs. Neither costs a microsecond when nobody looks.
"""

from types import TracebackType
from typing import Literal, Self

import torch
from torch.autograd.profiler import record_function

Phase = Literal["prefill", "decode", "sampling"]


class phase:
    """A `with` block that is one phase.

    Args:
        on_gpu: whether the phase computes on a GPU.
    """

    def __init__(self, name: Phase, *, on_gpu: bool) -> None:
        self._name = name
        self._on_gpu = on_gpu
        self._recorded: record_function | None = None

    def __enter__(self) -> Self:
        if self._on_gpu:
            torch.cuda.nvtx.range_push(self._name)
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            self._recorded = record_function(self._name)
            self._recorded.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recorded is not None:
            self._recorded.__exit__(kind, error, trace)
        if self._on_gpu:
            torch.cuda.nvtx.range_pop()
