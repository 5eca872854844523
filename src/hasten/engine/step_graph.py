"""A step of a GPU as a CUDA graph. Graphs share one pool of memory, their results too."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepGraph:
    """A captured step; its logits stay until the next replay of any graph of the pool."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor

    @classmethod
    def capture(cls, step: Callable[[], torch.Tensor], pool: Any, stream: torch.cuda.Stream) -> "StepGraph":
        """Runs a step once, so that its kernels are loaded, and captures it.

        Args:
            step: returns logits, float32, contiguous.
            pool: of `torch.cuda.graph_pool_handle`.
        """
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits = step()
        # a tensor that is kept keeps its memory, and every graph would have its own
        return cls(graph, torch.as_tensor(_Lent(logits), device="cuda"))


class _Lent:
    """A tensor's memory for `torch.as_tensor`, which does not keep it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }
