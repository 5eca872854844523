"""Decode attention over the paged KV cache, for one token of each row, in one kernel.

The kernel takes the fused qkv product as it is: it normalizes (where the model does) and
rotates q and k, writes the token's k and v to the cache and attends over the whole context,
which is split over CTAs that run at once (Dao et al., "Flash-Decoding", 2023). On Hopper the
CTAs of a row and key head are a cluster and combine in shared memory (decode_attention.cu);
elsewhere partial results meet in a workspace (`decode_kernel`).

Invariants: who takes which part is worked out from the row's position at run time, so a launch
captured in a CUDA graph serves every context length; a row with position -1 touches no cache;
the token's own slot is written by one CTA of a key head and read by none. Several tokens of a
sequence are `ragged_attention`.
"""

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from cuda.bindings import driver

from hasten.kernels.attention import attention_reference
from hasten.kernels.cuda.decode_kernel import decode_kernel
from hasten.kernels.cuda.dependent_launch import has_dependent_launch, launch_options
from hasten.kernels.cuda.nvrtc import MAX_SHARED_BYTES, Kernel, load_kernel
from hasten.kernels.rms_norm import rms_norm_reference
from hasten.kernels.rotary import rotate_reference

SOURCE = Path(__file__).with_suffix(".cu")

MAX_CLUSTER_GROUP = 8
"""Queries a key head that decode_attention.cu takes."""

MAX_SPLITS = 64
"""Programs at most that share the context of one row and key head."""

PROGRAMS = 2048
"""Programs at most of a launch that splits contexts."""

MIN_GROUP = 16
"""A group's queries are padded to this many rows, the least that the tensor cores take."""

