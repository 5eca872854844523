"""Judges candidates against the baseline and picks one. Quality comes before speed.

Not recommended: what failed, what is worse than the user allowed, and what is not faster
than the baseline by more than the spread of the measurement.
"""

from dataclasses import dataclass
from typing import Literal

Target = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Gate:
    """What the user asks of a candidate.

    Args:
        target: "latency" judges end-to-end latency of one request at the lowest measured
            concurrency, "throughput" output tokens a second at the highest.
        max_perplexity_increase: relative to the baseline; 0.02 is two percent.
        max_kl: mean KL divergence from the baseline in nats a token.
    """

    target: Target = "latency"
    max_perplexity_increase: float = 0.02
    max_kl: float = 0.05


@dataclass(frozen=True)
class Verdict:
    """One candidate judged.

    Args:
        speedup: baseline over candidate (latency) or candidate over baseline (throughput),
            of medians; None where either was not measured.
        is_speedup_claimed: whether the spreads of the two do not overlap.
        passes_quality: None where quality was not measured.
        is_eligible: may be picked: it ran, passes quality, and its speed-up is claimed.
        reason: one sentence, why it is recommended or why not.
    """

    candidate: str
    speedup: float | None
    is_speedup_claimed: bool
    passes_quality: bool | None
    is_eligible: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The verdicts on all candidates and the one that is recommended.

    Args:
        baseline: name of the baseline candidate.
        pick: name of the recommended candidate; None if nothing beats the baseline.
    """

    baseline: str
    pick: str | None
    gate: Gate
    verdicts: tuple[Verdict, ...]
