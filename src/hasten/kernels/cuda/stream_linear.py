"""y = W @ x for up to 16 rows on a Hopper GPU, bound by reading W once from memory.

One kernel covers the norm before a product, the int8 or fp8 weights' scales, bias, SiLU gating and
the residual after it, so that a decoder layer needs four of these and one attention kernel. It
begins reading weights while the kernel before it still runs; see stream_linear.cu.

Results do not vary between runs: partial sums are added in a fixed order. More rows than MAX_ROWS,
where a product is no longer bound by the weights, belong to the library's products.
"""

import ctypes
import functools
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional

from hasten.kernels.cuda.hidden_rows import HiddenRows
from hasten.kernels.cuda.nvrtc import MAX_SHARED_BYTES, Kernel, load_kernel, tensor_map

MAX_ROWS = 16
"""Rows of x: two of the tensor cores' 8-column operands."""

WEIGHT_KINDS = {torch.bfloat16: 0, torch.float16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
SHARED_BYTES = 200 << 10
"""Shared memory of a CTA that has its multiprocessor to itself but for small kernels."""

SHARED_BYTES_ABOVE_HALF, SHARED_BYTES_BELOW_HALF = 125 << 10, 100 << 10
"""The same for kernels in turns, without and with a norm. Of the first kind one fits on a multiprocessor,
and beside it one of the second; so a kernel's CTAs always spread over all multiprocessors."""

HALF_SHARED_BYTES = 114 << 10

SOURCE = Path(__file__).with_name("stream_linear.cu")
TILE_ROWS = 16
FINISHERS = 4  # warps that finish tiles: 16 weight rows of 8 batch rows, a result a thread
PITCH = 10  # floats from one weight row's partial results to the next's, so that banks do not conflict
BARRIER_BYTES = 512
MIN_STAGES, MAX_STAGES = 3, 16  # more than there are teams
MOST_X_BYTES_ALONE, MOST_X_BYTES_IN_CLUSTER = 24 << 10, 64 << 10
"""Of x in a CTA, above which a larger cluster is faster. Every CTA reads its part of x from L2 as weights stream
through it, and what it keeps of x the ring does not have; a cluster's CTAs wait for each other."""

SCALE_BYTES = 8 << 10
"""More than scales and biases take in any shape met; part of whether a configuration fits."""

MAX_CLUSTER = 8


@dataclass(frozen=True)
class StreamConfig:
    """How one product is split over the GPU; any choice gives the same sums up to their order."""

    cluster: int = 1
    """CTAs that share a tile and split its K."""
    segment_bytes: int = 1024
    """Of one weight row in a stage of the ring."""
    warps: int = 8
    teams: int = 1
    """Of warps; they take the stages in turn."""
    in_flight_bytes: int = 48 << 10
    """Weights that a CTA asks for at a time; more than the bandwidth needs delays all other loads."""
    in_turns: bool = False
    """It leaves shared memory for the kernel ahead and the next one, in a chain where kernels with and
    without a norm take turns; else the ring fills what one CTA may have."""


_TensorMap = ctypes.c_ubyte * 128


class _Params(ctypes.Structure):
    """The kernel's parameter; mirrors Params in stream_linear.cu."""

    _fields_ = (
        ("map", _TensorMap),
        *((name, ctypes.c_void_p) for name in ("x", "scale", "bias", "norm_weight", "squares", "residual", "out")),
        ("out_squares", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("n", "k", "rows", "tiles", "parts", "own_tiles", "stages", "in_flight")),
        *((name, ctypes.c_int) for name in ("slice", "gated", "out_float")),
        ("eps", ctypes.c_float),
        ("padding", ctypes.c_int * 4),  # to the alignment of 64 bytes
    )


def supports(weight: torch.Tensor, rows: int) -> bool:
    """Whether `stream_linear` can multiply these weights [n, k] with so many rows on this GPU."""
    return (
        0 < rows <= MAX_ROWS
        and weight.is_cuda
        and weight.dtype in WEIGHT_KINDS
        and weight.is_contiguous()
        and weight.shape[1] * weight.element_size() % 128 == 0
        and weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(weight.device) == (9, 0)
        and _fitting(weight.shape[1], rows, weight.element_size()) != ()
    )


def default_config(weight: torch.Tensor, rows: int) -> StreamConfig:
    """The split that was fastest in measurements of whole decode steps.

    One-byte weights of one or two rows leave a kernel so little time that it must overlap the next.
    Else a deeper ring is faster, and two teams where weights are converted for many rows.
    """
    k, size = weight.shape[1], weight.element_size()
    fitting = _fitting(k, rows, size)
    if size == 1 and rows > 2:
        return replace(fitting[0], teams=2)
    best = next((config for config in fitting if rows * k * 2 // config.cluster <= _most_x_bytes(config)), fitting[-1])
    return best if size == 2 else replace(best, teams=1 if weight.dtype == torch.int8 else 2, in_turns=True)


def candidates(weight: torch.Tensor, rows: int) -> tuple[StreamConfig, ...]:
    """The configurations worth timing for these weights; the default first.

    Kernels take turns all or none: the time of one product does not show what that is worth to a step.
    """
    k, size = weight.shape[1], weight.element_size()
    default = default_config(weight, rows)
    found = [default]
    for base, teams, in_flight_bytes in itertools.product(
        _fitting(k, rows, size)[:2], (1, 2) if size == 1 else (1,), (32 << 10, 48 << 10)
    ):
        config = replace(base, teams=teams, in_turns=default.in_turns, in_flight_bytes=in_flight_bytes)
        if config not in found:
            found.append(config)
    return tuple(found)


def stream_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    config: StreamConfig | None = None,
) -> torch.Tensor:
    """The product of up to 16 rows, with what stands before and after it in a decoder.

    Args:
        x: [rows, k] bf16 or fp16, contiguous; a norm takes its factors from the squares of HiddenRows.
        weight: [n, k], as x, or int8 or float8_e4m3fn with `scale`; see `supports`.
        scale: [n] float32.
        bias: [n], as x.
        norm_weight: [k], as x: x is first divided by its root mean square and multiplied by this.
        residual: of the result's shape, as x, added last; may be `out`. The result is then HiddenRows with squares.
        gated: the first half of the weights' rows gates the second: silu(first) * second, [rows, n / 2].
        out: the result's memory, as x or float32.

    Rounded wherever transformers rounds to x's dtype, only float32 results are not.
    """
    rows, k = x.shape
    weight_rows = weight.shape[0]
    n = weight_rows // 2 if gated else weight_rows
    if out is None:
        out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    assert supports(weight, rows) and weight.shape[1] == k and x.is_contiguous() and out.is_contiguous()
    assert x.dtype == weight.dtype or (weight.element_size() == 1 and x.dtype in (torch.bfloat16, torch.float16))
    assert out.shape == (rows, n) and out.dtype in (x.dtype, torch.float32)
    assert scale is None or (scale.dtype == torch.float32 and scale.is_contiguous() and scale.numel() == weight_rows)
    for vector, length in ((bias, weight_rows), (norm_weight, k), (residual, rows * n)):
        assert vector is None or (vector.dtype == x.dtype and vector.is_contiguous() and vector.numel() == length)
    assert x.data_ptr() % 16 == 0 and (norm_weight is None or norm_weight.data_ptr() % 16 == 0)

    size = weight.element_size()
    config = config or default_config(weight, rows)
    vectors = (scale is not None) + (bias is not None)
    plan = _plan(n, k, rows, size, gated, vectors, norm_weight is not None, config, x.device.index or 0)
    squares = x.squares if isinstance(x, HiddenRows) else None
    assert squares is None or (squares.dtype == torch.float32 and squares.is_contiguous() and len(squares) == rows)
    out_squares = None
    if residual is not None:
        out_squares = torch.empty(rows, plan.grid, dtype=torch.float32, device=x.device)
        out = HiddenRows.of(out, squares=out_squares)
    tensors = (x, scale, bias, norm_weight, squares, residual, out, out_squares)
    params = _Params(
        _TensorMap.from_buffer_copy(_weight_map(weight, config.segment_bytes)),
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(n, k, rows, plan.tiles, 0 if squares is None else squares.shape[1]),
        *(plan.own_tiles, plan.stages, plan.in_flight),
        *(plan.slice_bytes, gated, out.dtype == torch.float32),
        eps,
    )
    kernel = _kernel(WEIGHT_KINDS[weight.dtype], x.dtype == torch.float16, 1 if rows <= 8 else 2, config)
    kernel.launch(plan.grid, _num_threads(config), plan.shared_bytes, params, cluster=config.cluster)
    return out


def stream_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """What `stream_linear` computes, in `dtype` throughout and not rounded."""
    x, weight = x.to(dtype), weight.to(dtype)
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    y = x @ weight.T
    if scale is not None:
        y = y * scale.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = functional.silu(gate) * up
    return y if residual is None else y + residual.to(dtype)


@dataclass(frozen=True)
class _Plan:
    tiles: int
    own_tiles: int
    stages: int
    in_flight: int
    grid: int
    slice_bytes: int
    shared_bytes: int


@functools.cache
def _plan(
    n: int,
    k: int,
    rows: int,
    element_size: int,
    gated: bool,
    vectors: int,
    normed: bool,
    config: StreamConfig,
    device: int,
) -> _Plan:
    """`vectors`: how many of scale and bias there are."""
    tiles = -(-n // (TILE_ROWS // 2 if gated else TILE_ROWS))
    clusters = min(tiles, _resident_clusters(config.cluster, device))
    own_tiles = -(-tiles // (clusters * config.cluster))
    head = _head_bytes(k, rows, element_size, config, normed) + vectors * own_tiles * TILE_ROWS * 4
    shared_bytes = _shared_bytes(config, normed, rows)
    stages = _num_stages(head, config, shared_bytes)
    if stages <= config.teams:
        raise ValueError(f"{config} does not fit: x, scales and sums take {head} bytes of {MAX_SHARED_BYTES}")
    # a team that waits for a stage must not mistake the one before in the same place for it
    most_in_flight = stages if config.teams == 1 else stages - config.teams
    return _Plan(
        tiles,
        own_tiles,
        stages,
        min(most_in_flight, max(1, config.in_flight_bytes // _stage_bytes(config))),
        clusters * config.cluster,
        _slice_bytes(k * element_size, config),
        max(
            -(-head // 1024) * 1024 + stages * _stage_bytes(config),
            HALF_SHARED_BYTES if shared_bytes > HALF_SHARED_BYTES else 0,
        ),
    )


def _weight_map(weight: torch.Tensor, segment_bytes: int) -> bytes:
    """[k / 128 bytes][n][128 bytes]: a copy brings 8 rows of every 128-byte column, in banks that do not conflict."""
    row_bytes = weight.shape[1] * weight.element_size()
    shape = (128, weight.shape[0], row_bytes // 128)
    return tensor_map(weight.data_ptr(), shape, (row_bytes, 128), (128, 8, segment_bytes // 128))


@functools.cache
def _resident_clusters(cluster: int, device: int) -> int:
    """Clusters that run at once with a multiprocessor for each CTA; all tiles are dealt to these."""
    kernel = _kernel(0, False, 1, StreamConfig())
    return kernel.resident_clusters(_num_threads(StreamConfig()), SHARED_BYTES, cluster)


@functools.cache
def _kernel(weight_kind: int, x_half: bool, n_tiles: int, config: StreamConfig) -> Kernel:
    return load_kernel(SOURCE, "stream_linear", definitions(weight_kind, x_half, n_tiles, config))


def definitions(weight_kind: int, x_half: bool, n_tiles: int, config: StreamConfig) -> dict[str, int]:
    """What the source is compiled with."""
    return {
        "WEIGHT_KIND": weight_kind,
        "X_HALF": int(x_half),
        "N_TILES": n_tiles,
        "SEGMENT": config.segment_bytes,
        "WARPS": config.warps,
        "TEAMS": config.teams,
        "FINISHERS": FINISHERS,
        "PITCH": PITCH,
        "BARRIER_BYTES": BARRIER_BYTES,
    }


def _most_x_bytes(config: StreamConfig) -> int:
    return MOST_X_BYTES_ALONE if config.cluster == 1 else MOST_X_BYTES_IN_CLUSTER


@functools.cache
def _fitting(k: int, rows: int, element_size: int) -> tuple[StreamConfig, ...]:
    """Configurations by size of cluster that leave room for every CTA's part of x; short segments if need be."""
    for base in (StreamConfig(), StreamConfig(segment_bytes=512, warps=4)):
        configs = [replace(base, cluster=cluster) for cluster in (1, 2, 4, MAX_CLUSTER)]
        if fitting := tuple(config for config in configs if _fits(k, rows, element_size, config)):
            return fitting
    return ()


def _fits(k: int, rows: int, element_size: int, config: StreamConfig) -> bool:
    """Whether K splits about evenly, with a part for every CTA, and shared memory suffices."""
    row_bytes, slice_bytes = k * element_size, _slice_bytes(k * element_size, config)
    even = slice_bytes * config.cluster <= 1.15 * row_bytes and slice_bytes * (config.cluster - 1) < row_bytes
    head = _head_bytes(k, rows, element_size, config, normed=True) + SCALE_BYTES
    return (even or config.cluster == 1) and _num_stages(head, config, MAX_SHARED_BYTES) > 0


def _shared_bytes(config: StreamConfig, normed: bool, rows: int) -> int:
    """What the ring may fill; all there is if that leaves too few stages.

    With more than half a multiprocessor's, two CTAs of a kernel never share one.
    """
    if not config.in_turns:
        return SHARED_BYTES if rows <= 8 else MAX_SHARED_BYTES  # 16 rows of x leave the ring little
    return SHARED_BYTES_BELOW_HALF if normed else SHARED_BYTES_ABOVE_HALF


def _num_stages(head_bytes: int, config: StreamConfig, shared_bytes: int) -> int:
    """Stages of the ring, 0 if there is no room."""
    for limit in (shared_bytes, MAX_SHARED_BYTES):
        stages = (limit - -(-head_bytes // 1024) * 1024) // _stage_bytes(config)
        if stages >= MIN_STAGES:
            return min(stages, MAX_STAGES)
    return 0


def _slice_bytes(row_bytes: int, config: StreamConfig) -> int:
    """Bytes of a weight row for each CTA of a cluster: whole stages, if there are several."""
    if config.cluster == 1:
        return row_bytes
    return -(-row_bytes // (config.cluster * config.segment_bytes)) * config.segment_bytes


def _stage_bytes(config: StreamConfig) -> int:
    return TILE_ROWS * config.segment_bytes


def _head_bytes(k: int, rows: int, element_size: int, config: StreamConfig, normed: bool) -> int:
    """Shared memory ahead of the ring, scales and biases aside; mirrors the layout in stream_linear.cu."""
    batch_rows = 8 if rows <= 8 else 16
    factors = MAX_ROWS * 4
    partials = 2 * config.warps * batch_rows // 8 * TILE_ROWS * PITCH * 4
    peers = 2 * config.cluster * batch_rows * TILE_ROWS * 4 if config.cluster > 1 else 0
    slice_bytes = _slice_bytes(k * element_size, config)
    x_bytes = slice_bytes * (2 // element_size)
    x_pitch = x_bytes + (64 if element_size == 2 else 16)
    return BARRIER_BYTES + factors + partials + peers + rows * x_pitch + (x_bytes if normed else 0)


def _num_threads(config: StreamConfig) -> int:
    """Of the warps that multiply, the one that fetches weights, and those that finish."""
    return (config.warps + 1 + FINISHERS) * 32
