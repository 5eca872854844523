"""Where the time of one decode step at batch 1 goes.

The step's wall time is measured without a profiler. Operators are traced with few and with many
tokens and the difference is taken, so that the prefill cancels; no metric is ever derived in
this way. Of each, the quickest of several counts: a profile is about shares, and whatever else
the machine did only adds to a time.

A profiler makes each operator slower by its own cost. Where the traced operators alone take
longer than the step, they are scaled down to it; what lies between them is then too small to be
seen, and the profile shows it as zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from hasten.bench.result import OperatorTime, ProfileResult
from hasten.errors import RuntimeFailedError
from hasten.profiling.operators import LINEAR, OUTSIDE, group_times
from hasten.profiling.roofline import achieved_bytes_per_s, max_tokens_per_s
from hasten.request import Request, SamplingParams, TokenEvent
from hasten.runtimes.base import OperatorSample
from hasten.runtimes.process import RuntimeProcess

SHORT_TOKENS = 2
NUM_TRACED_STEPS = 8  # torch takes 75 µs to read each operator call of a trace
NUM_TIMED_STEPS = 16
NUM_TIMED = 3
NUM_TRACES = 2


def profile_decode(
    process: RuntimeProcess,
    prompt_token_ids: Sequence[int],
    bandwidth_bytes_per_s: float | None,
    num_steps: int = NUM_TRACED_STEPS,
) -> ProfileResult | None:
    """None where the runtime does not tell its operators' times.

    Args:
        prompt_token_ids: with SHORT_TOKENS and num_steps or NUM_TIMED_STEPS more it must fit the runtime's context.
        bandwidth_bytes_per_s: measured read bandwidth, None where it is not known.

    Raises:
        RuntimeFailedError: the process failed or gave fewer tokens than asked for.
    """
    short = decode_request(prompt_token_ids, SHORT_TOKENS)
    traced = decode_request(prompt_token_ids, SHORT_TOKENS + num_steps)
    long = decode_request(prompt_token_ids, SHORT_TOKENS + NUM_TIMED_STEPS)
    # from here on the prompt is in the prefix cache, if there is one
    if not process.trace([short]):
        return None
    step_s = min(measure_step_s(process, long) for _ in range(NUM_TIMED))
    operators = group_times(_quickest_trace(process, short), _quickest_trace(process, traced), num_steps)
    scaled = scale_to_step(operators, step_s)
    sentence = describe_bottleneck(scaled, step_s, process.weight_bytes_per_token, bandwidth_bytes_per_s)
    return ProfileResult(step_s, scaled, sentence)


def _quickest_trace(process: RuntimeProcess, request: Request) -> tuple[OperatorSample, ...]:
    traces = [process.trace([request]) for _ in range(NUM_TRACES)]
    return min(traces, key=lambda samples: sum(each.time_s for each in samples))


def scale_to_step(operators: Sequence[OperatorTime], step_s: float) -> tuple[OperatorTime, ...]:
    """Operators, if any were long enough to be seen, and what is outside them: up to step_s, largest first."""
    traced_s = sum(each.time_s for each in operators)
    scale = step_s / max(step_s, traced_s)
    scaled = [replace(each, time_s=each.time_s * scale) for each in operators]
    outside = OperatorTime(OUTSIDE, max(0.0, step_s - traced_s), 0.0)
    return tuple(sorted([*scaled, outside], key=lambda each: each.time_s, reverse=True))


def describe_bottleneck(
    operators: Sequence[OperatorTime],
    step_s: float,
    weight_bytes_per_token: int | None,
    bandwidth_bytes_per_s: float | None,
) -> str:
    """One sentence: what takes most of a step, how fast it reads, and what this machine allows.

    Args:
        operators: largest first.
    """
    largest = operators[0]
    what = "work outside operators (Python, the runtime itself)" if largest.group == OUTSIDE else largest.group
    sentence = f"{what} takes {largest.time_s / step_s:.0%} of a step ({ms(largest.time_s)} of {ms(step_s)})"
    linear_s = next((each.time_s for each in operators if each.group == LINEAR), 0.0)
    if not weight_bytes_per_token or linear_s <= 0:
        return sentence
    rate = achieved_bytes_per_s(weight_bytes_per_token, linear_s)
    sentence += f"; linear layers read {weight_bytes_per_token / 1e6:.0f} MB of weights at {rate / 1e9:.1f} GB/s"
    if not bandwidth_bytes_per_s:
        return sentence
    if rate > bandwidth_bytes_per_s:
        return f"{sentence}, more than memory's {bandwidth_bytes_per_s / 1e9:.1f}: from the processor's caches"
    limit = max_tokens_per_s(weight_bytes_per_token, bandwidth_bytes_per_s)
    return (
        f"{sentence}, {rate / bandwidth_bytes_per_s:.0%} of memory's {bandwidth_bytes_per_s / 1e9:.1f}, "
        f"which allows at most {limit:.0f} tokens/s on this machine"
    )


def ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def decode_request(prompt_token_ids: Sequence[int], num_tokens: int) -> Request:
    """A greedy request for exactly so many tokens."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    return Request(f"profile-{num_tokens}", tuple(prompt_token_ids), sampling)


def measure_step_s(
    process: RuntimeProcess, request: Request, on_event: Callable[[TokenEvent], object] | None = None
) -> float:
    """Time per output token of one request, its first token not counted.

    Raises:
        RuntimeFailedError: it gave fewer tokens than asked for, or all at once.
    """
    times = [event.time_s for event in process.generate([request], on_event) if event.token_id is not None]
    if len(times) != request.sampling.max_tokens:
        raise RuntimeFailedError(f"profiling got {len(times)} tokens, {request.sampling.max_tokens} were asked for")
    if times[-1] <= times[0]:
        raise RuntimeFailedError("profiling got all tokens at once, so a step has no length")
    return (times[-1] - times[0]) / (len(times) - 1)
