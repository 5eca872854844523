"""The memory plan: its sums against counted weights, what it refuses, and the cure that it names."""

import dataclasses
import re
from typing import Any

import pytest

from hasten.config import scheme_named
from hasten.engine.build_profile import (
    PROFILES,
    Profile,
    activation_bytes,
    choose_profile,
    lowered,
    memory_plan,
    weight_bytes,
)
from hasten.errors import ResourceError, UsageError
from hasten.models.config import DecoderConfig

GIB = 1 << 30
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def llama(**changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf(LLAMA_8B | changes)


@pytest.mark.parametrize(
    ("scheme", "expected"), [("bf16", 16.06e9), ("fp32", 32.12e9), ("w8a16", 8.56e9), ("fp8", 8.56e9)]
)
def test_weights_of_an_8b_model(scheme: str, expected: float) -> None:
    assert weight_bytes(llama(), scheme_named(scheme)) == pytest.approx(expected, rel=0.005)


def test_a_tied_head_is_counted_once() -> None:
    untied, tied = llama(), llama(tie_word_embeddings=True)
    table = 128256 * 4096
    assert weight_bytes(untied, scheme_named("bf16")) - weight_bytes(tied, scheme_named("bf16")) == 2 * table
    assert weight_bytes(untied, scheme_named("w8a16")) - weight_bytes(tied, scheme_named("w8a16")) == 2 * table


@pytest.mark.parametrize("name", ["latency", "throughput"])
@pytest.mark.parametrize("scheme", ["bf16", "w8a16", "fp8"])
def test_the_parts_add_up_and_leave_a_margin(name: str, scheme: str) -> None:
    plan = memory_plan(llama(), scheme_named(scheme), PROFILES[name], 139 * GIB)
    assert sum(num_bytes for _, num_bytes, _ in plan.rows) == plan.free_bytes
    assert plan.left_bytes >= 0.039 * plan.free_bytes
    assert plan.kv_token_bytes == 131072
    assert plan.cache_tokens >= plan.profile.max_model_tokens


def test_int8_weights_have_copies_on_a_gpu_with_room() -> None:
    scheme, profile = scheme_named("w8a16"), PROFILES["latency"]
    plan = memory_plan(llama(), scheme, profile, 139 * GIB, on_gpu=True)
    assert plan.copy_bytes == 2 * 7_504_658_432
    assert sum(num_bytes for _, num_bytes, _ in plan.rows) == plan.free_bytes
    assert memory_plan(llama(), scheme, profile, 48 * GIB, on_gpu=True).copy_bytes == 0
    assert memory_plan(llama(), scheme, profile, 139 * GIB).copy_bytes == 0
    assert memory_plan(llama(), scheme_named("fp8"), profile, 139 * GIB, on_gpu=True).copy_bytes == 0


def test_the_cache_is_what_the_profile_needs_or_what_fits() -> None:
    scheme = scheme_named("bf16")
    latency = memory_plan(llama(), scheme, PROFILES["latency"], 139 * GIB)
    assert latency.cache_tokens == 8 * 8192
    throughput = memory_plan(llama(), scheme, PROFILES["throughput"], 139 * GIB)
    assert 400_000 < throughput.cache_tokens < 256 * 8192
    remarks = {name: remark for name, _, remark in throughput.rows}
    assert re.search(r"\d+ x 8,192, or 256 x [\d,]+", remarks["KV cache"])


@pytest.mark.parametrize("free_gib", [20, 24, 40])
@pytest.mark.parametrize(
    "profile",
    [
        Profile("latency", 8, 131072, 2048),
        Profile("throughput", 256, 131072, 8192),
        Profile("throughput", 200_000, 64, 200_000),
    ],
)
def test_what_cannot_fit_names_a_limit_that_does(free_gib: int, profile: Profile) -> None:
    scheme = scheme_named("bf16")
    try:
        memory_plan(llama(), scheme, profile, free_gib * GIB)
    except ResourceError as error:
        match = re.search(r"lower --(max-\w+-\w+) to (\d+)$", str(error))
        if match is None:
            assert "--profile latency" in str(error)
            return
        limit, value = match.group(1).replace("-", "_"), int(match.group(2))
        memory_plan(llama(), scheme, lowered(profile, limit, value), free_gib * GIB)
        step = 16 if limit == "max_model_tokens" else 1
        with pytest.raises(ResourceError):
            memory_plan(llama(), scheme, lowered(profile, limit, value + step), free_gib * GIB)


def test_too_little_for_the_weights_offers_another_scheme() -> None:
    with pytest.raises(ResourceError, match="--scheme w8a16"):
        memory_plan(llama(), scheme_named("bf16"), PROFILES["latency"], 12 * GIB)
    with pytest.raises(ResourceError, match="more memory"):
        memory_plan(llama(), scheme_named("fp8"), PROFILES["latency"], 6 * GIB)


def test_activations_grow_with_the_step() -> None:
    scheme, small = scheme_named("bf16"), PROFILES["latency"]
    large = dataclasses.replace(small, max_num_batched_tokens=2 * small.max_num_batched_tokens)
    assert activation_bytes(llama(), scheme, large) > activation_bytes(llama(), scheme, small)


def test_limits_of_ones_own() -> None:
    profile = choose_profile("latency", 2048, max_num_seqs=4)
    assert (profile.max_num_seqs, profile.max_model_tokens) == (4, 2048)
    assert choose_profile("latency", 131072, max_num_seqs=5000).max_num_batched_tokens == 5000
    assert choose_profile("latency", 131072, max_model_tokens=40000).max_model_tokens == 40000
    with pytest.raises(UsageError, match="did you mean latency"):
        choose_profile("latent", 2048)
    with pytest.raises(UsageError, match="ends at 2048"):
        choose_profile("latency", 2048, max_model_tokens=4096)
    with pytest.raises(UsageError, match="at least 1"):
        choose_profile("latency", 2048, max_num_seqs=0)
