"""How much is asked of a server and when: lengths, arrival times, traces.

Closed loop: each of `concurrency` clients sends its next request when its last has ended. Open loop:
requests come at times that do not depend on the answers, by a Poisson process, at equal gaps, or as a
trace says. Everything is drawn from a seed, so every server gets the same load.
"""

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from hasten.errors import UsageError

Arrivals = Literal["poisson", "constant"]

MAX_LENGTH = 2**31 - 1  # what KServe's INT32 holds
MAX_SPREAD = 16  # a lognormal length is at most this many times its median
_LENGTHS = re.compile(r"(?P<low>\d+)(-(?P<high>\d+))?|lognormal:(?P<median>\d+):(?P<sigma>\d*\.?\d+)")


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens: fixed (low = high), uniform, or lognormal."""

    text: str
    low: int
    high: int
    sigma: float | None = None

    @classmethod
    def parse(cls, text: str, flag: str) -> "Lengths":
        """Of "128", "64-256" or "lognormal:128:0.5" (median and sigma of the logarithm).

        Raises:
            UsageError: it is none of them, or a length is 0 or above MAX_LENGTH.
        """
        match = _LENGTHS.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"{flag} must be like 128, 64-256 or lognormal:128:0.5, got {text!r}")
        if match["median"] is not None:
            median = int(match["median"])
            lengths = cls(text, median, median * MAX_SPREAD, float(match["sigma"]))
        else:
            lengths = cls(text, int(match["low"]), int(match["high"] or match["low"]))
        if not 1 <= lengths.low <= lengths.high <= MAX_LENGTH:
            raise UsageError(f"{flag} needs lengths from 1 to {MAX_LENGTH}, the lower first, got {text!r}")
        return lengths

    def draw(self, source: random.Random) -> int:
        if self.sigma is not None:
            return min(self.high, max(1, round(self.low * math.exp(source.gauss(0.0, self.sigma)))))
        return self.low if self.low == self.high else source.randint(self.low, self.high)

    @property
    def mean(self) -> float:
        """Without the cut of a lognormal's ends."""
        if self.sigma is not None:
            return self.low * math.exp(self.sigma**2 / 2)
        return (self.low + self.high) / 2


class TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request of a trace; arrival_s counts from the trace's beginning."""

    arrival_s: Annotated[float, msgspec.Meta(ge=0)]
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]


def read_trace(path: Path) -> tuple[TraceLine, ...]:
    """The requests of a file of JSON lines, in the order of their arrival.

    Raises:
        UsageError: it cannot be read, is empty, or a line is not a request.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error.strerror}") from error
    decoder = msgspec.json.Decoder(TraceLine)
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.strip():
                lines.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            example = '{"arrival_s": 0.5, "prompt_tokens": 128, "output_tokens": 64}'
            raise UsageError(f"{path}, line {number}: {error}; a line is like {example}") from error
    if not lines:
        raise UsageError(f"the trace {path} has no requests")
    if any(after.arrival_s < before.arrival_s for before, after in pairwise(lines)):
        raise UsageError(f"the trace {path} goes back in time: sort it by arrival_s")
    return tuple(lines)


def arrival_times_s(kind: Arrivals, rate_per_s: float, source: random.Random) -> Iterator[float]:
    """Endless arrival times from 0 on, `rate_per_s` a second on average."""
    now_s = 0.0
    while True:
        yield now_s
        now_s += source.expovariate(rate_per_s) if kind == "poisson" else 1 / rate_per_s
