"""The variants of the streaming product run, are timed, and are found again by their names."""

import dataclasses
import math

import pytest
import torch

from hasten.engine.tuning import Tuner
from hasten.errors import ResourceError
from hasten.kernels.product_shape import ProductShape

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

if torch.cuda.is_available():
    from hasten.kernels.cuda.product_tuning import (
        config_name,
        environment,
        product_candidates,
        stream_configs,
        time_in_turns,
    )
    from hasten.kernels.cuda.stream_linear import candidates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_one_is_chosen_and_found_again(dtype: torch.dtype) -> None:
    shape = ProductShape(1536, 1024, str(dtype).removeprefix("torch."), 4, is_gated=True)
    found = product_candidates(shape)
    if not found:
        pytest.skip("this GPU has no streaming product")
    tuner = Tuner(time_in_turns)
    name = tuner.best(shape.key, found)
    assert name in found
    weight = torch.empty(1536, 1024, dtype=dtype, device="cuda")
    configs = stream_configs(tuner.choices | {dataclasses.replace(shape, rows=8).key: "gone"}, weight, is_gated=True)
    assert {rows: config_name(config) for rows, config in configs.items()} == {4: name}
    assert len({config_name(config) for config in candidates(weight, 4)}) == len(candidates(weight, 4))


def test_what_cannot_run_is_left_out() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    x = torch.randn(1000, device="cuda")
    times = time_in_turns([broken, lambda: x.add_(1)])
    assert times[0] == math.inf
    assert 0 < times[1] < 100


def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    stream = torch.cuda.current_stream()
    x = torch.randn(1000, device="cuda")

    def broken() -> None:
        x.add_(1)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a capture")

    times = time_in_turns([broken, lambda: x.add_(1)])
    assert times[0] == math.inf
    assert times[1] < 100
    assert torch.cuda.current_stream() == stream


def test_memory_that_runs_out_is_said() -> None:
    """A graph without memory for torch's random state would end the process."""
    x = torch.ones(1000, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total_bytes)
    try:
        with pytest.raises(ResourceError, match="memory"):
            time_in_turns([lambda: x.add_(1)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert time_in_turns([lambda: x.add_(1)])[0] < 100


def test_a_dtype_without_a_kernel_has_no_variants() -> None:
    assert product_candidates(ProductShape(128, 128, "float32", 1)) == {}


def test_the_environment_names_the_gpu() -> None:
    assert torch.cuda.get_device_name() in environment()
