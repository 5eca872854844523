"""Checked readers for the values of a config.json: each returns the value or raises ModelError.

A config is a stranger's file: a size may be text, negative or absurd. `null` counts as absent.
"""

import math
from collections.abc import Mapping
from typing import Any

from hasten.errors import ModelError

MAX_SIZE = 1 << 24
"""No size in a config is larger; a larger one is a broken file, not a model."""


def is_number(value: Any) -> bool:
    """A finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_number(
    values: Mapping[str, Any], key: str, default: float | None, low: float | None = None, where: str = ""
) -> float:
    """The number at `key`, at least `low`; `where` is put before the key in the message."""
    value = default if values.get(key) is None else values[key]
    if not is_number(value) or (low is not None and value < low):  # type: ignore[operator]
        allowed = "a number" if low is None else f"a number of at least {low:g}"
        raise ModelError(f"config.json: {where}{key} must be {allowed}, got {value!r:.80}")
    return float(value)  # type: ignore[arg-type]


def read_size(
    values: Mapping[str, Any], key: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE
) -> int:
    """The whole number at `key`, from `low` to `high`."""
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelError(f"config.json: {key} must be a whole number from {low} to {high}, got {value!r:.80}")
    return value


def read_flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """The truth value at `key`."""
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be true or false, got {value!r:.80}")
    return value
