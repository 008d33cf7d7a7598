"""The sampler: from logits to tokens and log-probabilities, all rows of a step at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.sampling_rows import SamplingBatch
from octavo_engine.types import TokenLogprobs
from octavo_kernels import gumbel_noise, gumbel_noise_at

_NEGATIVE_INFINITY = float("-inf")
_FEW = 8  # noise is made one by one for at most this part of the scores: by itself a value costs up to four times more
_SHORT_PREFIX = 1024  # the likeliest tokens that mostly hold top_p; the rest is sorted only where they do not


@dataclass(frozen=True, slots=True)
class Drawn:
    """The draw of one step, on the host.

    Attributes:
        token_ids: [rows] int64; meaningless where `sound` is False.
        sound: [rows] bool, False where the logits held NaN or nothing finite.
        logprobs: one entry per row, None where none were asked for; None if nobody asked.
    """

    token_ids: NDArray[np.int64]
    sound: NDArray[np.bool_]
    logprobs: list[TokenLogprobs | None] | None = None

    @property
    def all_sound(self) -> bool:
        """True unless some row's logits were not numbers."""
        return bool(self.sound.all())


def greedy(token_ids: Tensor, best: Tensor, shared: NDArray[np.int64] | None = None) -> Drawn:
    """Take what a model's own arg-max says.

    Args:
        token_ids: [sources] int64.
        best: [sources] fp32, the logits of these tokens; not finite if the row's logits were not numbers.
        shared: [rows], which of the sources each row goes by; None if each has its own.
    """
    ids, sound = token_ids.cpu().numpy(), np.isfinite(best.cpu().numpy())
    return Drawn(ids, sound) if shared is None else Drawn(ids[shared], sound[shared])


def sample(logits: Tensor, batch: SamplingBatch | None) -> Drawn:
    """Draw one token per row.

    The order: log-probabilities are taken from the logits as they are; banned tokens are removed; penalties; greedy
    rows take the arg-max here (the lowest token id of a tie); then temperature, min_p, top_k, top_p, and the arg-max of
    the remaining scores plus Gumbel noise, which is a draw from their softmax. The noise is a function of seed,
    sequence index and position, and each row is reduced by itself, so that a token depends on its own logits alone.

    Args:
        logits: [rows, vocab_size] fp32; modified.
        batch: how to draw, one entry per row; None takes the arg-max of every row.
    """
    best, token_ids = logits.max(dim=-1)
    if batch is None:
        return greedy(token_ids, best)
    sound = best.isfinite().cpu().numpy()
    raw = _raw_logprobs(logits, batch)
    if batch.banned is not None:
        banned_rows, banned_ids = batch.banned
        logits[_to(banned_rows, logits), _to(banned_ids, logits)] = _NEGATIVE_INFINITY
    if batch.penalties is not None:
        batch.penalties.apply(logits)
    if batch.banned is not None or batch.penalties is not None:
        token_ids = logits.argmax(dim=-1)
    random = np.flatnonzero(batch.temperature > 0)
    if len(random):
        token_ids[_to(random, logits)] = _draw(logits, batch, random)
    logprobs = None if raw is None else _logprobs(raw, token_ids, batch)
    return Drawn(token_ids.cpu().numpy(), sound, logprobs)


