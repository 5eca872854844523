"""Where labels and ticks go, for both the PNG plots and the SVG charts: plain geometry, no drawing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """An axis-parallel rectangle; y may grow up or down, as long as it does so for all boxes."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def distance(self, other: "Box") -> float:
        across = max(other.left - self.right, self.left - other.right, 0.0)
        up = max(other.bottom - self.top, self.bottom - other.top, 0.0)
        return math.hypot(across, up)

    def is_inside(self, other: "Box") -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )


DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def place_labels(anchors: Sequence[Box], sizes: Sequence[tuple[float, float]], bounds: Box, gap: float) -> list[Box]:
    """A box for each anchor's label that touches no other label and no anchor, and stays inside `bounds`.

    Labels are placed one after the other; of several orders the one whose labels lie nearest to
    their anchors is taken. Where there are more labels than room, some overlap.

    Args:
        anchors: the marks that are named, whiskers included.
        sizes: width and height of each label. gap: least distance of a label from its anchor.
    """
    indices = range(len(anchors))
    keys = (lambda i: i, lambda i: anchors[i].left, lambda i: anchors[i].bottom)
    orders = [sorted(indices, key=key, reverse=is_reversed) for key in keys for is_reversed in (False, True)]
    arrangements = [_arrange(order, anchors, sizes, bounds, gap) for order in orders]
    return min(arrangements, key=lambda arrangement: arrangement[0])[1]


def _arrange(
    order: Sequence[int], anchors: Sequence[Box], sizes: Sequence[tuple[float, float]], bounds: Box, gap: float
) -> tuple[float, list[Box]]:
    """Labels placed greedily in `order`, and how bad the arrangement is."""
    placed: dict[int, Box] = {}
    leaders: list[Box] = []
    badness = 0.0
    for index in order:
        others = [anchor for other, anchor in enumerate(anchors) if other != index]
        box, penalty = _place(anchors[index], sizes[index], bounds, gap, (others, list(placed.values()), leaders))
        placed[index] = box
        leaders += _leader(anchors[index], box)
        badness += penalty + box.distance(anchors[index])
    return badness, [placed[index] for index in range(len(anchors))]


def _place(
    anchor: Box,
    size: tuple[float, float],
    bounds: Box,
    gap: float,
    taken: tuple[Sequence[Box], Sequence[Box], Sequence[Box]],
) -> tuple[Box, float]:
    """The label's box, nearest first, and a penalty: 0 where it is free and no other anchor is near.

    Of equally near boxes the one with most room around it is taken, up to four gaps, then the one
    right of the anchor.

    Args:
        taken: the other anchors, the labels and the leaders that are there already.
    """
    others, labels, leaders = taken

    def is_free(box: Box, clearance: float, crossed: Sequence[Box]) -> bool:
        return (
            box.is_inside(bounds)
            and not any(box.overlaps(other) for other in (*labels, *crossed, *others))
            and not (crossed and any(dot.overlaps(label) for dot in _leader(anchor, box) for label in labels))
            and all(box.distance(other) >= clearance for other in others)
        )

    def room(box: Box) -> float:
        return min([4 * gap, *(box.distance(each) for each in (*others, *labels))])

    for clearance, crossed, penalty in ((2.5 * gap, leaders, 0.0), (0.0, leaders, 5 * gap), (0.0, (), 50 * gap)):
        for step in range(16):
            distance = gap + size[1] * step * 0.4
            tries = [_label_box(anchor, size, direction, distance) for direction in DIRECTIONS]
            free = [box for box in tries if is_free(box, clearance, crossed)]
            if free:
                return max(free, key=room), penalty
    anywhere = [box for box in _everywhere(size, bounds) if not any(box.overlaps(label) for label in labels)]
    return min(anywhere, key=anchor.distance, default=_label_box(anchor, size, (1, 0), gap)), 1000 * gap


def _everywhere(size: tuple[float, float], bounds: Box) -> list[Box]:
    """Boxes all over `bounds`, half a label's height apart."""
    width, height = size
    lefts, bottoms = bounds.right - width - bounds.left, bounds.top - height - bounds.bottom
    corners = [
        (bounds.left + across * height / 2, bounds.bottom + up * height / 2)
        for across in range(max(0, int(2 * lefts / height)) + 1)
        for up in range(max(0, int(2 * bottoms / height)) + 1)
    ]
    return [Box(left, bottom, left + width, bottom + height) for left, bottom in corners]


def _leader(anchor: Box, box: Box) -> list[Box]:
    """Dots on the straight way from the middle of an anchor to the nearest point of its label."""
    x, y = (anchor.left + anchor.right) / 2, (anchor.bottom + anchor.top) / 2
    end_x, end_y = min(max(x, box.left), box.right), min(max(y, box.bottom), box.top)
    dots = [(x + (end_x - x) * part / 10, y + (end_y - y) * part / 10) for part in range(10)]
    return [Box(across - 0.5, up - 0.5, across + 0.5, up + 0.5) for across, up in dots]


def _label_box(anchor: Box, size: tuple[float, float], direction: tuple[int, int], distance: float) -> Box:
    """The label's box when it lies in `direction` of its anchor."""
    (width, height), (across, up) = size, direction
    left = (anchor.left + anchor.right - width) / 2
    bottom = (anchor.bottom + anchor.top - height) / 2
    reach = distance * (0.6 if across and up else 1.0)
    left = anchor.right + reach if across > 0 else anchor.left - reach - width if across < 0 else left
    bottom = anchor.top + reach if up > 0 else anchor.bottom - reach - height if up < 0 else bottom
    return Box(left, bottom, left + width, bottom + height)


def spread_out(positions: Sequence[float], min_gap: float, low: float, high: float) -> list[float]:
    """Moves positions apart to at least `min_gap`, keeping their order, as near as it goes to where they were."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(min_gap, (high - low) / max(1, len(positions) - 1))
    moved = [positions[index] for index in order]
    for _ in range(200):
        is_settled = True
        for first in range(len(moved) - 1):
            missing = gap - (moved[first + 1] - moved[first])
            if missing > 1e-6:
                moved[first] -= missing / 2
                moved[first + 1] += missing / 2
                is_settled = False
        if is_settled:
            break
    shift = max(0.0, low - moved[0]) if moved else 0.0
    moved = [position + shift for position in moved]
    for last in range(len(moved) - 1, -1, -1):
        ceiling = high - gap * (len(moved) - 1 - last)
        moved[last] = min(moved[last], ceiling)
    result = [0.0] * len(positions)
    for index, position in zip(order, moved, strict=True):
        result[index] = position
    return result


def nice_ticks(high: float, count: int = 5) -> list[float]:
    """Round values from 0 to the first one at or above `high`, about `count` of them."""
    if not math.isfinite(high) or high <= 0:
        return [0.0, 1.0]
    raw = high / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


QUALITY_TICKS = (-1.0, -0.1, -0.01, -0.001, 0.0, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def quality_position(change: float) -> float:
    """Where a relative perplexity change lies on an axis that is linear near 0 and logarithmic beyond."""
    return math.copysign(math.log10(1 + abs(change) / 0.0003), change)


def quality_ticks(lowest: float, highest: float) -> list[tuple[float, str]]:
    """(position, text) of the ticks between, and of the first one beyond on either side if it is near."""
    shown = sorted(tick for tick in QUALITY_TICKS if min(lowest * 1.5, 0) <= tick <= max(highest * 1.5, 0.001))
    return [(quality_position(tick), f"{tick * 100:+g} %" if tick else "0 %") for tick in shown]


def shortened(text: str, max_chars: int) -> str:
    """`text` with its middle left out where it is longer than `max_chars`."""
    if len(text) <= max_chars:
        return text
    head = (max_chars - 1) * 2 // 3
    return text[:head] + "…" + text[len(text) - (max_chars - 1 - head) :]
