"""Build profiles, and the memory that an engine of a profile takes on a device.

A profile is a name for limits. The plan is pure arithmetic over the model's sizes: it says
where the memory goes before anything is allocated, and refuses what cannot fit by naming the
limit to lower. Activations are estimated from above.
"""

import dataclasses
import functools
from bisect import bisect_left
from dataclasses import dataclass

from hasten.config import Scheme, nearest
from hasten.engine.config import EngineConfig
from hasten.errors import ResourceError, UsageError
from hasten.models.config import DecoderConfig
from hasten.models.weights import copy_bytes

BLOCK_SIZE = EngineConfig.block_size

WORKSPACE_BYTES = 1 << 30
"""Loaded kernels, library handles, CUDA graphs, and weights dequantized for large products."""

MARGIN_SHARE = 0.04
"""Of the free memory, left unused."""


@dataclass(frozen=True)
class Profile:
    """What an engine is built for.

    Args:
        max_num_seqs, max_model_tokens, max_num_batched_tokens: as in EngineConfig.
    """

    name: str
    max_num_seqs: int
    max_model_tokens: int
    max_num_batched_tokens: int


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("latency", max_num_seqs=8, max_model_tokens=8192, max_num_batched_tokens=2048),
        Profile("throughput", max_num_seqs=256, max_model_tokens=8192, max_num_batched_tokens=8192),
    )
}


SMALLEST = Profile("latency", 1, BLOCK_SIZE, PROFILES["latency"].max_num_batched_tokens)