def _draw(logits: Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> Tensor:
    """Draw a token for each of some rows; returns [rows] int64."""
    scores = logits if len(rows) == len(logits) else logits[_to(rows, logits)]
    best = scores.amax(dim=-1, keepdim=True)
    scores = (scores - best) / _to(batch.temperature[rows, None], logits)  # at most 0, so that nothing overflows
    scores = filtered(scores, min_p=batch.min_p[rows], top_k=batch.top_k[rows], top_p=batch.top_p[rows])
    seeds, sequence_index, positions = (
        _to(key[rows], logits) for key in (batch.seeds, batch.sequence_index, batch.positions)
    )
    place, column = scores.isfinite().nonzero(as_tuple=True)
    if len(place) <= scores.numel() // _FEW:
        scores[place, column] += gumbel_noise_at(seeds[place], sequence_index[place], positions[place], column)
        return scores.argmax(dim=-1)
    return gumbel_noise(seeds, sequence_index, positions, scores.shape[1]).add_(scores).argmax(dim=-1)


def filtered(
    scores: Tensor, *, min_p: NDArray[np.float32], top_k: NDArray[np.int64], top_p: NDArray[np.float32]
) -> Tensor:
    """Return scores with the tokens that min_p, top_k and top_p take out, in this order, at -inf.

    - min_p keeps the tokens at least min_p times as probable as the likeliest (arXiv 2407.01082).
    - top_k keeps the k largest scores.
    - top_p keeps the shortest prefix, by falling probability, that holds at least top_p (arXiv 1904.09751).

    Every token that equals the last one kept is kept as well, so the result does not depend on the order of token ids.

    Args:
        scores: [rows, vocab_size] fp32, after temperature; not modified.
        min_p: [rows]; 0 keeps all.
        top_k: [rows]; 0 keeps all.
        top_p: [rows]; 1 keeps all.
    """
    if (min_p > 0).any():
        with np.errstate(divide="ignore"):
            margin = _to(np.log(min_p)[:, None], scores)
        scores = _keep_from(scores, scores.amax(dim=-1, keepdim=True) + margin)
    if (top_k > 0).any():
        scores = _keep_from(scores, _top_k_threshold(scores, top_k))
    if (top_p < 1).any():
        scores = _keep_top_p(scores, top_p)
    return scores


def _keep_from(scores: Tensor, threshold: Tensor) -> Tensor:
    return scores.masked_fill(scores < threshold, _NEGATIVE_INFINITY)


def _top_k_threshold(scores: Tensor, top_k: NDArray[np.int64]) -> Tensor:
    """Return the k-th largest score of each row, [rows, 1]; -inf where top_k is 0."""
    vocab_size = scores.shape[1]
    k = np.minimum(top_k, vocab_size)
    largest = scores.topk(int(k.max()), dim=-1).values
    threshold = largest.gather(1, _to(np.maximum(k, 1)[:, None] - 1, scores))
    return threshold.masked_fill(_to(k[:, None] == 0, scores), _NEGATIVE_INFINITY)


def _keep_top_p(scores: Tensor, top_p: NDArray[np.float32]) -> Tensor:
    rows = np.flatnonzero(top_p < 1)
    indices = _to(rows, scores)
    probabilities = scores[indices].softmax(dim=-1)
    wanted = _to(top_p[rows, None].astype(np.float64), scores)
    threshold, enough = _top_p_threshold(probabilities, wanted, _SHORT_PREFIX)
    if not enough.all():
        lacking = ~enough
        threshold[lacking] = _top_p_threshold(probabilities[lacking], wanted[lacking], scores.shape[1])[0]
    removed = torch.zeros_like(scores, dtype=torch.bool)
    removed[indices] = probabilities < threshold
    return scores.masked_fill(removed, _NEGATIVE_INFINITY)


def _top_p_threshold(probabilities: Tensor, wanted: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Find the last probability that top_p keeps among the `prefix` largest.

    Returns:
        The probability [rows, 1], and whether the prefix holds what is wanted [rows] bool (always so if it is all).
    """
    prefix = min(prefix, probabilities.shape[1])
    largest = probabilities.topk(prefix, dim=-1).values
    held = largest.double().cumsum(dim=-1)
    num_kept = (held < wanted).sum(dim=-1, keepdim=True) + 1
    enough = (num_kept <= prefix).squeeze(1) | (prefix == probabilities.shape[1])
    return largest.gather(1, (num_kept - 1).clamp(max=prefix - 1)), enough


def _raw_logprobs(logits: Tensor, batch: SamplingBatch) -> Tensor | None:
    """Return the log-softmax of the rows that want log-probabilities, [wanting rows, vocab_size]."""
    wanting = np.flatnonzero(batch.wants_logprobs)
    return logits[_to(wanting, logits)].log_softmax(dim=-1) if len(wanting) else None


def _logprobs(raw: Tensor, token_ids: Tensor, batch: SamplingBatch) -> list[TokenLogprobs | None]:
    wanting = np.flatnonzero(batch.wants_logprobs)
    chosen_ids = token_ids[_to(wanting, token_ids)]
    chosen = raw.gather(1, chosen_ids[:, None])
    ranks = ((raw > chosen).sum(dim=-1) + 1).tolist()
    num_top = batch.num_top_logprobs[wanting].tolist()
    top = raw.topk(min(max(num_top), raw.shape[1]), dim=-1)
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    result: list[TokenLogprobs | None] = [None] * len(batch.wants_logprobs)
    entries = zip(
        wanting.tolist(), chosen_ids.tolist(), chosen[:, 0].tolist(), ranks, num_top, top_ids, top_values, strict=True
    )
    for row, token_id, logprob, rank, count, ids, values in entries:
        pairs = tuple(zip(ids[:count], values[:count], strict=True))
        result[row] = TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=pairs)
    return result


def _to(array: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)
