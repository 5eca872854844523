"""Rotary position embedding (RoFormer, arXiv 2104.09864): the angle of each position, as data.

All stretchings that the families have: linear, dynamic (NTK), yarn, longrope, llama3. How an
angle is applied to q and k is `kernels.rotary`.

An angle depends on its position alone, so a key in the cache is the same however the prompt
was chunked, batched or reused. Two types depend on the sequence's length; they take it as
the length of the sequence that ends with the token, which is what transformers computes while
it generates past the trained context:
- longrope: the long divisors from position `original_context_tokens` on, the short ones before;
- dynamic: beyond the trained context, the base for position + 1 tokens.
They differ from transformers only for a prompt that is itself longer than the trained
context: there transformers gives all of its tokens the angles of the last one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hasten.errors import ModelError, UnsupportedModelError
from hasten.models.fields import is_number, read_flag, read_number, read_size

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding and how it is stretched past the trained context.

    Args:
        rope_type: one of ROPE_TYPES.
        dim: dimensions of a head that are rotated, all of them here.
        attention_factor: cosine and sine are multiplied by it.
        original_context_tokens: context that the model was trained with.
        short_factor, long_factor: longrope's divisors, dim / 2 each.
    """

    rope_type: str
    theta: float
    dim: int
    max_context_tokens: int
    factor: float = 1.0
    attention_factor: float = 1.0
    original_context_tokens: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rotary(config: Mapping[str, Any], head_dim: int, max_context: int) -> RotaryConfig:
    """The rotary settings of a config.json, with everything derived from others filled in.

    Raises:
        UnsupportedModelError: an unknown type, or settings that differ between layers.
        ModelError: a value that is missing, of the wrong type or out of range.
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, Mapping):
        raise ModelError(f"config.json: the rotary settings must be an object, got {values!r:.80}")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise UnsupportedModelError("config.json: rotary settings that differ between layers are not supported")
    where = "rotary settings: "
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"config.json: rotary type {rope_type!r}; supported: {', '.join(ROPE_TYPES)}")
    for source in (config, values):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnsupportedModelError("config.json: partial_rotary_factor other than 1 is not supported")
    theta_source = values if values.get("rope_theta") is not None else config
    original: int | None = None
    if rope_type in ("yarn", "longrope", "llama3"):
        source = config if config.get("original_max_position_embeddings") is not None else values
        original = read_size(source, "original_max_position_embeddings", max_context)
    base = RotaryConfig(
        rope_type=rope_type,
        theta=read_number(theta_source, "rope_theta", 10000.0, low=1.0),
        dim=head_dim,
        max_context_tokens=max_context,
    )
    if rope_type == "default":
        return base
    factor = _factor(values, rope_type, max_context, original)
    fields: dict[str, Any] = {"factor": factor, "original_context_tokens": original or max_context}
    if rope_type == "llama3":
        fields["low_freq_factor"] = read_number(values, "low_freq_factor", None, low=0.0, where=where)
        fields["high_freq_factor"] = read_number(values, "high_freq_factor", None, low=0.0, where=where)
        if fields["low_freq_factor"] <= 0 or fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise ModelError("config.json: high_freq_factor must be above low_freq_factor, and both above 0")
    if rope_type == "yarn":
        fields["beta_fast"] = read_number(values, "beta_fast", 32.0, low=0.0, where=where) or 32.0
        fields["beta_slow"] = read_number(values, "beta_slow", 1.0, low=0.0, where=where) or 1.0
        fields["truncate"] = read_flag(values, "truncate", True)
        fields["attention_factor"] = _yarn_attention_factor(values, factor)
    if rope_type == "longrope":
        for key in ("short_factor", "long_factor"):
            fields[key] = _divisors(values, key, head_dim // 2)
        fields["attention_factor"] = _longrope_attention_factor(values, factor, original or max_context)
    return RotaryConfig(**(vars(base) | fields))


def _factor(values: Mapping[str, Any], rope_type: str, max_context: int, original: int | None) -> float:
    if values.get("factor") is None and rope_type in ("yarn", "longrope"):
        return max_context / (original or max_context)
    return read_number(values, "factor", None, low=1e-3, where="rotary settings: ")


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """YaRN (arXiv 2309.00071), section 3.4: the temperature, as a factor on q and k."""
    if values.get("attention_factor") is not None:
        return read_number(values, "attention_factor", None, low=0.0)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = values.get("mscale"), values.get("mscale_all_dim")
    if numerator and denominator:
        return mscale(read_number(values, "mscale", None)) / mscale(read_number(values, "mscale_all_dim", None))
    return mscale(1.0)


def _longrope_attention_factor(values: Mapping[str, Any], factor: float, original: int) -> float:
    """LongRoPE as published with Phi-3: sqrt(1 + ln(factor) / ln(original context))."""
    if values.get("attention_factor") is not None:
        return read_number(values, "attention_factor", None, low=0.0)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _divisors(values: Mapping[str, Any], key: str, length: int) -> tuple[float, ...]:
    divisors = values.get(key)
    is_valid = isinstance(divisors, list) and len(divisors) == length
    if not is_valid or not all(is_number(each) and each > 0 for each in divisors or ()):
        raise ModelError(f"config.json: {key} must be {length} positive numbers, got {divisors!r:.80}")
    return tuple(float(each) for each in divisors or ())


def rotation(rotary: RotaryConfig, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from positions [num_tokens] int64 to rotations [num_tokens, 1, dim / 2] complex64.

    Each rotation is attention_factor * exp(i * angle).
    """
    if rotary.rope_type == "dynamic":
        return _dynamic_rotation(rotary, device)
    frequencies = inverse_frequencies(rotary).to(device)
    magnitude = torch.tensor(rotary.attention_factor, device=device)
    if rotary.rope_type != "longrope":
        return lambda positions: torch.polar(magnitude, positions.float().unsqueeze(1) * frequencies).unsqueeze(1)
    long_frequencies = _unscaled(rotary) / torch.tensor(rotary.long_factor)
    long_frequencies = long_frequencies.to(device)

    def longrope(positions: torch.Tensor) -> torch.Tensor:
        is_long = (positions >= rotary.original_context_tokens).unsqueeze(1)
        angles = positions.float().unsqueeze(1) * torch.where(is_long, long_frequencies, frequencies)
        return torch.polar(magnitude, angles).unsqueeze(1)

    return longrope


