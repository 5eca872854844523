"""Numbers as text with the units that readers expect. What is absent or not finite is never a number.

Every function takes SI base units (seconds, bytes, ratios) and gives what is printed.
"""

import math

NOT_MEASURED = "not measured"
MEBIBYTE = 2**20
GIBIBYTE = 2**30


def is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def significant(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, never in fewer than its whole digits: 1,234, 12.3, 0.0123."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if decimals > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """The unit follows the size: µs, ms, s, min."""
    if seconds is None or not math.isfinite(seconds):
        return NOT_MEASURED
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if abs(seconds) < limit:
            return f"{significant(seconds * factor)} {unit}"
    return f"{significant(seconds / 60)} min"


def memory(num_bytes: float | None) -> str:
    """MiB up to 10 GiB, so that values stay comparable, GiB from there."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return NOT_MEASURED
    if num_bytes < 10 * GIBIBYTE:
        return f"{significant(num_bytes / MEBIBYTE)} MiB"
    return f"{significant(num_bytes / GIBIBYTE)} GiB"


def ratio(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def kl_divergence(nats: float | None) -> str:
    """Below 0.00001 nats a token two distributions are the same for every purpose here."""
    if nats is None or not math.isfinite(nats):
        return NOT_MEASURED
    return "0" if nats == 0 else "< 0.00001" if abs(nats) < 1e-5 else significant(nats, 2)


def size_change(value: float, reference: float) -> str:
    """How a size compares with a reference: "4.2× less", "1.3× more"; "" where a ratio makes no sense."""
    if not (value > 0 and reference > 0 and math.isfinite(value) and math.isfinite(reference)):
        return ""
    if 0.995 < value / reference < 1.005:
        return "the same"
    return f"{ratio(reference / value)} less" if value < reference else f"{ratio(value / reference)} more"


def percent(share: float | None) -> str:
    """A share of one as a percentage: 0.873 is "87 %"."""
    if share is None or not math.isfinite(share):
        return NOT_MEASURED
    return f"{share * 100:.0f} %" if share >= 0.1 or share == 0 else f"{share * 100:.1f} %"


def percent_change(change: float | None) -> str:
    """A relative change with its sign: 0.0031 is "+0.31 %"."""
    if change is None or not math.isfinite(change):
        return NOT_MEASURED
    points = change * 100
    decimals = 2 if abs(points) < 10 else 1 if abs(points) < 100 else 0
    if round(points, decimals) == 0:
        return "0.00 %"
    return f"{points:+,.{decimals}f} %".replace("-", "−")


def money(amount: float | None, currency: str) -> str:
    if amount is None or not math.isfinite(amount):
        return NOT_MEASURED
    decimals = 0 if abs(amount) >= 1000 else 2 if abs(amount) >= 0.1 else 4
    return f"{amount:,.{decimals}f} {currency}".replace("-", "−")