CHUNK = 16
"""Partial results that are combined at a time."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodeConfig:
    """How a launch divides its work.

    Args:
        tile: positions that a program reads at a time, a power of two.
        tiles_per_split: tiles that a program takes before another one joins.
        num_splits: programs at most for one row and key head.
    """

    tile: int
    tiles_per_split: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ClusterConfig:
    """How decode_attention.cu divides a row and key head.

    Args:
        cluster: CTAs that share it, at most 16.
        warps: of a CTA.
        stages: blocks of 16 positions that a warp copies ahead.
    """

    cluster: int
    warps: int
    stages: int


CLUSTERS = (
    (4, 12288, ClusterConfig(16, 8, 2)),
    (8, 12288, ClusterConfig(8, 8, 3)),
    (16, 12288, ClusterConfig(8, 4, 3)),
    (64, 12288, ClusterConfig(2, 8, 3)),
    (128, 2048, ClusterConfig(1, 8, 3)),
    (256, 2048, ClusterConfig(1, 4, 3)),
)
"""Up to how many pairs of a row and a key head which division is best, and up to how long a context
it beats the kernel without clusters; measured, see docs/experiments.md."""


class DecodeWorkspace:
    """Memory for partial results; one serves all launches of a stream."""

    def __init__(self, max_rows: int, num_heads: int, head_dim: int, device: str | torch.device) -> None:
        self.capacity = num_heads * max(max_rows, min(PROGRAMS, max_rows * MAX_SPLITS))
        self.partials = torch.empty(self.capacity, head_dim, dtype=torch.float32, device=device)
        self.maxima = torch.empty(self.capacity, dtype=torch.float32, device=device)
        self.sums = torch.empty(self.capacity, dtype=torch.float32, device=device)
        self.counters = torch.zeros(max_rows * num_heads, dtype=torch.int32, device=device)


def choose_config(rows: int, num_kv_heads: int, max_context: int) -> DecodeConfig:
    """The division for a batch of this many rows; measured, see docs/experiments.md."""
    if rows * num_kv_heads >= 1024:
        return DecodeConfig(32, 16, 1, num_warps=1, num_stages=4)
    tile, tiles_per_split = 64, 1 if rows * num_kv_heads <= 64 else 16
    num_splits = min(MAX_SPLITS, PROGRAMS // (rows * num_kv_heads), -(-max_context // (tile * tiles_per_split)))
    return DecodeConfig(tile, tiles_per_split, max(1, num_splits), num_warps=2, num_stages=3)


def decode_attention_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """What `decode_attention` computes and writes, row by row in float32."""
    head_dim, block_size = keys.shape[3], keys.shape[1]
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    attended = torch.zeros(len(positions), num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        rotation = torch.complex(cos[position], sin[position])
        rotated_q, rotated_k = (rotate_reference(heads[row], rotation) for heads in (q, k))
        where = torch.arange(position + 1, device=qkv.device)
        cells = block_tables[slots[row], where // block_size].long() * block_size + where % block_size
        keys.flatten(0, 1)[cells[-1]], values.flatten(0, 1)[cells[-1]] = rotated_k, v[row]
        context_k, context_v = keys.flatten(0, 1)[cells], values.flatten(0, 1)[cells]
        with qkv.device:
            attended[row] = attention_reference(rotated_q[None], context_k, context_v, scale, window).flatten()
    return attended


def decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    workspace: DecodeWorkspace,
    window: int | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
    max_context: int | None = None,
    is_long: bool = False,
    is_early: bool = False,
    config: DecodeConfig | ClusterConfig | None = None,
) -> torch.Tensor:
    """Attention of one token of each row, whose k and v are also written to the cache.

    Args:
        qkv: [rows, (num_heads + 2 * num_kv_heads) * head_dim].
        cos, sin: [max_positions, head_dim / 2] float32, of values that qkv's dtype has.
        keys, values: one layer's cache, [num_blocks, block_size, num_kv_heads, head_dim].
        block_tables: [max_num_seqs, max_blocks_per_seq] int32.
        slots: [rows] int32, the row's sequence in block_tables.
        positions: [rows] int32, the token's position; -1 in a padding row, whose result is 0.
        window: tokens that the token sees, itself included; None for all.
        q_norm, k_norm: [head_dim] as qkv, weights of an RMSNorm over each head.
        out: [rows, num_heads * head_dim].
        max_context: bounds the tokens of a row; by default what block_tables holds.
        is_long: whether to divide the work for long contexts, see `is_long_context`.
        is_early: the earlier tokens' cache, block_tables, slots and positions may be read before
            the preceding kernel has ended. True where nothing in the same graph writes them, or
            where the kernel after the one that does was launched without dependent launch.
        config: for tuning; by default `choose_cluster` or `choose_config`.

    Returns:
        out.
    """
    assert (q_norm is None) == (k_norm is None)
    out = qkv.new_empty(qkv.shape[0], num_heads * keys.shape[3]) if out is None else out
    norm_and_rotary = (cos, sin, q_norm, k_norm, eps)
    cache = (keys, values, block_tables, slots, positions)
    if config is None and not is_long and has_cluster_kernel(qkv.dtype, num_heads // num_kv_heads, keys):
        config = choose_cluster(qkv.shape[0] * num_kv_heads)
    if isinstance(config, ClusterConfig):
        _launch_cluster(qkv, norm_and_rotary, cache, num_heads, scale, window, out, is_early, config)
        return out
    _launch(qkv, norm_and_rotary, cache, num_heads, scale, window, workspace, out, max_context, is_early, config)
    return out


def has_cluster_kernel(dtype: torch.dtype, group: int, keys: torch.Tensor) -> bool:
    """Whether decode_attention.cu serves this shape on this device."""
    _, block_size, _, head_dim = keys.shape
    is_shape = block_size == 16 and group <= MAX_CLUSTER_GROUP and head_dim % 16 == 0 and head_dim <= 128
    return is_shape and dtype in (torch.bfloat16, torch.float16) and keys.is_cuda and has_dependent_launch()


def choose_cluster(pairs: int) -> ClusterConfig | None:
    """The division for this many pairs of a row and a key head; None: the Triton kernel is faster."""
    return next((config for limit, _, config in CLUSTERS if pairs <= limit), None)


def is_long_context(pairs: int, num_tokens: int) -> bool:
    """Whether rows of which one sees this many tokens are faster with `is_long`."""
    return num_tokens > next((longest for limit, longest, _ in CLUSTERS if pairs <= limit), num_tokens)


class _Params(ctypes.Structure):
    """`Params` of decode_attention.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "keys", "values", "block_tables", "slots")),
        *((name, ctypes.c_void_p) for name in ("positions", "q_norm", "k_norm", "out")),
        ("table_stride", ctypes.c_uint64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int),
    )