def _dynamic_rotation(rotary: RotaryConfig, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    exponents = (torch.arange(0, rotary.dim, 2, dtype=torch.float32) / rotary.dim).to(device)
    one = torch.ones((), device=device)
    power = rotary.dim / (rotary.dim - 2)

    def dynamic(positions: torch.Tensor) -> torch.Tensor:
        lengths = (positions + 1).clamp(min=rotary.original_context_tokens).double()
        stretch = rotary.factor * lengths / rotary.original_context_tokens - (rotary.factor - 1)
        bases = (rotary.theta * stretch**power).float().unsqueeze(1)
        return torch.polar(one, positions.float().unsqueeze(1) / bases**exponents).unsqueeze(1)

    return dynamic


def _unscaled(rotary: RotaryConfig) -> torch.Tensor:
    return 1.0 / rotary.theta ** (torch.arange(0, rotary.dim, 2, dtype=torch.float32) / rotary.dim)


def inverse_frequencies(rotary: RotaryConfig) -> torch.Tensor:
    """Radians a token, [dim / 2] float32; for longrope those within the trained context.

    Not for the dynamic type, whose frequencies depend on the position.
    """
    frequencies = _unscaled(rotary)
    if rotary.rope_type == "linear":
        return frequencies / rotary.factor
    if rotary.rope_type == "longrope":
        return frequencies / torch.tensor(rotary.short_factor)
    if rotary.rope_type == "llama3":
        return _llama3(rotary, frequencies)
    if rotary.rope_type == "yarn":
        return _yarn(rotary, frequencies)
    return frequencies


def _llama3(rotary: RotaryConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    turns = rotary.original_context_tokens * frequencies / (2 * math.pi)
    blend = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / rotary.factor)


def _yarn(rotary: RotaryConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """YaRN (arXiv 2309.00071), section 3.2: the same by the dimension's index."""

    def dimension(turns: float) -> float:
        wavelength = rotary.original_context_tokens / (turns * 2 * math.pi)
        return rotary.dim * math.log(wavelength) / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    span = (high - low) or 0.001
    ramp = ((torch.arange(rotary.dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return frequencies * (1.0 - ramp) + frequencies / rotary.factor * ramp
