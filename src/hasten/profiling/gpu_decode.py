"""Where the time of one decode step at batch 1 goes on a GPU.

The step's length, the power and the trace come from runs of their own: what measures one would
disturb the others. No figure is one run's difference from another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.bench.result import ProfileResult
from hasten.profiling.decode import decode_request, measure_step_s, ms, scale_to_step
from hasten.profiling.gpu_activity import GpuActivity, gpu_activity
from hasten.profiling.kernels import LINEAR_GROUPS
from hasten.profiling.operators import OUTSIDE
from hasten.profiling.power import MIN_WINDOW_S, PowerMeter
from hasten.profiling.roofline import achieved_bytes_per_s, max_tokens_per_s
from hasten.profiling.timeline import read_timeline
from hasten.request import TokenEvent
from hasten.runtimes.process import RuntimeProcess

NUM_TIMED = 3
NUM_STEPS = 32
IDLE = "GPU idle"
# below this share of a step the GPU waits for the CPU more than memory explains
BUSY_ENOUGH = 0.8


@dataclass(frozen=True)
class GpuDecode:
    """One decode step, timed without a profiler and then looked at with one.

    Args:
        step_s: the shortest of several runs' times per output token.
    """

    step_s: float
    activity: GpuActivity

    def result(self, weight_bytes_per_token: int | None, bandwidth_bytes_per_s: float | None) -> ProfileResult:
        """As a benchmark's result keeps it: parts that add up to the step."""
        parts = [
            replace(part, group=IDLE) if part.group == OUTSIDE else part
            for part in scale_to_step(self.activity.groups, self.step_s)
        ]
        sentence = describe_gpu_bottleneck(self, weight_bytes_per_token, bandwidth_bytes_per_s)
        return ProfileResult(self.step_s, tuple(parts), sentence)


def profile_gpu_decode(
    process: RuntimeProcess, prompt_token_ids: Sequence[int], trace_path: Path, num_steps: int = NUM_STEPS
) -> GpuDecode | None:
    """None where the runtime makes no trace that shows its decode steps on the GPU.

    Args:
        trace_path: gets the Chrome trace.

    Raises:
        RuntimeFailedError: the process failed or gave fewer tokens than asked for.
    """
    request = decode_request(prompt_token_ids, num_steps + 1)
    measure_step_s(process, request)  # compiles, captures and fills caches
    step_s = min(measure_step_s(process, request) for _ in range(NUM_TIMED))
    if not process.record([request], trace_path):
        return None
    activity = gpu_activity(read_timeline(trace_path))
    return None if activity is None else GpuDecode(step_s, activity)


def measure_power_w(
    process: RuntimeProcess, prompt_token_ids: Sequence[int], step_s: float, max_tokens: int
) -> float | None:
    """Mean power between first and last token of one request; None if the model's context is too short for it.

    Args:
        max_tokens: most tokens of output that the runtime has room for.

    Raises:
        MissingExtraError, RuntimeFailedError: see PowerMeter.
    """
    num_tokens = min(max_tokens, max(2, math.ceil(MIN_WINDOW_S / step_s) + 1))
    with PowerMeter() as meter:
        num_seen = 0

        def watch(event: TokenEvent) -> None:
            nonlocal num_seen
            num_seen += 1
            if num_seen == 1:
                meter.start()
            elif num_seen == num_tokens:
                meter.stop()

        measure_step_s(process, decode_request(prompt_token_ids, num_tokens), watch)
        return meter.mean_w


def describe_gpu_bottleneck(
    decode: GpuDecode, weight_bytes_per_token: int | None, bandwidth_bytes_per_s: float | None
) -> str:
    """One sentence: whether the GPU waits for the CPU, or what it is busy with and how near that is to the limit."""
    step_s, activity = decode.step_s, decode.activity
    busy = activity.busy_share(step_s)
    if busy < BUSY_ENOUGH:
        sentence = (
            f"the CPU: the GPU works {busy:.0%} of a step ({ms(activity.busy_s)} of {ms(step_s)}) "
            f"and waits for {activity.launches:.0f} launches the rest"
        )
    else:
        largest = activity.groups[0]
        sentence = (
            f"the GPU, busy {busy:.0%} of a step: {largest.group} takes {largest.time_s / activity.busy_s:.0%} of that "
            f"({ms(largest.time_s)} of {ms(activity.busy_s)})"
        )
    linear_s = sum(group.time_s for group in activity.groups if group.group in LINEAR_GROUPS)
    if not weight_bytes_per_token or linear_s <= 0:
        return sentence
    rate = achieved_bytes_per_s(weight_bytes_per_token, linear_s)
    sentence += f"; linear layers read {weight_bytes_per_token / 1e6:.0f} MB of weights at {rate / 1e9:.0f} GB/s"
    if not bandwidth_bytes_per_s:
        return sentence
    if rate > bandwidth_bytes_per_s:
        return f"{sentence}, more than memory's {bandwidth_bytes_per_s / 1e9:.0f}: from the GPU's caches"
    limit = max_tokens_per_s(weight_bytes_per_token, bandwidth_bytes_per_s)
    return (
        f"{sentence}, {rate / bandwidth_bytes_per_s:.0%} of memory's {bandwidth_bytes_per_s / 1e9:.0f}, "
        f"which allows at most {limit:.0f} tokens/s on this GPU"
    )
