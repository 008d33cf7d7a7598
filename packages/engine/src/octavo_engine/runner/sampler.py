"""The sampler: from logits to tokens and log-probabilities, all rows of a step at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.rules.base import LogitChange, RowsFailed
from octavo_engine.runner.sampling_rows import SamplingBatch
from octavo_engine.types import TokenLogprobs
from octavo_kernels import sample_tokens

_BARRED = "the request's bans, allowed tokens and processors together leave no token to draw"


@dataclass(frozen=True, slots=True)
class Drawn:
    """The draw of one step, on the host.

    Attributes:
        token_ids: [rows] int64; meaningless where `sound` is False.
        sound: [rows] bool, False where no token could be drawn.
        logprobs: one entry per row, None where none were asked for; None if nobody asked.
        errors: why no token could be drawn, by row; where it says nothing, the logits held NaN or nothing finite.
    """

    token_ids: NDArray[np.int64]
    sound: NDArray[np.bool_]
    logprobs: list[TokenLogprobs | None] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)

    @property
    def all_sound(self) -> bool:
        """True unless some row drew no token."""
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


def sample(logits: Tensor, batch: SamplingBatch, shared: NDArray[np.int64] | None = None) -> Drawn:
    """Draw one token per row.

    The order: log-probabilities are taken from the logits as they are; then come the rules' changes; then
    `sample_tokens`, which takes the arg-max or applies temperature, min_p, top_k and top_p and draws. Its noise is a
    function of seed, sequence index and position, so that a token depends on its own logits alone.

    Args:
        logits: [sources, vocab_size] fp32; modified.
        batch: how to draw, one entry per row.
        shared: [rows], which of the sources each row goes by; None if each has its own.
    """
    if shared is not None and batch.changes:  # rows of one source may be changed in different ways
        logits, shared = logits[_to(shared, logits)], None
    raw = _raw_logprobs(logits, batch, shared)
    given_best = logits.amax(dim=-1) if batch.changes else None
    errors = _apply(batch.changes, logits)
    token_ids, best = sample_tokens(
        logits,
        _to(batch.temperature, logits),
        seeds=_to(batch.seeds, logits),
        sequence_index=_to(batch.sequence_index, logits),
        positions=_to(batch.positions, logits),
        top_k=_to(batch.top_k, logits),
        top_p=_to(batch.top_p, logits),
        min_p=_to(batch.min_p, logits),
        source_rows=None if shared is None else _to(shared, logits),
    )
    sound = np.isfinite(best.cpu().numpy())
    if given_best is not None and not sound.all():
        barred = np.flatnonzero(~sound & np.isfinite(given_best.cpu().numpy()))
        errors = dict.fromkeys(barred.tolist(), _BARRED) | errors
    sound[[*errors]] = False
    logprobs = None if raw is None else _logprobs(raw, token_ids, batch)
    return Drawn(token_ids.cpu().numpy(), sound, logprobs, errors)


def _apply(changes: Iterable[LogitChange], logits: Tensor) -> dict[int, str]:
    """Change logits [draws, vocab_size] in place; return why rows failed, by place."""
    errors: dict[int, str] = {}
    for change in changes:
        try:
            change.apply(logits)
        except RowsFailed as failure:
            errors = failure.errors | errors
    return errors


def _raw_logprobs(logits: Tensor, batch: SamplingBatch, shared: NDArray[np.int64] | None) -> Tensor | None:
    """Return the log-softmax of the rows that want log-probabilities, [wanting rows, vocab_size]."""
    wanting = np.flatnonzero(batch.wants_logprobs)
    sources = wanting if shared is None else shared[wanting]
    return logits[_to(sources, logits)].log_softmax(dim=-1) if len(wanting) else None


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
