"""What a speed-up saves in machines and money, from measured throughput and a price that the user gives.

    machines            = load / output tokens a second of one machine at its best measured concurrency
    cost per 1 M tokens = price per machine-hour / (output tokens a second * 3600) * 1,000,000
    monthly saving      = (machines before - machines after) * price per machine-hour * 730 h

With a load in tokens a second the machines are rounded up to whole ones; without one the load is
what one baseline machine can do, and the machines after are a fraction. Machines are taken as fully
busy, before and after. No saving is claimed where the spreads of the two throughputs overlap.
"""

import math
from dataclasses import dataclass

from hasten.bench.metrics import SpeedSummary
from hasten.errors import UsageError

HOURS_A_MONTH = 730
FORMULAS = (
    "machines = load ÷ output tokens/s of one machine at its best measured concurrency",
    "cost per 1 M output tokens = price per machine-hour ÷ (output tokens/s × 3600) × 1,000,000",
    f"monthly saving = (machines before − machines after) × price per machine-hour × {HOURS_A_MONTH} h",
)


@dataclass(frozen=True)
class Prices:
    """What the user knows about cost and load.

    Args:
        per_machine_hour: price of one machine like the measured one for an hour; None if unknown.
        currency: as printed behind amounts.
        load_tokens_per_s: output tokens a second to serve; None takes what one baseline machine can do.

    Raises:
        UsageError: a price or load that is not above 0.
    """

    per_machine_hour: float | None = None
    currency: str = "USD"
    load_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("price per hour", self.per_machine_hour), ("load", self.load_tokens_per_s)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"the {name} must be above 0, got {value}")


@dataclass(frozen=True)
class Savings:
    """Machines and money before (baseline) and after (candidate).

    Args:
        before, after: the two at the concurrency where each delivers most output tokens a second.
        is_claimed: whether the spreads of their throughputs do not overlap.
        cost_per_million_before, cost_per_million_after, monthly_saving: None without a price.
    """

    before: SpeedSummary
    after: SpeedSummary
    is_claimed: bool
    load_tokens_per_s: float
    has_given_load: bool
    machines_before: float
    machines_after: float
    cost_per_million_before: float | None
    cost_per_million_after: float | None
    monthly_saving: float | None


def best_throughput(speeds: tuple[SpeedSummary, ...]) -> SpeedSummary | None:
    """The concurrency at which one machine delivers most; None if none was measured."""
    usable = [speed for speed in speeds if 0 < speed.output_throughput_per_s.median < math.inf]
    return max(usable, key=lambda speed: speed.output_throughput_per_s.median, default=None)


def savings(baseline: tuple[SpeedSummary, ...], candidate: tuple[SpeedSummary, ...], prices: Prices) -> Savings | None:
    """None where either side has no measured throughput."""
    before, after = best_throughput(baseline), best_throughput(candidate)
    if before is None or after is None:
        return None
    rate_before, rate_after = before.output_throughput_per_s.median, after.output_throughput_per_s.median
    has_given_load = prices.load_tokens_per_s is not None
    load = prices.load_tokens_per_s if prices.load_tokens_per_s is not None else rate_before
    machines_before, machines_after = load / rate_before, load / rate_after
    if has_given_load:
        machines_before, machines_after = math.ceil(machines_before), math.ceil(machines_after)
    price = prices.per_machine_hour
    return Savings(
        before=before,
        after=after,
        is_claimed=not before.output_throughput_per_s.overlaps(after.output_throughput_per_s),
        load_tokens_per_s=load,
        has_given_load=has_given_load,
        machines_before=machines_before,
        machines_after=machines_after,
        cost_per_million_before=None if price is None else cost_per_million_tokens(price, rate_before),
        cost_per_million_after=None if price is None else cost_per_million_tokens(price, rate_after),
        monthly_saving=None if price is None else (machines_before - machines_after) * price * HOURS_A_MONTH,
    )


def cost_per_million_tokens(price_per_machine_hour: float, tokens_per_s: float) -> float:
    return price_per_machine_hour / (tokens_per_s * 3600) * 1e6