@functools.cache
def _cluster_kernel(
    is_half: bool, num_kv_heads: int, group: int, head_dim: int, config: ClusterConfig, has_norm: bool, is_early: bool
) -> Kernel:
    definitions = {
        "IS_HALF": int(is_half),
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "CLUSTER": config.cluster,
        "WARPS": config.warps,
        "STAGES": config.stages,
        "HAS_NORM": int(has_norm),
        "EARLY": int(is_early),
    }
    kernel = load_kernel(SOURCE, "decode_attention", definitions)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    (status,) = driver.cuFuncSetAttribute(kernel.function, attribute, 1)
    if int(status) != 0:
        raise RuntimeError(f"CUDA call failed: {status!r}")
    return kernel


def shared_bytes(group: int, head_dim: int, config: ClusterConfig) -> int:
    """`Shared` of decode_attention.cu: rings of 16-byte copies, slices of the result, softmax states."""
    copies = 2 * -(-head_dim // 32) + 4 * -(-head_dim // 64)
    slice_units = -(-group * head_dim // 4 // config.cluster)
    return config.warps * (config.stages * copies * 512 + 64) + config.cluster * (slice_units * 16 + 64)


def _launch_cluster(
    qkv: torch.Tensor,
    norm_and_rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float],
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    num_heads: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    is_early: bool,
    config: ClusterConfig,
) -> None:
    keys, values, block_tables, slots, positions = cache
    cos, sin, q_norm, k_norm, eps = norm_and_rotary
    num_kv_heads, head_dim = keys.shape[2:]
    assert qkv.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and out.is_contiguous()
    assert all(norm is None or norm.dtype == qkv.dtype for norm in (q_norm, k_norm))
    params = _Params(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        block_tables.data_ptr(),
        slots.data_ptr(),
        positions.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        out.data_ptr(),
        block_tables.stride(0),
        eps,
        scale * LOG2_E,
        2**31 - 1 if window is None else window,
    )
    group = num_heads // num_kv_heads
    is_half = qkv.dtype == torch.float16
    kernel = _cluster_kernel(is_half, num_kv_heads, group, head_dim, config, q_norm is not None, is_early)
    grid = qkv.shape[0] * num_kv_heads * config.cluster
    num_bytes = shared_bytes(group, head_dim, config)
    assert num_bytes <= MAX_SHARED_BYTES
    kernel.launch(grid, 32 * config.warps, num_bytes, params, cluster=config.cluster)


def _launch(
    qkv: torch.Tensor,
    norm_and_rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float],
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    num_heads: int,
    scale: float,
    window: int | None,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    max_context: int | None,
    is_early: bool,
    config: DecodeConfig | None,
) -> None:
    keys, values, block_tables, slots, positions = cache
    cos, sin, q_norm, k_norm, eps = norm_and_rotary
    _, block_size, num_kv_heads, head_dim = keys.shape
    rows, group = qkv.shape[0], num_heads // num_kv_heads
    assert qkv.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and out.is_contiguous()
    if config is None:
        config = choose_config(rows, num_kv_heads, max_context or block_tables.shape[1] * block_size)
    num_splits = max(1, min(config.num_splits, workspace.capacity // (rows * num_heads)))
    decode_kernel[(rows, num_kv_heads, num_splits)](
        qkv,
        cos,
        sin,
        keys,
        values,
        block_tables,
        slots,
        positions,
        q_norm,
        k_norm,
        workspace.partials,
        workspace.maxima,
        workspace.sums,
        workspace.counters,
        out,
        eps,
        scale * LOG2_E,
        2**31 - 1 if window is None else window,
        config.tiles_per_split,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
        HEADS=triton.next_power_of_2(group),
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        HAS_NORM=q_norm is not None,
        CHUNK=CHUNK,
        EARLY=is_early,
        PDL=has_dependent_launch(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )
