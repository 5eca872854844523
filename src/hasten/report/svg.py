"""Charts as inline SVG, written by hand: no script is needed to see them, and a tooltip adds the details.

Every text that comes from outside is escaped by `tag`. Elements carry `data-tip` for the tooltip and
a class `kN` for the colour of candidate N, which the page's style sheet defines for light and dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from hasten.report.layout import Box, nice_ticks, place_labels, quality_position, quality_ticks, shortened, spread_out
from hasten.report.units import significant

WIDTH = 440
CHAR = 7.2  # width of a character at 12 px in a wide system font
ROW = 30
MAX_LABEL_CHARS = 22


@dataclass(frozen=True)
class Bar:
    """One horizontal bar; `value` None draws `text` (why it is absent) instead."""

    label: str
    style: str
    value: float | None
    low: float | None
    high: float | None
    text: str
    tip: str


@dataclass(frozen=True)
class Dots:
    """P50, P95 and P99 of one row; empty `values` draws `text` instead."""

    label: str
    style: str
    values: tuple[float, ...]
    text: str
    tip: str


@dataclass(frozen=True)
class Line:
    """One series over concurrency: (concurrency, value, low, high) for each point."""

    label: str
    style: str
    marker: str
    dash: str
    points: tuple[tuple[int, float, float, float], ...]
    tips: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One candidate in a plane."""

    label: str
    style: str
    marker: str
    x: float
    y: float
    tip: str
    is_emphasized: bool = False


@dataclass(frozen=True)
class Segment:
    """One part of a stacked bar; style is `gN`."""

    name: str
    style: str
    value: float
    tip: str


def tag(name: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """One element; every child and attribute that is not Markup is escaped. class_ is class, _ is -."""
    parts = []
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.1f}" if isinstance(value, float) else str(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    opened = Markup("<" + name + "".join(parts))
    if not children:
        return opened + Markup("/>")
    return opened + Markup(">") + Markup("").join(escape(child) for child in children) + Markup(f"</{name}>")


def bar_chart(bars: Sequence[Bar], unit: str, description: str) -> Markup:
    """Horizontal bars from 0 with whiskers for the spread, the value printed at the end."""
    left = _label_width([bar.label for bar in bars])
    text_room = 8 + CHAR * max((len(bar.text) for bar in bars if bar.value is not None), default=8)
    right = WIDTH - text_room
    highest = max((bar.high or bar.value or 0 for bar in bars), default=0)
    ticks = nice_ticks(highest, _tick_count(right - left))
    scale = (right - left) / ticks[-1]
    height = 8 + ROW * len(bars)
    parts = _value_axis(ticks, left, scale, height, unit)
    for index, bar in enumerate(bars):
        top = 8 + ROW * index
        middle = top + ROW / 2 - 2
        parts.append(_row_label(bar.label, left, middle))
        if bar.value is None:
            parts.append(_absent(bar.text, left, middle))
            continue
        length = max(1.0, bar.value * scale)
        shapes = [
            tag("rect", x=float(left), y=top + 4.0, width=length, height=ROW - 12.0, rx=2, class_=f"bar {bar.style}")
        ]
        if bar.low is not None and bar.high is not None:
            shapes.append(_whisker(left + bar.low * scale, left + bar.high * scale, middle))
        end = left + max(bar.value, bar.high or 0) * scale
        shapes.append(tag("text", bar.text, x=end + 6, y=middle + 4, class_="value"))
        parts.append(tag("g", *shapes, data_tip=bar.tip, class_="hit"))
    return _svg(parts, height + 34, description)


def dot_chart(rows: Sequence[Dots], unit: str, description: str) -> Markup:
    """For each row P50 as a circle, P95 as a short and P99 as a tall tick, the values at the right."""
    left = _label_width([row.label for row in rows])
    right = WIDTH - 16 - CHAR * max((len(row.text) for row in rows if row.values), default=8)
    highest = max((max(row.values) for row in rows if row.values), default=0)
    ticks = nice_ticks(highest, _tick_count(right - left))
    scale = (right - left) / ticks[-1]
    height = 8 + ROW * len(rows)
    parts = _value_axis(ticks, left, scale, height, unit)
    for index, row in enumerate(rows):
        middle = 8 + ROW * (index + 0.5) - 2
        parts.append(_row_label(row.label, left, middle))
        if not row.values:
            parts.append(_absent(row.text, left, middle))
            continue
        positions = [left + value * scale for value in row.values]
        shapes = [
            tag("line", x1=positions[0], x2=positions[-1], y1=middle, y2=middle, class_=f"stroke thick {row.style}")
        ]
        for half, position in zip((5.0, 9.0), positions[1:], strict=False):
            shapes.append(tag("line", x1=position, x2=position, y1=middle - half, y2=middle + half, class_="whisker"))
        shapes.append(_marker("o", positions[0], middle, row.style))
        shapes.append(tag("text", row.text, x=float(WIDTH), y=middle + 4, text_anchor="end", class_="value"))
        parts.append(tag("g", *shapes, data_tip=row.tip, class_="hit"))
    return _svg(parts, height + 34, description)


def line_chart(lines: Sequence[Line], unit: str, description: str, ideal: Line | None = None) -> Markup:
    """Series over concurrency, evenly spaced, each labelled at its right end; `ideal` is dashed."""
    levels = sorted({point[0] for line in lines for point in line.points})
    labels = [shortened(line.label, MAX_LABEL_CHARS) for line in lines]
    left, right = 44.0, WIDTH - 20 - CHAR * max((len(label) for label in labels), default=4)
    height = max(260.0, 20.0 * len(lines) + 40)
    highest = max((point[3] for line in lines for point in line.points), default=0)
    if ideal is not None:
        highest = min(max(highest, ideal.points[-1][1]), highest * 1.35)
    ticks = nice_ticks(highest, 5)
    x_of = {level: left + (right - left) * (index + 0.5) / len(levels) for index, level in enumerate(levels)}

    def y_of(value: float) -> float:
        return height - (height - 22) * value / ticks[-1]

    parts = [tag("text", unit, x=4, y=4, class_="axis")]
    for tick in ticks:
        parts.append(tag("line", x1=left, x2=right, y1=y_of(tick), y2=y_of(tick), class_="grid"))
        parts.append(tag("text", _tick_text(tick), x=left - 6, y=y_of(tick) + 4, text_anchor="end", class_="tick"))
    for level, x in x_of.items():
        parts.append(tag("text", str(level), x=x, y=height + 18, text_anchor="middle", class_="tick"))
    parts.append(tag("text", "concurrency", x=right, y=height + 36, text_anchor="end", class_="axis"))
    if ideal is not None:
        exact = [(x_of[level], value) for level, value, _, _ in ideal.points]
        parts.append(_polyline([(x, y_of(value)) for x, value in _clipped(exact, ticks[-1])], "ideal", "4 4"))
    ends = [y_of(line.points[-1][1]) for line in lines]
    for line, label, label_y in zip(lines, labels, spread_out(ends, 17, 22, height), strict=True):
        shapes = [_polyline([(x_of[level], y_of(value)) for level, value, _, _ in line.points], line.style, line.dash)]
        for (level, value, low, high), tip in zip(line.points, line.tips, strict=True):
            shapes.append(tag("line", x1=x_of[level], x2=x_of[level], y1=y_of(low), y2=y_of(high), class_="whisker"))
            marker = _marker(line.marker, x_of[level], y_of(value), line.style)
            target = tag("circle", cx=x_of[level], cy=y_of(value), r=11, class_="target")
            shapes.append(tag("g", target, marker, data_tip=tip, class_="hit"))
        last = x_of[line.points[-1][0]]
        shapes.append(tag("line", x1=last + 6, y1=y_of(line.points[-1][1]), x2=right + 4, y2=label_y, class_="leader"))
        shapes.append(tag("text", label, x=right + 8, y=label_y + 4, class_="label"))
        parts.append(tag("g", *shapes, class_="series"))
    return _svg(parts, height + 46, description)


@dataclass(frozen=True)
class VerticalAxis:
    """The y axis of a scatter: (position, text) of each tick; `limit` is where "worse than allowed" starts."""

    label: str
    ticks: Sequence[tuple[float, str]]
    low: float
    high: float
    limit: float | None = None


def quality_scatter(points: Sequence[Point], x_label: str, limit: float, description: str) -> Markup:
    """Perplexity change over speed, up is worse; what lies beyond `limit` is shaded."""
    lowest, highest = min([0.0, *(point.y for point in points)]), max([limit, *(point.y for point in points)])
    moved = [replace(point, y=quality_position(point.y)) for point in points]
    low, high = quality_position(lowest) - 0.6, quality_position(highest) + 0.3
    ticks = quality_ticks(lowest, highest)
    axis = VerticalAxis("perplexity change", ticks, low, high, quality_position(limit))
    return _scatter(moved, x_label, axis, description)


def plain_scatter(points: Sequence[Point], x_label: str, y_label: str, description: str) -> Markup:
    """Two quantities from 0."""
    ticks = nice_ticks(max((point.y for point in points), default=0), 5)
    axis = VerticalAxis(y_label, [(tick, _tick_text(tick)) for tick in ticks], 0.0, ticks[-1])
    return _scatter(points, x_label, axis, description)


def _scatter(points: Sequence[Point], x_label: str, axis: VerticalAxis, description: str) -> Markup:
    left, right, top, bottom = 62.0, WIDTH - 10.0, 26.0, 320.0
    limit = axis.limit
    x_ticks = nice_ticks(max((point.x for point in points), default=0) * 1.08, 5)

    def x_of(value: float) -> float:
        return left + (right - left) * value / x_ticks[-1]

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - axis.low) / (axis.high - axis.low)

    parts = [tag("text", axis.label, x=4, y=14, class_="axis")]
    if limit is not None:
        parts.append(
            tag("rect", x=left, y=top, width=right - left, height=max(0.0, y_of(limit) - top), class_="forbidden")
        )
        parts.append(tag("text", "worse than allowed", x=right - 6, y=top + 14, text_anchor="end", class_="tick"))
        parts.append(tag("line", x1=left, x2=right, y1=y_of(limit), y2=y_of(limit), class_="limit"))
    for value, text in axis.ticks:
        if axis.low <= value <= axis.high:
            parts.append(tag("line", x1=left, x2=right, y1=y_of(value), y2=y_of(value), class_="grid"))
            parts.append(tag("text", text, x=left - 6, y=y_of(value) + 4, text_anchor="end", class_="tick"))
    for tick in x_ticks:
        parts.append(tag("text", _tick_text(tick), x=x_of(tick), y=bottom + 18, text_anchor="middle", class_="tick"))
    parts.append(tag("text", x_label, x=right, y=bottom + 36, text_anchor="end", class_="axis"))
    spots = [(x_of(point.x), y_of(point.y)) for point in points]
    labels = [shortened(point.label, MAX_LABEL_CHARS) for point in points]
    sizes = [(CHAR * len(label) + 2, 17.0) for label in labels]
    anchors = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    boxes = place_labels(anchors, sizes, Box(left + 2, top + 18, right, bottom - 2), 4)
    for point, (x, y), label, anchor, box in zip(points, spots, labels, anchors, boxes, strict=True):
        middle = (box.bottom + box.top) / 2
        nearest = min(max(x, box.left), box.right)
        leader = tag("line", x1=x, y1=y, x2=nearest, y2=middle, class_="leader")
        shapes = [leader] if box.distance(anchor) > 6 else []
        shapes.append(tag("circle", cx=x, cy=y, r=11, class_="target"))
        shapes.append(_marker(point.marker, x, y, point.style))
        emphasis = "label strong" if point.is_emphasized else "label"
        shapes.append(tag("text", label, x=box.left + 1, y=middle + 4, class_=emphasis))
        parts.append(tag("g", *shapes, data_tip=point.tip, class_="hit"))
    return _svg(parts, bottom + 46, description)


def stacked_bars(rows: Sequence[tuple[str, str, Sequence[Segment]]], unit: str, description: str) -> Markup:
    """Rows of (label, text at the end, segments), all on one scale."""
    left = _label_width([label for label, _, _ in rows])
    right = WIDTH - 10 - CHAR * max((len(text) for _, text, _ in rows), default=8)
    highest = max((sum(part.value for part in segments) for _, _, segments in rows), default=0)
    ticks = nice_ticks(highest * 0.999, _tick_count(right - left))
    scale = (right - left) / ticks[-1]
    height = 8 + ROW * len(rows)
    parts = _value_axis(ticks, left, scale, height, unit)
    for index, (label, text, segments) in enumerate(rows):
        top = 8 + ROW * index
        parts.append(_row_label(label, left, top + ROW / 2 - 2))
        x = float(left)
        for segment in segments:
            width = segment.value * scale
            shape = tag(
                "rect", x=x, y=top + 3.0, width=max(width, 0.2), height=ROW - 10.0, class_=f"segment {segment.style}"
            )
            parts.append(tag("g", shape, data_tip=segment.tip, class_="hit"))
            x += width
        parts.append(tag("text", text, x=x + 6, y=top + ROW / 2 + 2, class_="value"))
    return _svg(parts, height + 34, description)


def _svg(parts: Sequence[Markup], height: float, description: str) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=description)


def _label_width(labels: Sequence[str]) -> float:
    return 10 + CHAR * min(MAX_LABEL_CHARS, max((len(label) for label in labels), default=4))


def _row_label(label: str, left: float, middle: float) -> Markup:
    return tag("text", shortened(label, MAX_LABEL_CHARS), x=left - 8, y=middle + 4, text_anchor="end", class_="label")


def _absent(text: str, left: float, middle: float) -> Markup:
    shown = shortened(text, int((WIDTH - left - 8) / CHAR))
    return tag("text", shown, x=left + 4, y=middle + 4, class_="absent", data_tip=text)


def _value_axis(ticks: Sequence[float], left: float, scale: float, height: float, unit: str) -> list[Markup]:
    parts = []
    for tick in ticks:
        x = left + tick * scale
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=height, class_="grid"))
        parts.append(tag("text", _tick_text(tick), x=x, y=height + 14, text_anchor="middle", class_="tick"))
    parts.append(tag("text", unit, x=left + ticks[-1] * scale, y=height + 30, text_anchor="end", class_="axis"))
    return parts


def _tick_count(width: float) -> int:
    """As many as leave room for a number of six characters each."""
    return max(1, int(width / (CHAR * 8)))


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else significant(value, 2)


def _whisker(low: float, high: float, middle: float) -> Markup:
    path = f"M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8M{low:.1f} {middle:.1f}H{high:.1f}"
    return tag("path", d=path, class_="whisker")


def _marker(marker: str, x: float, y: float, style: str) -> Markup:
    shapes = {
        "o": f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        "s": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        "D": f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z",
        "^": f"M{x:.1f} {y - 6:.1f}l6 10.5h-12z",
        "v": f"M{x:.1f} {y + 6:.1f}l6 -10.5h-12z",
        "P": f"M{x - 2:.1f} {y - 6:.1f}h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    }
    return tag("path", d=shapes[marker], class_=f"marker {style}")


def _polyline(points: Sequence[tuple[float, float]], style: str, dash: str) -> Markup:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=text, class_=f"stroke {style}", stroke_dasharray=dash or None)


def _clipped(points: Sequence[tuple[float, float]], highest: float) -> list[tuple[float, float]]:
    """The start of a rising line, up to where it reaches `highest`."""
    shown: list[tuple[float, float]] = []
    for x, value in points:
        if value > highest:
            if shown:
                before_x, before = shown[-1]
                shown.append((before_x + (x - before_x) * (highest - before) / (value - before), highest))
            break
        shown.append((x, value))
    return shown
