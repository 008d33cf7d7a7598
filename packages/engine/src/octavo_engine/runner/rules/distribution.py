"""DistributionRule: filters over the whole distribution, for rows that use one which `sample_tokens` does not have.

The order is vLLM's where vLLM has the filter, with typical_p and XTC where llama.cpp has them: temperature, min_p,
top_k, typical_p, top_p, XTC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules import filters
from octavo_engine.runner.rules.changes import on_device
from octavo_engine.sampling_params import SamplingParams
from octavo_kernels import gumbel_noise_at

MIN_TEMPERATURE = 1e-30  # below it, float32 scores cannot be divided
_XTC_COLUMN = 1 << 31  # of the noise: beyond every vocabulary, so that XTC's chance is independent of the draw


def filters_whole_rows(sampling: SamplingParams) -> bool:
    """Return whether a request's filters, all of them, are this rule's to apply.

    They are too where the filtered distribution is to be seen, not only drawn from.
    """
    seen = sampling.wants_logprobs and sampling.logprobs_mode == "processed"
    return not sampling.greedy and (sampling.typical_p < 1 or sampling.xtc_probability > 0 or seen)


class _Row(NamedTuple):
    sampling: SamplingParams
    seed: int
    sequence_index: int


@dataclass(frozen=True, slots=True)
class _Filters:
    """The filters of some rows of a step's logits, and the chance in 0 .. 1 that XTC goes by."""

    places: list[int]
    samplings: list[SamplingParams]
    chances: list[float]

    def apply(self, logits: Tensor) -> None:
        """Remove the tokens that the filters drop from logits [draws, vocab_size]."""
        for place, sampling, chance in zip(self.places, self.samplings, self.chances, strict=True):
            scores = scaled(logits[place].cpu().numpy(), sampling.temperature)
            if scores is not None:
                _filter(logits[place], scores, sampling, chance)


def _filter(logits: Tensor, scores: filters.Scores, sampling: SamplingParams, chance: float) -> None:
    """Remove the tokens that a request's filters drop from a row [vocab_size], given its scores."""
    left = None
    for keep in _filters_of(sampling):
        kept = keep(scores)
        scores, left = scores[kept], kept if left is None else left[kept]
    removed = filters.removed_by_xtc(scores, sampling.xtc_threshold) if chance < sampling.xtc_probability else None
    if left is not None:
        keep_only(logits, left if removed is None else np.delete(left, removed))
    elif removed is not None:
        logits[on_device(removed, logits)] = float("-inf")


def _filters_of(sampling: SamplingParams) -> Iterator[Callable[[filters.Scores], filters.Places]]:
    """Return the filters of a request in order, but for XTC."""
    if sampling.min_p > 0:
        yield lambda scores: filters.min_p(scores, sampling.min_p)
    if sampling.top_k > 0:
        yield lambda scores: filters.top_k(scores, sampling.top_k)
    if sampling.typical_p < 1:
        yield lambda scores: filters.typical_p(scores, sampling.typical_p)
    if sampling.top_p < 1:
        yield lambda scores: filters.top_p(scores, sampling.top_p)


def scaled(logits: NDArray[np.float32], temperature: float) -> filters.Scores | None:
    """Return (logits - largest logit) / temperature of a row [vocab_size]; None if it holds nothing to choose from."""
    largest = logits.max()
    if not np.isfinite(largest):  # the sampler reports the row
        return None
    with np.errstate(over="ignore"):
        scores = (logits - largest) / np.float32(max(temperature, MIN_TEMPERATURE))
    least: filters.Scores = np.maximum(scores, np.float32(filters.LOWEST))
    return least


def keep_only(logits: Tensor, token_ids: filters.Places) -> None:
    """Remove all other tokens from a row [vocab_size]."""
    indices = on_device(token_ids, logits)
    kept = logits[indices]
    logits.fill_(float("-inf"))
    logits[indices] = kept


class DistributionRule:
    """The filters of each row that needs them, and what its noise depends on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if its filters are applied here."""
        uses = filters_whole_rows(new.sampling)
        if uses:
            self._rows[new.row] = _Row(new.sampling, new.seed, new.sequence_index)
        return uses

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> _Filters:
        """Collect the filters of some rows."""
        known = [self._rows[row] for row in rows.tolist()]
        samplings = [row.sampling for row in known]
        chances = [1.0] * len(known)
        if any(sampling.xtc_probability for sampling in samplings):
            chances = self._chances(known, positions)
        return _Filters(places.tolist(), samplings, chances)

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Nothing to count: a filter sees the distribution alone."""

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        self._rows[row] = self._rows[source]

    def _chances(self, rows: list[_Row], positions: NDArray[np.int64]) -> list[float]:
        """Return a uniform number per row, a function of seed, sequence index and position."""

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self._device)

        gumbel = gumbel_noise_at(
            column([row.seed for row in rows]),
            column([row.sequence_index for row in rows]),
            torch.from_numpy(positions).to(self._device),
            column([_XTC_COLUMN] * len(rows)),
        )
        chances: list[float] = (-(-gumbel.double()).exp()).exp().tolist()  # the distribution function of the noise
        return chances
