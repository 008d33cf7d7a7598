"""Filters of one row's scores: which tokens each of them keeps, of those that are left.

Scores are [num_left] fp32, logarithms of probabilities up to a constant, 0 at most; a token that is barred has less
than any other. A filter returns the places that it keeps, ascending, so that the next one has fewer to look at.
Tokens as good as the last one kept are kept too, so that the order of token ids does not matter.

By numpy, on one thread: a row depends on nothing but itself, and torch would wake threads of its own beside those of
the kernels, for longer than a pass over a row takes. Where few tokens decide, a cut through the row finds them and few
are sorted; if they fall short, the cut goes deeper.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Places = NDArray[np.int64]

LOWEST = -1e4
"""The score of barred tokens, whose probability is 0 then."""

_FIRST_CUT = 8.0


def min_p(scores: Scores, least: float) -> Places:
    """Keep the tokens at least `least` times as probable as the likeliest (arXiv 2407.01082)."""
    return np.flatnonzero(scores >= math.log(least))


def top_k(scores: Scores, k: int) -> Places:
    """Keep the k largest."""
    if k >= len(scores):
        return np.arange(len(scores))
    return np.flatnonzero(scores >= -smallest(-scores, k)[-1])


def typical_p(scores: Scores, mass: float) -> Places:
    """Keep those whose surprise is nearest to the expected one, up to a probability mass (arXiv 2202.00666)."""
    powers = np.exp(scores)
    total = float(powers.sum())
    # Surprise and entropy hold the same constant, which their difference does not.
    distances = np.abs(scores - np.float32(float((powers * scores).sum()) / total))
    return np.flatnonzero(distances <= _last_needed(distances, powers, mass * total))


def top_p(scores: Scores, mass: float) -> Places:
    """Keep the shortest prefix, by falling probability, that holds a probability mass (arXiv 1904.09751)."""
    powers = np.exp(scores)
    return np.flatnonzero(-scores <= _last_needed(-scores, powers, mass * float(powers.sum())))


def removed_by_xtc(scores: Scores, threshold: float) -> Places:
    """Return all tokens of at least a probability but the least of them; none if there is at most one."""
    powers = np.exp(scores)
    likely = np.flatnonzero(powers >= threshold * float(powers.sum()))
    return likely[powers[likely] > powers[likely].min()] if len(likely) else likely


def smallest(keys: Scores, count: int) -> Scores:
    """Return the `count` smallest keys, of which the least is 0, in order; all if they are fewer."""
    cut = _FIRST_CUT
    while True:
        chosen = keys[keys <= cut]
        if len(chosen) > count:
            return np.sort(np.partition(chosen, count - 1)[:count])
        if len(chosen) == count or cut > -LOWEST:
            return np.sort(chosen)
        cut *= 2


def _last_needed(keys: Scores, powers: Scores, needed: float) -> float:
    """Return the largest key of the shortest list of tokens, by rising key, whose powers sum up to what is needed."""
    cut = _FIRST_CUT
    while True:
        chosen = np.flatnonzero(keys <= cut)
        if cut > -LOWEST or float(powers[chosen].sum(dtype=np.float64)) >= needed:
            break
        cut *= 2
    order = chosen[np.argsort(keys[chosen])]
    num_short = int((powers[order].cumsum(dtype=np.float64) < needed).sum())
    return float(keys[order[min(num_short, len(order) - 1)]])
