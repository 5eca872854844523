from dataclasses import dataclass
from typing import Literal

import pytest

from hasten.config import SCHEMES, from_mapping, nearest, scheme_named
from hasten.errors import UsageError


@dataclass(frozen=True)
class Settings:
    name: str = "a"
    count: int = 1
    share: float = 0.5
    sizes: tuple[int, ...] = (1,)
    limit: int | None = None
    mode: Literal["fast", "small"] = "fast"


def test_mapping_becomes_a_config() -> None:
    values = {"count": 3, "share": 1, "sizes": [1, 2], "limit": None, "mode": "small"}
    assert from_mapping(Settings, values, "here") == Settings("a", 3, 1, (1, 2), None, "small")


def test_unknown_key_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"here has an unknown key 'cuont': did you mean count\?"):
        from_mapping(Settings, {"cuont": 3}, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 3),
        ("count", "3"),
        ("count", True),
        ("count", 1.0),
        ("share", "half"),
        ("share", False),
        ("sizes", [1, "2"]),
        ("sizes", 3),
        ("limit", "none"),
        ("mode", "slow"),
    ],
)
def test_value_of_another_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"here: {key} must be"):
        from_mapping(Settings, {key: value}, "here")


def test_schemes_are_found_by_name() -> None:
    assert all(scheme_named(name).name == name for name in SCHEMES)
    assert [name for name, scheme in SCHEMES.items() if scheme.is_quantized] == ["w8a16", "w4a16", "fp8"]
    with pytest.raises(UsageError, match=r"unknown scheme 'w8a61': did you mean w8a16\? allowed: fp32, bf16"):
        scheme_named("w8a61")


def test_nothing_near_is_not_guessed() -> None:
    assert nearest("zzz", ["fp32", "bf16"]) == "allowed: fp32, bf16"