def choose_profile(
    name: str, max_context_tokens: int, max_num_seqs: int | None = None, max_model_tokens: int | None = None
) -> Profile:
    """A profile by name, with limits of its own and never more tokens than the model's context.

    Raises:
        UsageError: an unknown profile, a limit below 1, or more tokens asked for than the context has.
    """
    if name not in PROFILES:
        raise UsageError(f"unknown profile {name!r}: {nearest(name, PROFILES)}")
    profile = PROFILES[name]
    for limit, value in (("max-num-seqs", max_num_seqs), ("max-model-tokens", max_model_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"--{limit} must be at least 1, got {value}")
    if max_model_tokens is not None and max_model_tokens > max_context_tokens:
        raise UsageError(f"--max-model-tokens {max_model_tokens}: the model's context ends at {max_context_tokens}")
    num_seqs = max_num_seqs or profile.max_num_seqs
    return dataclasses.replace(
        profile,
        max_num_seqs=num_seqs,
        max_model_tokens=max_model_tokens or min(profile.max_model_tokens, max_context_tokens),
        max_num_batched_tokens=max(profile.max_num_batched_tokens, num_seqs),
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Where a device's free memory goes.

    Args:
        free_bytes: before anything is loaded.
        copy_bytes: of the 16-bit copies of int8 weights, see models.weights.copy_bytes.
        activation_bytes: of the largest step, logits included.
        kv_bytes: as many tokens as the profile may need, or as fit.
        kv_token_bytes: keys and values of one token in all layers.
    """

    profile: Profile
    free_bytes: int
    weight_bytes: int
    copy_bytes: int
    activation_bytes: int
    workspace_bytes: int
    kv_bytes: int
    kv_token_bytes: int

    @property
    def left_bytes(self) -> int:
        taken = self.weight_bytes + self.copy_bytes + self.activation_bytes + self.workspace_bytes + self.kv_bytes
        return self.free_bytes - taken

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.kv_bytes // self.kv_token_bytes

    @property
    def rows(self) -> tuple[tuple[str, int, str], ...]:
        """What takes memory: name, bytes, remark."""
        profile, tokens = self.profile, self.cache_tokens
        full = min(profile.max_num_seqs, tokens // profile.max_model_tokens)
        room = f"{tokens:,} tokens: {full} x {profile.max_model_tokens:,}"
        if full < profile.max_num_seqs:
            room += f", or {profile.max_num_seqs} x {tokens // profile.max_num_seqs:,}"
        step = f"steps of up to {profile.max_num_batched_tokens:,} tokens"
        return (
            ("weights", self.weight_bytes, ""),
            *([("copies of weights", self.copy_bytes, "16 bits, for prompts")] if self.copy_bytes else []),
            ("KV cache", self.kv_bytes, room),
            ("activations", self.activation_bytes, step),
            ("workspace", self.workspace_bytes, "kernels, graphs, libraries"),
            ("free left", self.left_bytes, f"of {gib(self.free_bytes)} that are free now"),
        )


def memory_plan(
    config: DecoderConfig, scheme: Scheme, profile: Profile, free_bytes: int, *, on_gpu: bool = False
) -> MemoryPlan:
    """Plans the memory of an engine.

    Raises:
        ResourceError: it cannot fit; says which limit to lower to what.
    """
    weights = weight_bytes(config, scheme)
    copies = copy_bytes(config, scheme, free_bytes) if on_gpu else 0
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * _activation_itemsize(scheme)
    usable = int(free_bytes * (1 - MARGIN_SHARE)) - weights - copies - WORKSPACE_BYTES
    activations = activation_bytes(config, scheme, profile)
    if usable < activation_bytes(config, scheme, SMALLEST) + BLOCK_SIZE * token_bytes:
        cure = "use a device with more memory" if scheme.weight_bits <= 8 else "build with --scheme w8a16"
        raise ResourceError(
            f"the weights take {gib(weights)} in {scheme.name} and {gib(free_bytes)} are free, which leaves too little "
            f"to run with: {cure}, or end what else uses the device"
        )
    block_bytes = BLOCK_SIZE * token_bytes
    sequence_bytes = -(-profile.max_model_tokens // BLOCK_SIZE) * block_bytes
    available = usable - activations
    if available < max(sequence_bytes, profile.max_num_seqs * block_bytes):
        raise ResourceError(_too_large(config, scheme, profile, usable, block_bytes))
    kv_bytes = min(profile.max_num_seqs * sequence_bytes, available // block_bytes * block_bytes)
    return MemoryPlan(profile, free_bytes, weights, copies, activations, WORKSPACE_BYTES, kv_bytes, token_bytes)


def weight_bytes(config: DecoderConfig, scheme: Scheme) -> int:
    """Bytes that the weights of a model take once loaded."""
    hidden, inner, itemsize = config.hidden_size, config.intermediate_size, _activation_itemsize(scheme)
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = hidden * (2 * heads + 2 * kv_heads + 3 * inner)
    table = config.vocab_size * hidden
    norms = (2 * config.num_layers + 1) * hidden * 4
    if not scheme.is_quantized:
        return (config.num_layers * layer + table * (1 if config.tied_head else 2)) * itemsize + norms
    scales = config.num_layers * (heads + 2 * kv_heads + 2 * hidden + 2 * inner) * 4
    if scheme.group_size is not None:
        scales = config.num_layers * layer // scheme.group_size * 2
    head = table + config.vocab_size * 4
    embedding = 0 if config.tied_head else table * itemsize
    return config.num_layers * layer * scheme.weight_bits // 8 + scales + head + embedding + norms


def activation_bytes(config: DecoderConfig, scheme: Scheme, profile: Profile) -> int:
    """Bytes of everything between the layers in the largest step, and of its logits."""
    itemsize = _activation_itemsize(scheme)
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    token = 4 * config.hidden_size + 3 * heads + 4 * kv_heads + 3 * config.intermediate_size
    context = 2 * max(profile.max_model_tokens, profile.max_num_batched_tokens) * kv_heads
    logits = 3 * profile.max_num_seqs * config.vocab_size * 4
    return (profile.max_num_batched_tokens * token + context) * itemsize + logits


def _too_large(config: DecoderConfig, scheme: Scheme, profile: Profile, usable: int, block_bytes: int) -> str:
    """What to lower so that the plan fits: the length of a sequence, else the number of sequences."""

    def is_too_large(limit: str, value: int) -> bool:
        candidate = lowered(profile, limit, value)
        blocks = max(-(-candidate.max_model_tokens // BLOCK_SIZE), candidate.max_num_seqs)
        return activation_bytes(config, scheme, candidate) + blocks * block_bytes > usable

    missing = (
        f"the KV cache of one sequence of {profile.max_model_tokens:,} tokens, or of {profile.max_num_seqs} short "
        "ones, does not fit beside the weights and activations"
    )
    for limit, step in (("max_model_tokens", BLOCK_SIZE), ("max_num_seqs", 1)):
        values = range(step, getattr(profile, limit) + 1, step)
        num_fitting = bisect_left(values, True, key=functools.partial(is_too_large, limit))
        if num_fitting:
            return f"{missing}: lower --{limit.replace('_', '-')} to {values[num_fitting - 1]}"
    return f"{missing}: build with --profile latency --max-num-seqs 1 and fewer --max-model-tokens"


def lowered(profile: Profile, limit: str, value: int) -> Profile:
    """The profile with max_model_tokens or max_num_seqs lowered, and with a step no larger than that needs."""
    if limit == "max_model_tokens":
        return dataclasses.replace(profile, max_model_tokens=value)
    step = max(PROFILES[profile.name].max_num_batched_tokens, value)
    return dataclasses.replace(
        profile, max_num_seqs=value, max_num_batched_tokens=min(profile.max_num_batched_tokens, step)
    )


def gib(num_bytes: int) -> str:
    """GiB, or MiB of what is small."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 1 << 27 else f"{num_bytes / 2**20:.1f} MiB"


def _activation_itemsize(scheme: Scheme) -> int:
    return 4 if scheme.activation == "float32" else 2
