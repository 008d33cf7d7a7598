"""The sampler: from logits to tokens and log-probabilities, all rows of a step at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.rules.base import apply_all
from octavo_engine.runner.rules.changes import on_device
from octavo_engine.runner.rules.grammar import Trial
from octavo_engine.runner.sampling_rows import SamplingBatch
from octavo_engine.types import TokenLogprobs
from octavo_kernels import sample_tokens

BARRED = "the request's bans, allowed tokens and processors together leave no token to draw"


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

    def beside(self, forced: Mapping[int, int], places: NDArray[np.int64]) -> Drawn:
        """Return this draw in some places of a step, beside tokens that were not drawn in the others.

        Args:
            forced: these tokens, by place.
            places: [rows] int64, where the rows of this draw stand.
        """
        num_rows = len(places) + len(forced)
        token_ids, sound = np.empty(num_rows, np.int64), np.ones(num_rows, np.bool_)
        token_ids[[*forced]], token_ids[places], sound[places] = [*forced.values()], self.token_ids, self.sound
        logprobs: list[TokenLogprobs | None] | None = None
        if self.logprobs is not None:
            logprobs = [None] * num_rows
            for place, entry in zip(places.tolist(), self.logprobs, strict=True):
                logprobs[place] = entry
        return Drawn(token_ids, sound, logprobs, {int(places[row]): error for row, error in self.errors.items()})

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


def draw(
    hidden: Tensor,
    draw_from: Callable[..., tuple[Tensor, Tensor]],
    batch: SamplingBatch,
    shared: NDArray[np.int64] | None = None,
) -> Drawn:
    """Draw what `sample` draws from the logits of a plain batch, by a model that need not make them.

    Args:
        hidden: [sources, hidden_size].
        draw_from: from hidden states, and options of `sample_tokens` that are no filters, to tokens and largest logits.
        batch: how to draw, one entry per row.
        shared: [rows], which of the sources each row goes by; None if each has its own.
    """
    assert batch.is_plain
    token_ids, best = draw_from(hidden, **_noise_options(batch, hidden, shared))
    return Drawn(token_ids.cpu().numpy(), np.isfinite(best.cpu().numpy()))


def sample(logits: Tensor, batch: SamplingBatch, shared: NDArray[np.int64] | None = None) -> Drawn:
    """Draw one token per row.

    The order: raw log-probabilities are taken; then come the rules' changes; then processed log-probabilities; then
    `sample_tokens`, which takes the arg-max or applies temperature, min_p, top_k and top_p and draws. Its noise is a
    function of seed, sequence index and position, so that a token depends on its own logits alone. Rows of a trial
    whose token their grammar does not allow draw once more.

    Args:
        logits: [sources, vocab_size] fp32; modified.
        batch: how to draw, one entry per row.
        shared: [rows], which of the sources each row goes by; None if each has its own.
    """
    if shared is not None and (batch.changes or batch.trial):  # rows of one source may be changed in different ways
        logits, shared = logits[on_device(shared, logits)], None
    logprobs = None if batch.logprobs is None else batch.logprobs.raw(logits, shared)
    given_best = _largest(logits) if batch.changes else None
    errors = apply_all(batch.changes, logits)
    if batch.logprobs is not None and logprobs is not None:
        batch.logprobs.replace_processed(logprobs, logits, shared)
    token_ids, best = _draw(logits, batch, shared)
    sound = np.isfinite(best)
    if given_best is not None and not sound.all():
        barred = np.flatnonzero(~sound & np.isfinite(given_best))
        errors = dict.fromkeys(barred.tolist(), BARRED) | errors
    if batch.trial is not None:
        errors = _try(batch.trial, token_ids, sound, logits, batch) | errors
    sound[[*errors]] = False
    entries = None
    if batch.logprobs is not None and logprobs is not None:
        entries = batch.logprobs.entries(logprobs, on_device(token_ids, logits), len(sound))
    return Drawn(token_ids, sound, entries, errors)


def _draw(
    logits: Tensor, batch: SamplingBatch, shared: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the tokens that logits [sources, vocab_size], which are not modified, give, and the logits of these."""
    token_ids, best = sample_tokens(
        logits,
        top_k=on_device(batch.top_k, logits),
        top_p=on_device(batch.top_p, logits),
        min_p=on_device(batch.min_p, logits),
        **_noise_options(batch, logits, shared),
    )
    return token_ids.cpu().numpy(), best.cpu().numpy()


def _noise_options(batch: SamplingBatch, like: Tensor, shared: NDArray[np.int64] | None) -> dict[str, Any]:
    """Return what a draw goes by beside logits and filters, on the device of a tensor."""
    return {
        "temperature": on_device(batch.temperature, like),
        "seeds": on_device(batch.seeds, like),
        "sequence_index": on_device(batch.sequence_index, like),
        "positions": on_device(batch.positions, like),
        "source_rows": None if shared is None else on_device(shared, like),
    }


def _try(
    trial: Trial, token_ids: NDArray[np.int64], sound: NDArray[np.bool_], logits: Tensor, batch: SamplingBatch
) -> dict[int, str]:
    """Draw again the tokens that grammars do not allow, from logits [draws, vocab_size], which lose what masks lack.

    Returns:
        Why rows failed, by place.
    """
    mask = trial.mask(token_ids)
    if mask is None:
        return {}
    places = mask.places
    mask.remove(logits)
    token_ids[places], best = _draw(logits, batch.drawing(places), places)
    barred = places[sound[places] & ~np.isfinite(best)]
    sound[places] &= np.isfinite(best)
    return dict.fromkeys(barred.tolist(), BARRED) | dict(mask.errors)


def _largest(logits: Tensor) -> NDArray[np.float32]:
    """Return the largest of each row of logits [rows, vocab_size], NaN where there is one.

    On a CPU by numpy: torch would wake threads of its own beside those of the kernels, for longer than this takes.
    """
    largest: NDArray[np.float32] = (
        logits.numpy().max(axis=-1) if logits.device.type == "cpu" else logits.amax(dim=-1).cpu().numpy()
    )
    return largest
