"""The weight-streaming product against float64, over shapes, dtypes and everything it fuses."""

import dataclasses
import itertools

import pytest
import torch

from hasten.kernels.rms_norm import rms_norm_reference

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if torch.cuda.is_available():
    from hasten.kernels.cuda import stream_linear as stream_linear_module
    from hasten.kernels.cuda.nvrtc import MAX_SHARED_BYTES
    from hasten.kernels.cuda.stream_linear import (
        candidates,
        default_config,
        stream_linear,
        stream_linear_reference,
        supports,
    )

FP8 = torch.float8_e4m3fn
WEIGHTS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, FP8),
    (torch.float16, torch.float16),
    (torch.float16, torch.int8),
    (torch.float16, FP8),
]
SHAPES = [(16, 64), (1, 128), (40, 128 * 7), (100, 64 * 17), (6144, 4096), (3000, 3584), (515, 14336), (48, 18944)]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Relative error in the 2-norm, of some roundings: two of x where a norm is inside, three where a gate is."""


def make_weight(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    if dtype.itemsize == 2:
        return (torch.randn(n, k, device="cuda") / k**0.5).to(dtype), None
    scale = (torch.rand(n, device="cuda") + 0.5) / k**0.5
    if dtype == torch.int8:
        return torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda"), scale / 74
    return torch.randn(n, k, device="cuda").to(dtype), scale


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 13, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS, ids=str)
def test_product_is_right(dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    n, k = shape
    weight, scale = make_weight(n, k, weight_dtype)
    if k * weight.element_size() % 128:
        assert not supports(weight, rows)
        return
    x = torch.randn(rows, k, device="cuda").to(dtype)
    out = poisoned(rows, n, dtype=dtype)
    stream_linear(x, weight, scale=scale, out=out)
    assert relative_error(out, stream_linear_reference(x, weight, scale=scale)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("fused", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS, ids=str)
def test_everything_fused_is_right(
    dtype: torch.dtype, weight_dtype: torch.dtype, fused: tuple[bool, bool, bool, bool], rows: int
) -> None:
    normed, gated, biased, added = fused
    n, k = 300, 128 * 21
    weight, scale = make_weight(2 * n if gated else n, k, weight_dtype)
    x = (torch.randn(rows, k, device="cuda") * 3).to(dtype)
    norm_weight = (torch.rand(k, device="cuda") + 0.2).to(dtype) if normed else None
    bias = torch.randn(len(weight), device="cuda").to(dtype) if biased else None
    out = poisoned(rows, n, dtype=dtype)
    if added:
        out = torch.randn(rows, n, device="cuda").to(dtype)
    arguments = {"scale": scale, "bias": bias, "norm_weight": norm_weight, "eps": 1e-5, "gated": gated}
    reference = stream_linear_reference(x, weight, residual=out if added else None, **arguments)
    result = stream_linear(x, weight, residual=out if added else None, out=out, **arguments)
    assert result.data_ptr() == out.data_ptr()
    assert relative_error(out, reference) < TOLERANCE[dtype]
    if added:
        torch.testing.assert_close(result.squares.sum(1), out.float().square().sum(1))


@pytest.mark.parametrize("rows", [1, 5, 8, 16])
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS, ids=str)
def test_a_norm_rounds_as_transformers_from_squares_or_without(
    dtype: torch.dtype, weight_dtype: torch.dtype, rows: int
) -> None:
    """A product by the identity shows the normed x: the published form's, but for some roundings to the other side."""
    k = 2048
    identity = torch.eye(k, device="cuda").to(weight_dtype)
    scale = None if identity.dtype == dtype else torch.ones(k, device="cuda")
    x = (torch.randn(rows, k, device="cuda") * 3).to(dtype)
    norm_weight = (torch.rand(k, device="cuda") + 0.2).to(dtype)
    expected = rms_norm_reference(x, norm_weight, 1e-5)
    for config in candidates(identity, rows):
        zeros = torch.zeros(rows, k, dtype=dtype, device="cuda")
        hidden = stream_linear(x, identity, scale=scale, residual=zeros, config=config)
        assert torch.equal(hidden.as_subclass(torch.Tensor), x)
        for each in (x, hidden):
            out = stream_linear(each, identity, scale=scale, norm_weight=norm_weight, eps=1e-5, config=config)
            torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
            assert float((out != expected).float().mean()) < 1e-2


@pytest.mark.parametrize("rows", [1, 5, 8, 11, 16])
@pytest.mark.parametrize("shape", [(1000, 4096), (200, 14336)], ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS, ids=str)
def test_every_candidate_is_right(
    dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int], rows: int
) -> None:
    n, k = shape
    weight, scale = make_weight(2 * n, k, weight_dtype)
    x = torch.randn(rows, k, device="cuda").to(dtype)
    norm_weight = (torch.rand(k, device="cuda") + 0.2).to(dtype)
    arguments = {"scale": scale, "norm_weight": norm_weight, "eps": 1e-6, "gated": True}
    reference = stream_linear_reference(x, weight, **arguments)
    configs = candidates(weight, rows)
    assert configs[0] == default_config(weight, rows)
    for config in configs:
        out = poisoned(rows, n, dtype=dtype)
        stream_linear(x, weight, out=out, config=config, **arguments)
        assert relative_error(out, reference) < TOLERANCE[dtype], config


