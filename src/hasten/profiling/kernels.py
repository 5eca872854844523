"""Which part of a decode step a kernel belongs to.

The tables are data. A kernel is put into a group by the module or phase that it was launched in,
where the runtime's trace names those, else by its own name. A matrix product that neither tells
is placed by its position between two attention kernels, which is the same in every decoder:
o, gate and up, down, (head), q, k and v; where the count does not fit it stays "linear".
"""

import re
from collections.abc import Sequence
from itertools import pairwise

from hasten.profiling.operators import OTHER
from hasten.profiling.timeline import Work
from hasten.runtimes.base import MODULE_PREFIX

ATTENTION, LINEAR, SAMPLING, COPIES = "attention", "linear", "sampling", "copies"
QKV, OUTPUT, GATE_UP, DOWN, HEAD = "qkv", "o", "gate_up", "down", "head"
LINEAR_GROUPS = (QKV, OUTPUT, GATE_UP, DOWN, HEAD, LINEAR)

KERNEL_GROUPS = (
    (ATTENTION, r"attention|flash_fwd|fmha|sdpa|softmax_warp"),
    (
        SAMPLING,
        r"greedy|_sample|^(prepare|count_bins|find_intervals|collect|finish)\b|argm(ax|in)|topk|multinomial|sort|distribution|cumsum|scan_kernel",
    ),
    ("rotary", r"_rotate|rotary|rope|\b(cos|sin|neg)_kernel"),
    ("norm", r"rms_?norm|layer_?norm|rsqrt|meanops|pow_tensor"),
    ("activation", r"silu|gelu"),
    ("quantization", r"quantize|_scale_rows"),
    (LINEAR, r"stream_linear|matmul|nvjet|gemm|gemv|cutlass|cublas|splitk|\bdot_kernel"),
    (COPIES, r"_begin_kernel|_end_kernel|memcpy|memset|copy|catarray|fillfunctor|index_elementwise|gather"),
)
MODULE_GROUPS = (
    (QKV, r"^(q|k|v|qkv)_proj$"),
    (OUTPUT, r"^o_proj$"),
    (GATE_UP, r"^(gate|up|gate_up)_proj$"),
    (DOWN, r"^down_proj$"),
    (HEAD, r"^lm_head$"),
    ("norm", r"norm$"),
    ("rotary", r"^rotary_emb$"),
    ("activation", r"^act_fn$"),
)
# what a module does beside the parts that have a group of their own
MODULE_RESTS = {"self_attn": "rotary", "mlp": "activation"}
# matrix products between one attention kernel and the next: one kernel for q, k, v and for gate and up, or one each
ORDERS = {
    4: (OUTPUT, GATE_UP, DOWN, QKV),
    5: (OUTPUT, GATE_UP, DOWN, HEAD, QKV),
    7: (OUTPUT, GATE_UP, GATE_UP, DOWN, QKV, QKV, QKV),
    8: (OUTPUT, GATE_UP, GATE_UP, DOWN, HEAD, QKV, QKV, QKV),
}
FIRST_ORDERS = {1: (QKV,), 3: (QKV,) * 3}
LAST_ORDERS = {4: ORDERS[5][:4], 5: ORDERS[8][:5]}
HELPERS = re.compile(r"splitk|reduce")  # second kernels of a product

_KERNELS = tuple((group, re.compile(pattern)) for group, pattern in KERNEL_GROUPS)
_MODULES = tuple((group, re.compile(pattern)) for group, pattern in MODULE_GROUPS)


def kernel_group(name: str) -> str:
    """The group of a kernel by its name alone, "other" where no pattern fits."""
    lower = name.lower()
    return next((group for group, pattern in _KERNELS if pattern.search(lower)), OTHER)


def groups_of(work: Sequence[Work]) -> list[str]:
    """The group of each piece of work.

    Args:
        work: of whole decode steps, in the order in which it ran.
    """
    groups = [_group_of(each) for each in work]
    starts = [-1, *(index for index, group in enumerate(groups) if group == ATTENTION), len(groups)]
    for before, after in pairwise(starts):
        between = range(before + 1, after)
        products = [
            index for index in between if groups[index] == LINEAR and not HELPERS.search(work[index].name.lower())
        ]
        orders = FIRST_ORDERS if before < 0 else LAST_ORDERS if after == len(groups) else ORDERS
        names = orders.get(len(products))
        if names is None:
            continue
        current = names[0]
        for index in between:
            if groups[index] == LINEAR:
                current = names[products.index(index)] if index in products else current
                groups[index] = current
    return groups


def _group_of(work: Work) -> str:
    by_name = COPIES if work.is_copy else kernel_group(work.name)
    modules = [name.removeprefix(MODULE_PREFIX) for name in work.ranges if name.startswith(MODULE_PREFIX)]
    if not modules:
        return SAMPLING if work.ranges[-1:] == ("sampling",) else by_name
    for group, pattern in _MODULES:
        if pattern.search(modules[-1]):
            return group
    return MODULE_RESTS.get(modules[-1], OTHER) if by_name == OTHER else by_name
