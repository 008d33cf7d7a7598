"""Filters of one row's scores: which tokens each of them keeps, of those that are left.

A filter takes scores [vocab_size] float64, minus infinity where a token is gone, and returns what it keeps as a mask of
the same shape. Tokens as good as the last one kept are kept too, so that the order of token ids does not matter. Sums
run along the row, one token after the other: they depend neither on other rows nor on threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def min_p(scores: Tensor, least: float) -> Tensor:
    """Keep the tokens at least `least` times as probable as the likeliest (arXiv 2407.01082)."""
    return scores >= scores.max() + math.log(least)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k largest."""
    return scores >= scores.topk(min(k, len(scores))).values[-1]


def typical_p(scores: Tensor, mass: float) -> Tensor:
    """Keep those whose surprise is nearest to the expected one, up to a probability mass (arXiv 2202.00666)."""
    left = scores.isfinite().nonzero()[:, 0]
    log_probabilities = scores[left].log_softmax(0)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).cumsum(0)[-1]
    distances, order = (-log_probabilities - entropy).abs().sort(stable=True)
    furthest = distances[_num_up_to(probabilities[order], mass) - 1]
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[left[order[distances <= furthest]]] = True
    return kept


def top_p(scores: Tensor, mass: float) -> Tensor:
    """Keep the shortest prefix, by falling probability, that holds a probability mass (arXiv 1904.09751)."""
    in_order = scores[scores.isfinite()].sort(descending=True).values
    return scores >= in_order[_num_up_to(in_order.softmax(0), mass) - 1]


def xtc(scores: Tensor, threshold: float) -> Tensor:
    """Remove all tokens of at least a probability but the least of them; nothing if there is at most one."""
    probabilities = scores.softmax(0)
    likely = probabilities >= threshold
    if int(likely.sum()) < 2:
        return torch.ones_like(likely)
    return probabilities <= probabilities[likely].min()


def _num_up_to(probabilities: Tensor, mass: float) -> int:
    """Return how many of the first tokens it takes to hold a mass."""
    return min(int((probabilities.cumsum(0) < mass).sum()) + 1, len(probabilities))
