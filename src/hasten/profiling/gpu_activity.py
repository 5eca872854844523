"""What the GPU does in a decode step: launches, busy time, gaps, time by part of the model.

Counted in a trace between the first kernel that decode launched and the last. A profiler makes
each launch on the CPU slower but hardly a kernel, so the busy time belongs to the step as it is
without a profiler, and the gaps to the traced step.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from hasten.bench.result import OperatorTime
from hasten.profiling.kernels import groups_of
from hasten.profiling.timeline import Range, Timeline, Work

RESOLUTION_S = 1e-8  # of a trace's times


@dataclass(frozen=True)
class GpuActivity:
    """The GPU in one decode step, the mean over the traced steps.

    Args:
        traced_step_s: length of a step under the profiler.
        busy_s: time in which at least one kernel or copy ran.
        launches: calls on the CPU that gave the GPU work: kernels, copies, whole graphs.
        waits: calls in which the CPU waited for the GPU.
        kernels, copies: that ran on the GPU.
        gaps: times in which nothing ran between two pieces of work. median_gap_s: None without any.
        groups: time on the GPU by part of the step, largest first; kernels that overlap count both.
    """

    num_steps: int
    traced_step_s: float
    busy_s: float
    launches: float
    waits: float
    kernels: float
    copies: float
    gaps: float
    median_gap_s: float | None
    groups: tuple[OperatorTime, ...]

    @property
    def traced_busy_share(self) -> float:
        return self.busy_s / self.traced_step_s

    def busy_share(self, step_s: float) -> float:
        """Share of a step that took step_s without a profiler; kernels are a little slower with one, so at most 1."""
        return min(1.0, self.busy_s / step_s)


def gpu_activity(timeline: Timeline) -> GpuActivity | None:
    """None where the trace has no decode steps, or no work of theirs on a GPU."""
    steps = [phase for phase in timeline.phases if phase.name == "decode"]
    if not steps:
        return None
    begin_s = steps[0].start_s
    work = [each for each in timeline.work if (each.launched_s or each.start_s) >= begin_s]
    if not work:
        return None
    num_steps = len(steps)
    spans = _union(work)
    gaps = [after.start_s - before.end_s for before, after in pairwise(spans)]
    waits = sum("Synchronize" in call.name for call in timeline.calls if call.start_s >= begin_s)
    return GpuActivity(
        num_steps=num_steps,
        traced_step_s=(spans[-1].end_s - spans[0].start_s) / num_steps,
        busy_s=sum(span.end_s - span.start_s for span in spans) / num_steps,
        launches=len({each.correlation for each in work}) / num_steps,
        waits=waits / num_steps,
        kernels=sum(not each.is_copy for each in work) / num_steps,
        copies=sum(each.is_copy for each in work) / num_steps,
        gaps=len(gaps) / num_steps,
        median_gap_s=median(gaps) if gaps else None,
        groups=_groups(work, num_steps),
    )


def _union(work: Sequence[Range]) -> list[Range]:
    """Work that overlaps or touches, joined. Ordered by time, as `work` must be."""
    spans: list[Range] = []
    for each in work:
        if spans and each.start_s <= spans[-1].end_s + RESOLUTION_S:
            spans[-1] = Range("", spans[-1].start_s, max(spans[-1].end_s, each.end_s))
        else:
            spans.append(Range("", each.start_s, each.end_s))
    return spans


def _groups(work: Sequence[Work], num_steps: int) -> tuple[OperatorTime, ...]:
    times: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for each, group in zip(work, groups_of(work), strict=True):
        times[group] += each.end_s - each.start_s
        calls[group] += 1
    groups = [OperatorTime(group, times[group] / num_steps, calls[group] / num_steps) for group in times]
    return tuple(sorted(groups, key=lambda each: each.time_s, reverse=True))
