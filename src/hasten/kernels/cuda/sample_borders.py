"""Where top-k and top-p cut a row of logits: functions of the Triton kernels in `sample_kernels`.

`find_interval` brackets the borders by a histogram of distances, where a distance is (largest
logit - logit) / temperature. `settle_in_list` then finds them exactly by bisection over the
tokens in that bracket; `settle_in_row` does so over all tokens where the bracket holds too many.
A weight is exp(-distance) as an integer, so that sums are exact in any order. Logits are compared
as integers of the same order, their keys.
"""

import triton
import triton.language as tl

NUM_BINS = tl.constexpr(128)
DEPTH = tl.constexpr(28.0)
"""At this distance a token's weight is 0."""
ONE = tl.constexpr(1099511627776.0)
"""The weight of the largest logit, 2^40."""
NUM_PARAMETERS = tl.constexpr(8)
INTERVAL_SIZE = tl.constexpr(8)
LOWEST = tl.constexpr(-(2**31))
LEAST_RANK = tl.constexpr(-(2**63))


@triton.jit
def ordered(values):
    """int32 in the order of the float32 values, which hold no NaN and no -0.0."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def canonical(values):
    """A NaN becomes +inf, which is reported as not finite; -0.0 becomes 0.0."""
    values = tl.where(values != values, float("inf"), values)  # noqa: PLR0124
    return tl.where(values == 0.0, 0.0, values)


@triton.jit
def load_values(logits, tokens, mask):
    return canonical(tl.load(logits + tokens, mask=mask, other=-float("inf")))


@triton.jit
def reciprocal_of(temperature):
    return tl.minimum(1.0 / temperature, 1e30)


@triton.jit
def weights_of(distance):
    """2^40 times exp(-distance), float32 rounded down to int64; 0 from DEPTH on."""
    return tl.where(distance < DEPTH, tl.exp(-distance) * ONE, 0.0).to(tl.int64)


@triton.jit
def load_best(tile_max, row, NUM_TILES: tl.constexpr, TILES: tl.constexpr):
    tiles = tl.arange(0, TILES)
    return tl.max(tl.load(tile_max + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=-float("inf")), axis=0)


@triton.jit
def load_range(tile_max, tile_min, row, reciprocal, NUM_TILES: tl.constexpr, TILES: tl.constexpr):
    """The row's largest logit, and how many bins there are for one unit of distance."""
    tiles = tl.arange(0, TILES)
    best = load_best(tile_max, row, NUM_TILES, TILES)
    least = tl.min(tl.load(tile_min + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=float("inf")), axis=0)
    return best, NUM_BINS / tl.maximum(tl.minimum((best - least) * reciprocal, DEPTH), 1e-30)


@triton.jit
def bins_of(distance, bins_per_unit):
    return tl.minimum((tl.where(distance < DEPTH, distance, 0.0) * bins_per_unit).to(tl.int32), NUM_BINS - 1)


@triton.jit
def find_interval(counts, top_k, top_p, bins_per_unit):
    """The bins, first to last, that the borders of top-k and top-p lie in, whatever the scores in them.

    Returns first, last, the number of tokens before first, the number in first..last, and
    whether top-k drops any. What is before first stays; what is after last goes.
    """
    bins = tl.arange(0, NUM_BINS)
    reached = tl.cumsum(counts, axis=0)
    has_k = top_k < tl.sum(counts, axis=0)
    last_of_k = tl.sum((reached < top_k).to(tl.int32), axis=0)
    first = tl.where(has_k, last_of_k, NUM_BINS)
    last = tl.where(has_k, last_of_k, NUM_BINS - 1)
    if top_p < 1.0:
        # The fewest and the most tokens that top-k leaves of each bin, times a bin's least and
        # largest weight, widened by more than what rounding can shift.
        most = tl.where(bins <= last, counts, 0)
        fewest = tl.where(has_k & (bins == last_of_k), top_k - (reached - counts), most)
        edges = bins.to(tl.float32) / bins_per_unit
        high = most.to(tl.float64) * (tl.exp(-edges) * 1.0001).to(tl.float64)
        low = fewest.to(tl.float64) * (tl.exp(-edges - 1.0 / bins_per_unit) * 0.9999).to(tl.float64)
        top = top_p.to(tl.float64)
        high_before, low_before = tl.cumsum(high, axis=0) - high, tl.cumsum(low, axis=0) - low
        high_from, low_from = tl.cumsum(high, axis=0, reverse=True), tl.cumsum(low, axis=0, reverse=True)
        # A bin is past the border if what is before it has the share top_p of all.
        may_be_past = (1.0 - top) * high_before >= top * low_from
        must_be_past = (1.0 - top) * low_before >= top * high_from
        first = tl.minimum(tl.maximum(NUM_BINS - tl.sum(may_be_past.to(tl.int32), axis=0) - 1, 0), last)
        if not has_k:
            last = tl.maximum(NUM_BINS - tl.sum(must_be_past.to(tl.int32), axis=0) - 1, first)
    above = tl.sum(tl.where(bins < first, counts, 0), axis=0)
    size = tl.sum(tl.where((bins >= first) & (bins <= last), counts, 0), axis=0)
    return first, last, above, size, has_k


