"""Which group an operator belongs to.

The table is data: a name is put into the first group whose pattern is found in it, in lower
case. It knows the operators of torch and ONNX Runtime that decoding uses. Operators that serve
several purposes (an addition, a multiplication) stay in "other".
"""

import re
from collections.abc import Iterable

from hasten.bench.result import OperatorTime
from hasten.runtimes.base import OperatorSample

LINEAR = "linear"
OTHER = "other"
OUTSIDE = "outside operators"

GROUPS = (
    ("attention", r"attention|softmax|\b(bmm|baddbmm)\b|masked_fill"),
    (LINEAR, r"linear|matmul|\b(mm|addmm|addmv|mv|gemm|qgemm)\b|int[48]pack_mm|dynamicquantize"),
    ("norm", r"norm|rsqrt|\b(pow|mean)\b"),
    ("rotary", r"rotary|rope|\b(cos|sin|neg)\b"),
    ("activation", r"silu|gelu|sigmoid|relu|swiglu"),
    ("cache", r"kv_?cache|index_copy|index_put|slice_scatter|scatterelements"),
    ("sampling", r"argmax|argmin|topk|multinomial|\b(sort|cumsum|exponential_|uniform_)\b"),
    (
        "copies and casts",
        r"copy|\b(to|cast|clone|contiguous|cat|concat|stack|memcpy\w*|fill_|zero_|item)\b|local_scalar",
    ),
    (
        "views and allocation",
        r"view|\b(reshape|transpose|permute|expand|slice|select|unsqueeze|squeeze|narrow|split\w*|chunk|unbind|t|as_strided"
        r"|empty\w*|zeros|ones|full|arange|resolve_\w+|alias|flatten|unflatten|detach\w*|resize_|shape)\b",
    ),
)
_PATTERNS = tuple((group, re.compile(pattern)) for group, pattern in GROUPS)


def group_of(operator: str) -> str:
    """The group of an operator, "other" where no pattern fits."""
    name = operator.lower()
    return next((group for group, pattern in _PATTERNS if pattern.search(name)), OTHER)


def group_times(short: Iterable[OperatorSample], long: Iterable[OperatorSample], num_steps: int) -> list[OperatorTime]:
    """Time and calls of each group in one decode step, largest first.

    Args:
        short, long: the same request traced with different numbers of tokens; what both have
            in common, the prefill, cancels.
        num_steps: tokens that long has more than short.
    """
    times: dict[str, float] = {}
    calls: dict[str, float] = {}
    for sign, samples in ((1, long), (-1, short)):
        for sample in samples:
            group = group_of(sample.operator)
            times[group] = times.get(group, 0.0) + sign * sample.time_s / num_steps
            calls[group] = calls.get(group, 0.0) + sign * sample.calls / num_steps
    # a group that only prefill uses leaves noise around zero
    groups = [OperatorTime(group, time_s, max(0.0, calls[group])) for group, time_s in times.items() if time_s > 0]
    return sorted(groups, key=lambda each: each.time_s, reverse=True)
