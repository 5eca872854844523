"""What a Chrome trace of torch's profiler says: work on the GPU, and the calls on the CPU that started it.

The trace's kernel times are CUPTI's. A piece of GPU work and the call that started it share a
correlation id; the kernels of a CUDA graph all have the id of the graph's launch. Reads a file
and computes nothing.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import RuntimeFailedError
from hasten.runtimes.base import MODULE_PREFIX

PHASES = ("prefill", "decode", "sampling")
CALLS = ("cuda_runtime", "cuda_driver")
KERNELS = ("kernel",)
COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Range:
    """Something with a name that took from start to end, on the trace's clock."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Work(Range):
    """A kernel or a copy on the GPU.

    Args:
        is_copy: whether it is a copy or a memset.
        correlation: id of the call that started it.
        launched_s: when that call began, None if the trace has lost it.
        ranges: names of the ranges around that call, innermost last.
    """

    is_copy: bool
    correlation: int
    launched_s: float | None
    ranges: tuple[str, ...]


@dataclass(frozen=True)
class Timeline:
    """A trace, each part ordered by time.

    Args:
        phases: the ranges named "prefill", "decode" and "sampling" on the CPU.
        calls: of the CUDA runtime and driver.
        work: on the GPU; () in the trace of a CPU.
    """

    phases: tuple[Range, ...]
    calls: tuple[Range, ...]
    work: tuple[Work, ...]


def read_timeline(path: Path) -> Timeline:
    """Reads a trace file, compressed if its name ends in .gz.

    Raises:
        RuntimeFailedError: the file is no trace.
    """
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        events = [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]
        return _timeline(events)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeFailedError(f"the runtime's trace {path} cannot be read: {error}") from error


def _timeline(events: Iterable[Mapping[str, Any]]) -> Timeline:
    by_category: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        by_category[event.get("cat", "")].append(event)
    ranges = [
        event
        for event in by_category["user_annotation"]
        if event["name"] in PHASES or event["name"].startswith(MODULE_PREFIX)
    ]
    calls = [event for category in CALLS for event in by_category[category]]
    around = _ranges_around(ranges, calls)
    started = {event["args"]["correlation"]: event for event in calls if "correlation" in event.get("args", {})}
    work = []
    for category in (*KERNELS, *COPIES):
        for event in by_category[category]:
            correlation = event["args"]["correlation"]
            call = started.get(correlation)
            work.append(
                Work(
                    event["name"],
                    *_span(event),
                    is_copy=category in COPIES,
                    correlation=correlation,
                    launched_s=None if call is None else call["ts"] * 1e-6,
                    ranges=() if call is None else around[id(call)],
                )
            )
    return Timeline(
        phases=_sorted(Range(event["name"], *_span(event)) for event in ranges if event["name"] in PHASES),
        calls=_sorted(Range(event["name"], *_span(event)) for event in calls),
        work=tuple(sorted(work, key=lambda each: each.start_s)),
    )


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    return event["ts"] * 1e-6, (event["ts"] + event.get("dur", 0.0)) * 1e-6


def _sorted(ranges: Iterable[Range]) -> tuple[Range, ...]:
    return tuple(sorted(ranges, key=lambda each: each.start_s))


def _ranges_around(
    ranges: Iterable[Mapping[str, Any]], calls: Iterable[Mapping[str, Any]]
) -> dict[int, tuple[str, ...]]:
    """Names of the ranges open in the call's thread when it began, innermost last, by the id() of its event."""
    threads: defaultdict[Any, list[tuple[float, float, Mapping[str, Any]]]] = defaultdict(list)
    for event in ranges:
        threads[event["tid"]].append((event["ts"], -event["dur"], event))
    found: dict[int, tuple[str, ...]] = {}
    for thread in {call["tid"] for call in calls}:
        waiting = sorted(threads[thread], key=lambda each: each[:2], reverse=True)
        open_ranges: list[Mapping[str, Any]] = []
        for call in sorted((call for call in calls if call["tid"] == thread), key=lambda call: call["ts"]):
            while waiting and waiting[-1][0] <= call["ts"]:
                open_ranges.append(waiting.pop()[2])
            open_ranges = [each for each in open_ranges if each["ts"] + each["dur"] >= call["ts"]]
            found[id(call)] = tuple(each["name"] for each in open_ranges)
    return found
