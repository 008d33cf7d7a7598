"""min_p, top_k and top_p in Triton without a sort: each is a lowest score, found by search among the logits' values.

A program owns a row (many in the interpreter). To find the k-th largest logit, or where the likeliest tokens hold
top_p, it narrows a range of values: a pass over the row tells how much lies above each of three values in it, and
leaves a quarter. Values are compared as whole numbers in the order of floats, so a search ends after at most 17 passes,
and with the very logit that a sort would find; ties stay together.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import next_power_of_2, rows_of_a_program

COLUMNS = 4096
"""Columns of a row that a program takes at once."""

_LOWEST = tl.constexpr(-(2**31))


def apply_filters(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> None:
    """Remove the tokens that are not kept."""
    num_rows, vocab_size = logits.shape
    columns = min(COLUMNS, next_power_of_2(vocab_size))
    rows = rows_of_a_program(num_rows, columns)
    _filter[(triton.cdiv(num_rows, rows),)](
        logits, temperature, top_k, top_p, min_p, num_rows, vocab_size, logits.stride(0), temperature.stride(0),
        *(0 if values is None else values.stride(0) for values in (top_k, top_p, min_p)),
        ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


@triton.jit
def load_logits(rows, live, first, vocab_size, COLUMNS: tl.constexpr):
    """Load logits [ROWS, COLUMNS] from a column on; -inf outside."""
    columns = first + tl.arange(0, COLUMNS)[None, :]
    return tl.load(rows[:, None] + columns, mask=live[:, None] & (columns < vocab_size), other=float("-inf"))


@triton.jit
def _ordered(x):
    """Return whole numbers that lie in the order of floats x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(logits, largest, heat):
    return tl.div_rn(logits - largest[:, None], heat[:, None] + tl.zeros_like(logits))


