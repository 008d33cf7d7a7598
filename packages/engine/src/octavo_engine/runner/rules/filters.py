"""Filters of one row's scores: which tokens each of them keeps, of those that are left.

A filter takes scores [vocab_size] float64, minus infinity where a token is gone, and returns what it keeps as a mask of
the same shape. Tokens as good as the last one kept are kept too, so that the order of token ids does not matter. Sums
run along the row, one token after the other: they depend neither on other rows nor on threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NUM_SELECTED = 256


def min_p(scores: Tensor, least: float) -> Tensor:
    """Keep the tokens at least `least` times as probable as the likeliest (arXiv 2407.01082)."""
    return scores >= scores.max() + math.log(least)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k largest."""
    return scores >= scores.topk(min(k, len(scores))).values[-1]


def typical_p(scores: Tensor, mass: float) -> Tensor:
    """Keep those whose surprise is nearest to the expected one, up to a probability mass (arXiv 2202.00666)."""
    log_probabilities = scores.log_softmax(0)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities.masked_fill(probabilities == 0, 0)).cumsum(0)[-1]
    distances = (-log_probabilities - entropy).abs()
    return distances <= _last_needed(distances, probabilities, mass)


def top_p(scores: Tensor, mass: float) -> Tensor:
    """Keep the shortest prefix, by falling probability, that holds a probability mass (arXiv 1904.09751)."""
    return -scores <= _last_needed(-scores, scores.softmax(0), mass)


def xtc(scores: Tensor, threshold: float) -> Tensor:
    """Remove all tokens of at least a probability but the least of them; nothing if there is at most one."""
    probabilities = scores.softmax(0)
    likely = probabilities >= threshold
    if int(likely.sum()) < 2:
        return torch.ones_like(likely)
    return probabilities <= probabilities[likely].min()


def _last_needed(keys: Tensor, probabilities: Tensor, mass: float) -> Tensor:
    """Return the largest key of the shortest list of tokens, by rising key, that holds a mass.

    Mostly few tokens do, so a few are selected first, and more only if these fall short.
    """
    count = _NUM_SELECTED
    while True:
        selected = keys.topk(min(count, len(keys)), largest=False)
        held = probabilities[selected.indices].cumsum(0)
        num_short = int((held < mass).sum())
        if num_short < len(held) or len(held) == len(keys):
            return selected.values[min(num_short, len(held) - 1)]
        count *= 8
