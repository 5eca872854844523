import math

import pytest

from hasten.report import units


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (9.996, "10.00"), (4e-9, "4.00e-09")],
)
def test_significant_keeps_three_digits(value: float, expected: str) -> None:
    assert units.significant(value) == expected


@pytest.mark.parametrize("absent", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "text",
    [
        units.significant,
        units.duration,
        units.memory,
        units.ratio,
        units.percent,
        units.percent_change,
        units.kl_divergence,
    ],
)
def test_what_is_not_a_number_is_not_measured(text, absent) -> None:
    assert text(absent) == "not measured"


def test_durations_choose_their_unit() -> None:
    assert [units.duration(s) for s in (5e-5, 0.0229, 1.5, 600.0)] == ["50.0 µs", "22.9 ms", "1.50 s", "10.0 min"]


def test_memory_is_in_binary_units() -> None:
    assert units.memory(782 * 2**20) == "782 MiB"
    assert units.memory(15 * 2**30) == "15.0 GiB"


def test_a_change_has_its_sign_and_no_negative_zero() -> None:
    assert [units.percent_change(x) for x in (0.0031, -0.0031, -1e-7)] == ["+0.31 %", "−0.31 %", "0.00 %"]


def test_a_size_change_says_less_or_more() -> None:
    assert units.size_change(25, 100) == "4.00× less"
    assert units.size_change(110, 100) == "1.10× more"
    assert units.size_change(100, 100) == "the same"
    assert units.size_change(100, 0) == ""
