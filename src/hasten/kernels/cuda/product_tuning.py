"""Variants of the streaming product, and their times on this GPU.

A variant is timed as a chain of launches over several copies of the weights, in one CUDA graph:
each launch then reads weights that are not in the cache, and may start while the one before it
ends, as in a decode step. As there, launches with and without a norm take turns, and a norm finds the
sums of squares that the product before it left.
"""

import hashlib
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from hasten.errors import ResourceError
from hasten.kernels.cuda.hidden_rows import HiddenRows
from hasten.kernels.cuda.stream_linear import SOURCE, WEIGHT_KINDS, StreamConfig, candidates, stream_linear, supports
from hasten.kernels.product_shape import TUNED_BUCKETS, ProductShape

logger = logging.getLogger(__name__)

CHAIN_BYTES = 512 << 20
"""Weights in a chain: several times the L2 cache."""

REPEATS = 15


def environment() -> str:
    """What times depend on: the GPU, the driver's CUDA, and the sources of the kernel and of its candidates."""
    major, minor = torch.cuda.get_device_capability()
    digest = hashlib.sha256(SOURCE.read_bytes() + SOURCE.with_suffix(".py").read_bytes()).hexdigest()[:12]
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}, stream_linear {digest}"


def config_name(config: StreamConfig) -> str:
    """A configuration as text: "cluster1-segmentbytes1024-..."."""
    return "-".join(f"{name.replace('_', '')}{value}" for name, value in vars(config).items())


def stream_configs(tuning: Mapping[str, str], weight: torch.Tensor, is_gated: bool) -> dict[int, StreamConfig]:
    """The chosen configuration of each row bucket; a choice that is no candidate any more is left out.

    Args:
        tuning: names of configurations by ProductShape.key.
    """
    rows_out, rows_in = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    found = {}
    for rows in TUNED_BUCKETS:
        name = tuning.get(ProductShape(rows_out, rows_in, dtype, rows, is_gated).key)
        named = {config_name(config): config for config in candidates(weight, rows)} if name is not None else {}
        if name in named:
            found[rows] = named[name]
    return found


@contextmanager
def _memory_refused() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        raise ResourceError(
            f"the GPU's memory ran out while its kernels were tuned, with {free_bytes / 2**30:.1f} of "
            f"{total_bytes / 2**30:.1f} GiB free: end what else uses the GPU, or take a smaller model or scheme"
        ) from error


@_memory_refused()
def product_candidates(shape: ProductShape) -> dict[str, Callable[[], None]]:
    """A chain of launches for each configuration, on random weights; {} where the kernel cannot run.

    Raises:
        ResourceError: the GPU has no memory for the chain's weights.
    """
    rows_out, rows_in, rows, is_gated = shape.rows_out, shape.rows_in, shape.rows, shape.is_gated
    dtype: torch.dtype = getattr(torch, shape.dtype)
    if dtype not in WEIGHT_KINDS or torch.cuda.get_device_capability() != (9, 0):
        return {}
    num_copies = max(1, min(16, CHAIN_BYTES // (rows_out * rows_in * dtype.itemsize)))
    if dtype.itemsize == 1:
        bytes_ = torch.randint(0, 120, (num_copies, rows_out, rows_in), dtype=torch.uint8, device="cuda")
        weights, x_dtype = bytes_.view(dtype), torch.bfloat16
        scale = torch.rand(rows_out, device="cuda")
    else:
        weights = torch.empty(num_copies, rows_out, rows_in, dtype=dtype, device="cuda").normal_(std=0.02)
        x_dtype, scale = dtype, None
    if not supports(weights[0], rows):
        return {}
    x = torch.randn(rows, rows_in, device="cuda").to(x_dtype)
    norm_weight = torch.ones(rows_in, dtype=x_dtype, device="cuda")
    num_parts = torch.cuda.get_device_properties().multi_processor_count
    squares = torch.full((rows, num_parts), rows_in / num_parts, device="cuda")
    hidden = HiddenRows.of(x, squares=squares)
    out = torch.empty(rows, rows_out // (2 if is_gated else 1), dtype=x_dtype, device="cuda")

    def chain(config: StreamConfig) -> Callable[[], None]:
        def run() -> None:
            for launch in range(max(2, num_copies)):
                stream_linear(
                    hidden if launch % 2 else x,
                    weights[launch % num_copies],
                    scale=scale,
                    norm_weight=norm_weight if launch % 2 else None,
                    gated=is_gated,
                    out=out,
                    config=config,
                )

        return run

    return {config_name(config): chain(config) for config in candidates(weights[0], rows)}


@_memory_refused()
def time_in_turns(operations: Sequence[Callable[[], None]]) -> list[float]:
    """Milliseconds of each, the median over turns; inf for one that cannot be captured in a CUDA graph.

    Raises:
        ResourceError: the GPU's memory ran out.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # A CUDAGraph that gets no memory for the state of random numbers when its capture begins ends the process:
        # torch's destructor throws. Beside this, in the same block of the allocator, there is room for that state.
        reserve = torch.empty(1, device="cuda")
    graphs = [_captured(operation, stream) for operation in operations]
    del reserve
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(REPEATS + 2):
        for graph, found in zip(graphs, times, strict=True):
            if graph is None:
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                found.append(start.elapsed_time(end))
    return [statistics.median(found) if found else math.inf for found in times]


def _captured(operation: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """None for an operation that cannot be launched or captured.

    Without torch.cuda.graph, which leaves the capture's stream current when a capture fails.
    """
    try:
        operation()  # compiles, allocates, and refuses what cannot be launched
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                operation()
            finally:
                graph.capture_end()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()  # an error that spoils the whole process goes on
        logger.warning("a kernel variant is left out: %s", str(error).splitlines()[0])
        return None
    return graph
