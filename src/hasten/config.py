"""Schemes by name, and configuration dataclasses from plain mappings.

A scheme names the precision of the weights and activations as compressed-tensors does.
An unknown name or key is an error that offers the nearest one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hasten.errors import UsageError

Device = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["json", "text"]


@dataclass(frozen=True)
class Scheme:
    """A precision: bits a weight, and the number of weights that share a scale.

    Args:
        weight_bits: stored bits of one weight of a linear layer.
        group_size: weights of one row that share a scale; None is the whole row.
        activation: dtype that activations have, in torch's spelling.
        is_fp8: whether the 8 bits are a floating-point number (e4m3) instead of an integer.
    """

    name: str
    weight_bits: int
    activation: str
    group_size: int | None = None
    is_fp8: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.weight_bits < 16


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", 32, "float32"),
        Scheme("bf16", 16, "bfloat16"),
        Scheme("fp16", 16, "float16"),
        Scheme("w8a16", 8, "bfloat16"),
        Scheme("w4a16", 4, "bfloat16", group_size=128),
        Scheme("fp8", 8, "bfloat16", is_fp8=True),
    )
}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence that lists what is allowed and, if one is close, offers it."""
    names = list(allowed)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]}? " if match else ""
    return f"{hint}allowed: {', '.join(names)}"


def scheme_named(name: str) -> Scheme:
    """Raises UsageError with the nearest name if there is no such scheme."""
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}: {nearest(name, SCHEMES)}")
    return SCHEMES[name]


def option(default: Any, help: str, flags: tuple[str, ...] = ()) -> Any:
    """A dataclass field whose default and help the command line reads.

    Args:
        flags: spellings on the command line; without them, the field's name with dashes.
    """
    return dataclasses.field(default=default, metadata={"help": help, "flags": flags})


T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds a config dataclass, refusing keys that it does not have and values of another type.

    Args:
        where: what the mapping is, for the message ("plan.json").

    Raises:
        UsageError: an unknown key or a value of the wrong type, with the nearest name.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            raise UsageError(f"{where} has an unknown key {key!r}: {nearest(key, fields)}")
        if not _accepts(hints[key], value):
            raise UsageError(f"{where}: {key} must be {hints[key]}, got {value!r}")
    converted = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return cls(**converted)


def _accepts(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(part, value) for part in typing.get_args(hint))
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, (list, tuple)) and all(_accepts(item, each) for each in value)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is not None or not isinstance(hint, type):
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
