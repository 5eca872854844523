from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.report.layout import Box, nice_ticks, place_labels, shortened, spread_out


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_spread_out_keeps_order_gap_and_bounds(positions: list[float]) -> None:
    moved = spread_out(positions, 5, 0, 100)
    ordered = sorted(moved)
    assert all(after - before >= 5 - 1e-3 for before, after in pairwise(ordered))
    assert ordered[0] >= -1e-3
    assert ordered[-1] <= 100 + 1e-3
    pairs = [(moved[i], moved[j]) for i in range(len(moved)) for j in range(len(moved)) if positions[i] < positions[j]]
    assert all(first < second for first, second in pairs)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(20, 580), st.floats(20, 380)), min_size=1, max_size=10))
def test_labels_touch_no_other_label(points: list[tuple[float, float]]) -> None:
    bounds = Box(0, 0, 600, 400)
    anchors = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    boxes = place_labels(anchors, [(110, 14)] * len(points), bounds, 4)
    assert all(box.is_inside(bounds) for box in boxes)
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


def test_a_label_alone_lies_right_of_its_point() -> None:
    (box,) = place_labels([Box(95, 95, 105, 105)], [(40, 10)], Box(0, 0, 300, 300), 4)
    assert box == Box(109, 95, 149, 105)


@pytest.mark.parametrize("high", [0.007, 0.9, 1.0, 48.1, 3290, 1e9])
def test_ticks_start_at_zero_and_reach_the_highest(high: float) -> None:
    ticks = nice_ticks(high)
    assert ticks[0] == 0
    assert high <= ticks[-1] * (1 + 1e-9)
    assert len(ticks) <= 7


@pytest.mark.parametrize("high", [0.0, -1.0, float("nan"), float("inf")])
def test_ticks_of_nothing(high: float) -> None:
    assert nice_ticks(high) == [0.0, 1.0]


def test_shortened_keeps_head_and_tail() -> None:
    assert shortened("native-w8a16", 20) == "native-w8a16"
    assert shortened("a-very-long-runtime-name-w8a16", 16) == "a-very-lon…w8a16"