@pytest.mark.parametrize(("rows", "cluster"), [(1, 1), (1, 8), (8, 1), (8, 4), (16, 2), (16, 8)])
def test_many_tiles_of_a_cta_are_right(rows: int, cluster: int) -> None:
    """So many that buffers of partial sums, slots of the cluster and the ring are used again and again."""
    n, k = 16 * 132 * 9 + 5, 8192
    weight, scale = make_weight(n, k, torch.int8)
    x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
    config = dataclasses.replace(default_config(weight, rows), cluster=cluster)
    results = [poisoned(rows, n, dtype=torch.float32) for _ in range(10)]
    for out in results:
        stream_linear(x, weight, scale=scale, out=out, config=config)
    assert relative_error(results[0], stream_linear_reference(x, weight, scale=scale)) < 1e-5
    assert all(torch.equal(out, results[0]) for out in results[1:])


@pytest.mark.parametrize("weight_dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_kernels_in_turns_share_a_multiprocessor(rows: int, weight_dtype: torch.dtype) -> None:
    weight, _ = make_weight(6144, 4096, weight_dtype)
    config = default_config(weight, rows)
    assert config.in_turns
    plans = [stream_linear_module._plan(6144, 4096, rows, 1, False, 1, normed, config, 0) for normed in (False, True)]
    assert sum(plan.shared_bytes for plan in plans) <= MAX_SHARED_BYTES
    assert 2 * plans[0].shared_bytes > MAX_SHARED_BYTES


@pytest.mark.parametrize("weight_dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code_is_widened_exactly(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").view(weight_dtype).float().nan_to_num(0)
    weight = torch.stack([codes.roll(column) for column in range(128)], dim=1).to(weight_dtype)
    for column in range(0, 128, 5):
        x = torch.zeros(1, 128, dtype=dtype, device="cuda")
        x[0, column] = 1
        out = poisoned(1, 256, dtype=torch.float32)
        stream_linear(x, weight, scale=torch.ones(256, device="cuda"), out=out)
        assert torch.equal(out[0], weight[:, column].float())


def test_logits_are_float32() -> None:
    weight, scale = make_weight(1003, 2048, torch.int8)
    x = torch.randn(4, 2048, device="cuda").to(torch.bfloat16)
    out = poisoned(4, 1003, dtype=torch.float32)
    stream_linear(x, weight, scale=scale, out=out)
    assert relative_error(out, stream_linear_reference(x, weight, scale=scale)) < 1e-5


def test_large_and_small_activations() -> None:
    weight, scale = make_weight(512, 4096, torch.int8)
    for factor in (1e-6, 1e6):
        x = (torch.randn(2, 4096, device="cuda") * factor).to(torch.bfloat16)
        for norm_weight in (None, torch.rand(4096, device="cuda").to(torch.bfloat16)):
            out = stream_linear(x, weight, scale=scale, norm_weight=norm_weight)
            assert relative_error(out, stream_linear_reference(x, weight, scale=scale, norm_weight=norm_weight)) < 6e-3


def test_a_captured_chain_repeats_itself() -> None:
    """Each product reads the one before it: an early read of x would show, and so would a race."""
    k, layers = 2048, 24
    weights = [make_weight(k, k, torch.bfloat16)[0] for _ in range(layers)]
    norm_weight = torch.ones(k, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(5, k, device="cuda").to(torch.bfloat16)
    hidden, middle = torch.empty_like(x), torch.empty_like(x)

    def step() -> None:
        rows = hidden.copy_(x)
        for weight in weights:
            stream_linear(rows, weight, norm_weight=norm_weight, eps=1e-6, out=middle)
            rows = stream_linear(middle, weight, residual=rows, out=hidden)

    step()
    eager = hidden.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(50):
        graph.replay()
        assert torch.equal(hidden, eager)
    reference = x
    for weight in weights:
        inner = stream_linear_reference(reference, weight, norm_weight=norm_weight, eps=1e-6).to(torch.bfloat16)
        reference = stream_linear_reference(inner, weight, residual=reference).to(torch.bfloat16)
    assert relative_error(eager, reference.double()) < 2e-2


def test_what_is_not_supported() -> None:
    assert supports(torch.empty(8, 128, dtype=torch.int8, device="cuda"), 16)
    assert not supports(torch.empty(8, 128, dtype=torch.int8, device="cuda"), 17)
    assert not supports(torch.empty(8, 96, dtype=torch.int8, device="cuda"), 1)
    assert not supports(torch.empty(8, 128, dtype=torch.float32, device="cuda"), 1)
    assert not supports(torch.empty(8 * 128 + 1, dtype=torch.int8, device="cuda")[1:].view(8, 128), 1)
