"""Compiles CUDA C++ at run time and launches it on torch's current stream.

A source is compiled once for each GPU architecture and set of definitions; the machine code is
kept on disk under a key of everything that it depends on, so a stale entry is never read. A
launch may overlap the end of the kernel before it (programmatic dependent launch), also when
captured in a graph: the kernel itself then waits where it first needs that kernel's results.

Sources must not include headers: NVRTC's own package has none.
"""

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

MAX_SHARED_BYTES = 227 << 10
"""Shared memory that one CTA can have on compute capability 9.0."""


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "hasten" / "kernels"


@dataclass(frozen=True)
class Kernel:
    """A loaded function of one device."""

    function: Any

    def launch(
        self,
        grid: int,
        block: int,
        shared_bytes: int,
        params: ctypes.Structure,
        *,
        cluster: int = 1,
        overlap: bool = True,
    ) -> None:
        """Queues the kernel; `params` is its only parameter, passed by value.

        overlap: it may start before the kernel ahead of it in the stream has ended.
        """
        config = _launch_config(grid, block, shared_bytes, cluster, overlap)
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        _check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(arguments), 0))

    def resident_clusters(self, block: int, shared_bytes: int, cluster: int) -> int:
        """How many clusters of CTAs run at the same time."""
        config = _launch_config(cluster, block, shared_bytes, cluster, False)
        (count,) = _check(driver.cuOccupancyMaxActiveClusters(self.function, config))
        return int(count)


@functools.lru_cache(maxsize=8192)
def tensor_map(address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """A tensor map of bytes for the copy engine, swizzled over 128 bytes; what is out of bounds reads as zero.

    shape, box: innermost dimension first. strides: bytes, of all dimensions but the innermost.
    """
    large, small = driver.cuuint64_t, driver.cuuint32_t
    (encoded,) = _check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            len(shape),
            address,
            [large(size) for size in shape],
            [large(stride) for stride in strides],
            [small(size) for size in box],
            [small(1) for _ in shape],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(int(encoded.getPtr()), 128)


def load_kernel(source: Path, name: str, definitions: Mapping[str, int]) -> Kernel:
    """The function `name` (extern "C") of a source file for the current device, compiled if need be."""
    return _load_kernel(source, name, tuple(sorted(definitions.items())), torch.cuda.current_device())


@functools.cache
def _load_kernel(source: Path, name: str, definitions: tuple[tuple[str, int], ...], device: int) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    machine_code = cached_cubin(source.read_text(), f"sm_{major}{minor}a", dict(definitions))
    (module,) = _check(driver.cuModuleLoadData(machine_code))
    (function,) = _check(driver.cuModuleGetFunction(module, name.encode()))
    attributes = driver.CUfunction_attribute
    _check(
        driver.cuFuncSetAttribute(
            function, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, MAX_SHARED_BYTES
        )
    )
    # a multiprocessor changes its split of cache and shared memory only when it is idle
    _check(driver.cuFuncSetAttribute(function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
    return Kernel(function)


def cached_cubin(source: str, arch: str, definitions: Mapping[str, int]) -> bytes:
    """Machine code from the cache folder, or compiled and put there."""
    version = _check(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source, arch, sorted(definitions.items()), version)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    machine_code = compile_cubin(source, arch, definitions)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(machine_code)
    Path(file.name).replace(path)  # whole or not at all, also with several processes
    return machine_code


def compile_cubin(source: str, arch: str, definitions: Mapping[str, int]) -> bytes:
    """Machine code of a CUDA C++ source; needs no GPU.

    Raises:
        RuntimeError: the source does not compile; the message has the compiler's.
    """
    options = [f"-arch={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in definitions.items())]
    (program,) = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, None, None))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (size,) = _check(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{' '.join(options)}\n{log.decode(errors='replace')}")
    (size,) = _check(nvrtc.nvrtcGetCUBINSize(program))
    machine_code = b" " * size
    _check(nvrtc.nvrtcGetCUBIN(program, machine_code))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return machine_code


@functools.cache
def _launch_config(grid: int, block: int, shared_bytes: int, cluster: int, overlap: bool) -> Any:
    attributes = []
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if cluster > 1 or not overlap:  # said also where it is 1: a query needs it
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
        attributes.append(attribute)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call returned beside its status."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA call failed: {status!r}")
    return tuple(values)
