"""What is drawn, by chi-square over 100 000 draws: each way to shape the draw against NumPy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from numpy.typing import NDArray

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.base import apply_all
from octavo_engine.runner.sampler import sample
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.types import SamplingParams

Probabilities = NDArray[np.float64]

NUM_DRAWS = 100_000
LOGITS = np.array([2.0, 1.7, 1.5, 0.9, 0.2, 0.1, -0.5, -1.0, -1.5, -3.0])


def softmax(scores: NDArray[np.float64]) -> Probabilities:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def only(p: Probabilities, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Probabilities:
    """Return what is left of probabilities if some tokens alone are kept."""
    left = np.zeros_like(p)
    left[kept] = p[kept]
    return left / left.sum()


def shortest(order: NDArray[np.int64], p: Probabilities, mass: float) -> NDArray[np.int64]:
    """Return the shortest beginning of an order of tokens that holds a mass."""
    return order[: int((np.cumsum(p[order]) < mass).sum()) + 1]


def top_k(p: Probabilities, k: int) -> Probabilities:
    return only(p, np.argsort(-p)[:k])


def top_p(p: Probabilities, mass: float) -> Probabilities:
    return only(p, shortest(np.argsort(-p), p, mass))


def min_p(p: Probabilities, least: float) -> Probabilities:
    return only(p, p >= least * p.max())


def typical_p(p: Probabilities, mass: float) -> Probabilities:
    possible = p > 0
    surprise = np.full_like(p, np.inf)
    surprise[possible] = -np.log(p[possible])
    entropy = (p[possible] * surprise[possible]).sum()
    return only(p, shortest(np.argsort(np.abs(surprise - entropy)), p, mass))


def xtc(p: Probabilities, probability: float, threshold: float) -> Probabilities:
    likely = np.flatnonzero(p >= threshold)
    removed = likely[np.argsort(p[likely])[1:]]
    return (1 - probability) * p + probability * only(p, np.setdiff1d(np.arange(len(p)), removed))


def mirostat_1(p: Probabilities, limit: float) -> Probabilities:
    """The paper's algorithm 1, as llama.cpp writes it: estimate Zipf's exponent, then k."""
    ranked = np.sort(p)[::-1]
    ranks = np.log(np.arange(2, len(p) + 1) / np.arange(1, len(p)))
    exponent = (ranks * np.log(ranked[:-1] / ranked[1:])).sum() / (ranks**2).sum()
    epsilon = exponent - 1
    return top_k(p, int(((epsilon * 2**limit) / (1 - len(p) ** -epsilon)) ** (1 / exponent)))


def mirostat_2(p: Probabilities, limit: float) -> Probabilities:
    return only(p, -np.log2(p) <= limit)


def counted(sampling: SamplingParams) -> NDArray[np.int64]:
    """Count the tokens of draws from LOGITS, one for each position of one sequence."""
    row = NewRow(
        row=0,
        token_ids=(1,),
        num_prompt_tokens=1,
        sampling=sampling,
        seed=20,
        sequence_index=0,
        stop_token_ids=frozenset(),
        block_ids=((),),
        num_computed_tokens=0,
        num_scheduled_tokens=1,
        samples=True,
    )
    rows = SamplingRows(np.zeros((1, 1), np.int32), len(LOGITS), torch.device("cpu"))
    rows.add(row)
    logits, source = torch.from_numpy(LOGITS).float()[None], np.zeros(NUM_DRAWS, np.int64)
    batch = rows.batch(source, np.arange(NUM_DRAWS))
    assert batch is not None
    if not sampling.xtc_probability:  # other filters see the same in each draw, and once is enough
        once = rows.batch(source[:1], source[:1])
        assert once is not None
        assert not apply_all(once.changes, logits)
        batch = replace(batch, changes=())
    drawn = sample(logits, batch, source)
    return np.bincount(drawn.token_ids, minlength=len(LOGITS))


STATED: dict[str, tuple[SamplingParams, Callable[[], Probabilities]]] = {
    "temperature 1": (SamplingParams(temperature=1.0), lambda: softmax(LOGITS)),
    "cold": (SamplingParams(temperature=0.5), lambda: softmax(LOGITS / 0.5)),
    "hot": (SamplingParams(temperature=1.8), lambda: softmax(LOGITS / 1.8)),
    "top_k": (SamplingParams(temperature=1.5, top_k=5), lambda: top_k(softmax(LOGITS / 1.5), 5)),
    "top_p": (SamplingParams(temperature=1.0, top_p=0.8), lambda: top_p(softmax(LOGITS), 0.8)),
    "min_p": (SamplingParams(temperature=1.3, min_p=0.2), lambda: min_p(softmax(LOGITS / 1.3), 0.2)),
    "typical_p": (SamplingParams(temperature=0.9, typical_p=0.6), lambda: typical_p(softmax(LOGITS / 0.9), 0.6)),
    "min_p, top_k, top_p": (
        SamplingParams(temperature=1.4, min_p=0.1, top_k=6, top_p=0.85),
        lambda: top_p(top_k(min_p(softmax(LOGITS / 1.4), 0.1), 6), 0.85),
    ),
    "top_k, typical_p, top_p": (
        SamplingParams(temperature=1.4, top_k=8, typical_p=0.9, top_p=0.8),
        lambda: top_p(typical_p(top_k(softmax(LOGITS / 1.4), 8), 0.9), 0.8),
    ),
    "xtc": (
        SamplingParams(temperature=1.0, xtc_probability=0.3, xtc_threshold=0.1),
        lambda: xtc(softmax(LOGITS), 0.3, 0.1),
    ),
    "mirostat 1": (
        SamplingParams(temperature=1.2, mirostat_mode=1, mirostat_tau=1.6),
        lambda: mirostat_1(softmax(LOGITS / 1.2), 3.2),
    ),
    "mirostat 2": (
        SamplingParams(temperature=1.2, mirostat_mode=2, mirostat_tau=1.6),
        lambda: mirostat_2(softmax(LOGITS / 1.2), 3.2),
    ),
}
"""By name: parameters, and the probabilities that they mean."""


@pytest.mark.parametrize("name", STATED)
def test_draws_follow_what_the_parameters_mean(name: str) -> None:
    sampling, stated = STATED[name]
    counts, p = counted(sampling), stated()
    possible = p > 0
    assert np.count_nonzero(possible) > 1
    assert counts[~possible].sum() == 0
    expected = p[possible] * NUM_DRAWS
    assert_likely(float(((counts[possible] - expected) ** 2 / expected).sum()), np.count_nonzero(possible) - 1)


def assert_likely(statistic: float, freedom: int) -> None:
    """Chi-square: p above 1e-4, by the approximation of Wilson and Hilferty."""
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert normal < 3.719, (statistic, freedom)