@triton.jit
def _search(
    rows, live, vocab_size, searching, largest, heat, lowest_score, goal, COLUMNS: tl.constexpr, MASS: tl.constexpr
):  # fmt: skip
    """Return [ROWS] the largest logit, as an ordered number, above which (itself included) there is at least the goal.

    There are tokens, or with MASS exp(score) of those whose score is not below lowest_score.
    """
    low = tl.full([rows.shape[0]], _LOWEST, tl.int32)
    high = _ordered(largest) + 1
    low_count = tl.zeros_like(low) + vocab_size
    high_count = tl.zeros_like(low)
    searching = searching & (low_count > 1)
    # What is wanted mostly lies a few units of temperature below the largest; every pivot is above -inf.
    first_pivot = _ordered(tl.maximum(largest - 16.0 * heat, -3.0e38))
    second_pivot = _ordered(tl.maximum(largest - 4.0 * heat, -3.0e38))
    third_pivot = _ordered(tl.maximum(largest - heat, -3.0e38))
    while tl.max(searching.to(tl.int32), 0) > 0:
        first_count = tl.zeros_like(low)
        second_count = tl.zeros_like(low)
        third_count = tl.zeros_like(low)
        first_mass = tl.zeros(low.shape, tl.float64)
        second_mass = tl.zeros(low.shape, tl.float64)
        third_mass = tl.zeros(low.shape, tl.float64)
        for first in range(0, vocab_size, COLUMNS):
            logits = load_logits(rows, live, first, vocab_size, COLUMNS)
            ordered = _ordered(logits)
            # Values outside are -inf, and no pivot is as low as that.
            above_first = ordered >= first_pivot[:, None]
            above_second = ordered >= second_pivot[:, None]
            above_third = ordered >= third_pivot[:, None]
            first_count += tl.sum(above_first.to(tl.int32), 1)
            second_count += tl.sum(above_second.to(tl.int32), 1)
            third_count += tl.sum(above_third.to(tl.int32), 1)
            if MASS:
                scores = _scores(logits, largest, heat)
                mass = tl.where(scores >= lowest_score[:, None], tl.exp(scores), 0.0)
                first_mass += tl.sum(tl.where(above_first, mass, 0.0), 1).to(tl.float64)
                second_mass += tl.sum(tl.where(above_second, mass, 0.0), 1).to(tl.float64)
                third_mass += tl.sum(tl.where(above_third, mass, 0.0), 1).to(tl.float64)
        if not MASS:
            first_mass = first_count.to(tl.float64)
            second_mass = second_count.to(tl.float64)
            third_mass = third_count.to(tl.float64)
        in_first = searching & (first_mass >= goal)
        in_second = searching & (second_mass >= goal)
        in_third = searching & (third_mass >= goal)
        below_first = searching & (first_mass < goal)
        below_second = searching & (second_mass < goal) & (first_mass >= goal)
        below_third = searching & (third_mass < goal) & (second_mass >= goal)
        low = tl.where(in_third, third_pivot, tl.where(in_second, second_pivot, tl.where(in_first, first_pivot, low)))
        low_count = tl.where(
            in_third, third_count, tl.where(in_second, second_count, tl.where(in_first, first_count, low_count))
        )
        high = tl.where(
            below_first,
            first_pivot,
            tl.where(below_second, second_pivot, tl.where(below_third, third_pivot, high)),
        )
        high_count = tl.where(
            below_first,
            first_count,
            tl.where(below_second, second_count, tl.where(below_third, third_count, high_count)),
        )
        span = high.to(tl.int64) - low.to(tl.int64)
        searching = searching & (span > 1) & (low_count - high_count > 1)
        first_pivot = (low + tl.maximum(span // 4, 1)).to(tl.int32)
        second_pivot = (low + tl.maximum(span // 2, 1)).to(tl.int32)
        third_pivot = (low + tl.maximum(span // 4 * 3, 1)).to(tl.int32)
        if not MASS:
            searching = searching & (low_count.to(tl.float64) != goal)
    return low


@triton.jit
def _score_from(rows, live, vocab_size, low, largest, heat, lowest_score, COLUMNS: tl.constexpr):
    """Return [ROWS] the least score among logits from `low` on, an ordered number, and from lowest_score on."""
    least = tl.zeros_like(largest)
    for first in range(0, vocab_size, COLUMNS):
        logits = load_logits(rows, live, first, vocab_size, COLUMNS)
        scores = _scores(logits, largest, heat)
        counted = (_ordered(logits) >= low[:, None]) & (scores >= lowest_score[:, None])
        least = tl.minimum(least, tl.min(tl.where(counted, scores, 0.0), 1))
    return least


@triton.jit
def _mass_from(rows, live, vocab_size, largest, heat, lowest_score, COLUMNS: tl.constexpr):
    """Return [ROWS] fp64 the sum of exp(score) over the scores that are not below lowest_score."""
    total = tl.zeros(largest.shape, tl.float64)
    for first in range(0, vocab_size, COLUMNS):
        scores = _scores(load_logits(rows, live, first, vocab_size, COLUMNS), largest, heat)
        total += tl.sum(tl.where(scores >= lowest_score[:, None], tl.exp(scores), 0.0), 1).to(tl.float64)
    return total


@triton.jit
def lowest_kept(rows, live, vocab_size, largest, heat, top_k, top_p, min_p, COLUMNS: tl.constexpr):
    """Return [ROWS] the lowest score that the filters keep; a filter is [ROWS] or None.

    rows: pointers to logits. live: rows that are filtered; their largest logit is finite, and heat above 0.
    """
    lowest = tl.full(largest.shape, float("-inf"), tl.float32)
    if min_p is not None:
        lowest = tl.where(live & (min_p > 0.0), tl.log(tl.where(min_p > 0.0, min_p, 1.0)), lowest)
    if top_k is not None:
        searching = live & (top_k > 0) & (top_k < vocab_size)
        if tl.max(searching.to(tl.int32), 0) > 0:
            low = _search(
                rows, live, vocab_size, searching, largest, heat, lowest, top_k.to(tl.float64), COLUMNS, False
            )  # fmt: skip
            score = _score_from(rows, live, vocab_size, low, largest, heat, lowest, COLUMNS)
            lowest = tl.where(searching, tl.maximum(lowest, score), lowest)
    if top_p is not None:
        searching = live & (top_p < 1.0)
        if tl.max(searching.to(tl.int32), 0) > 0:
            mass = _mass_from(rows, live, vocab_size, largest, heat, lowest, COLUMNS)
            goal = top_p.to(tl.float64) * mass
            low = _search(rows, live, vocab_size, searching, largest, heat, lowest, goal, COLUMNS, True)
            score = _score_from(rows, live, vocab_size, low, largest, heat, lowest, COLUMNS)
            lowest = tl.where(searching, tl.maximum(lowest, score), lowest)
    return lowest


@triton.jit
def load_filter(values_ptr, draws, live, stride):
    """Load a filter's values [ROWS], or None where there is none."""
    return None if values_ptr is None else tl.load(values_ptr + draws * stride, mask=live, other=0)


@triton.jit
def _filter(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, num_rows, vocab_size, logits_stride,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    places = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = places < num_rows
    rows = logits_ptr + places * logits_stride
    heat = tl.load(temperature_ptr + places * temperature_stride, mask=inside, other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    num_bad = tl.zeros([ROWS], tl.int32)
    for first in range(0, vocab_size, COLUMNS):
        logits = load_logits(rows, inside, first, vocab_size, COLUMNS)
        largest = tl.maximum(largest, tl.max(logits, 1))
        num_bad += tl.sum((logits != logits).to(tl.int32), 1)
    live = inside & (heat > 0.0) & (tl.abs(largest) < float("inf")) & (num_bad == 0)
    largest = tl.where(live, largest, 0.0)
    heat = tl.where(live, heat, 1.0)
    lowest = lowest_kept(
        rows, live, vocab_size, largest, heat,
        load_filter(top_k_ptr, places, inside, top_k_stride), load_filter(top_p_ptr, places, inside, top_p_stride),
        load_filter(min_p_ptr, places, inside, min_p_stride), COLUMNS,
    )  # fmt: skip
    for first in range(0, vocab_size, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        scores = _scores(load_logits(rows, live, first, vocab_size, COLUMNS), largest, heat)
        removed = live[:, None] & (columns < vocab_size) & (scores < lowest[:, None])
        tl.store(rows[:, None] + columns, float("-inf"), mask=removed)