@triton.jit
def measure_row(logits, reciprocal, best, from_key, vocab_size, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """Number or weight of the row's tokens from a key on."""
    total = tl.zeros([TILE], dtype=tl.int64)
    for start in range(0, vocab_size, TILE):
        tokens = start + tl.arange(0, TILE)
        values = load_values(logits, tokens, tokens < vocab_size)
        distance = (best - values) * reciprocal
        counted = (distance < DEPTH) & (ordered(values) >= from_key)
        if BY_WEIGHT:
            total += tl.where(counted, weights_of(distance), 0)
        else:
            total += counted.to(tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def border_in_row(
    logits, reciprocal, best, low, high, floor, target, vocab_size, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr
):
    """The largest key, from low to high, from which on the row's tokens, not below floor, reach the target."""
    while high - low > 1:
        middle = (low + high) >> 1
        from_key = tl.maximum(middle, floor.to(tl.int64)).to(tl.int32)
        reached = measure_row(logits, reciprocal, best, from_key, vocab_size, BY_WEIGHT, TILE).to(tl.float64) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low.to(tl.int32)


@triton.jit
def settle_in_row(
    logits,
    sums_at,
    interval,
    border,
    best,
    reciprocal,
    bins_per_unit,
    num_k,
    top_p,
    vocab_size,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The final border, by bisection over the whole row, and all groups' sums."""
    unit = 1.0 / (bins_per_unit * reciprocal)
    low = ordered(canonical(best - (tl.load(interval + 1).to(tl.float32) + 1.01) * unit)).to(tl.int64)
    high = ordered(canonical(tl.minimum(best - (tl.load(interval).to(tl.float32) - 0.01) * unit, best)))
    high = high.to(tl.int64) + 1
    floor = tl.full([], LOWEST, tl.int32)
    if tl.load(interval + 4) != 0:
        target = num_k.to(tl.float64)
        floor = border_in_row(logits, reciprocal, best, low, high, floor, target, vocab_size, False, TILE)
    if top_p < 1.0:
        total = measure_row(logits, reciprocal, best, floor, vocab_size, True, TILE)
        target = top_p.to(tl.float64) * total.to(tl.float64)
        by_weight = border_in_row(logits, reciprocal, best, low, high, floor, target, vocab_size, True, TILE)
        border = tl.maximum(border, by_weight)
    border = tl.maximum(border, floor)
    for tile in range(0, NUM_TILES):
        tokens = tile * TILE + tl.arange(0, TILE)
        values = load_values(logits, tokens, tokens < vocab_size)
        weights = tl.where(ordered(values) >= border, weights_of((best - values) * reciprocal), 0)
        groups = tl.sum(tl.reshape(weights, [TILE // GROUP, GROUP]), axis=1)
        tl.store(sums_at + tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP), groups)
    return border


@triton.jit
def border_in_list(keys, values, above, target):
    """The largest key from which on the listed values, and those above the list, reach the target.

    values: integers, 0 past the end of the list.
    """
    low = tl.min(tl.where(values > 0, keys, 0x7FFFFFFF), axis=0).to(tl.int64)
    high = tl.max(tl.where(values > 0, keys, LOWEST), axis=0).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = (above + tl.sum(tl.where(keys >= middle, values, 0), axis=0)).to(tl.float64) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low.to(tl.int32)


@triton.jit
def settle_in_list(
    logits,
    sums_at,
    interval,
    list_at,
    above_at,
    below_at,
    border,
    best,
    reciprocal,
    num_k,
    top_p,
    log_min_p,
    NUM_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The final border, by bisection over the list, whose tokens that stay are added to their groups' sums."""
    num_above, size, has_k = tl.load(interval + 2), tl.load(interval + 3), tl.load(interval + 4) != 0
    places = tl.arange(0, LENGTH)
    is_listed = places < size
    tokens = tl.load(list_at + places, mask=is_listed, other=0)
    values = load_values(logits, tokens, is_listed)
    keys = ordered(values)
    weights = tl.where(is_listed, weights_of((best - values) * reciprocal), 0)
    floor = tl.full([], LOWEST, tl.int32)
    if has_k:
        floor = border_in_list(keys, is_listed.to(tl.int32), num_above, num_k.to(tl.float64))
    if top_p < 1.0:
        tiles, groups = tl.arange(0, TILES), tl.arange(0, GROUPS)
        is_tile, is_group = tiles < NUM_TILES, groups < NUM_TILES * (TILE // GROUP)
        if log_min_p > -float("inf"):  # what is above the list is not all in the groups' sums
            above = tl.sum(tl.load(above_at + tiles, mask=is_tile, other=0), axis=0)
        else:
            above = tl.sum(tl.load(sums_at + groups, mask=is_group, other=0), axis=0)
        below = tl.sum(tl.load(below_at + tiles, mask=is_tile, other=0), axis=0)
        of_k = tl.where(keys >= floor, weights, 0)
        total = above + tl.sum(of_k, axis=0) + tl.where(has_k, 0, below)
        target = top_p.to(tl.float64) * total.to(tl.float64)
        border = tl.maximum(border, border_in_list(keys, of_k, above, target))
    border = tl.maximum(border, floor)
    tl.debug_barrier()  # until every warp has read the sums above
    tl.atomic_add(sums_at + tokens // GROUP, weights, mask=is_listed & (keys >= border), sem="relaxed")
    return border
